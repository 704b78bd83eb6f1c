"""Which cases a run leaves out: `large` without --large, `gpu` without a GPU."""

from collections.abc import Iterable
from typing import Any

import pytest

LARGE, GPU, HEAVY = "large", "gpu", "heavy"
MARKS = {
    LARGE: "takes long on a CPU; measured with --large",
    GPU: "is worth measuring on a GPU alone",
    HEAVY: "takes more time than others; has the larger share of it, at the end, with what they left",
}
_WEIGHT = 8


def cases(those: Iterable[Any], *marks: str) -> list:
    """Parameters of a benchmark, each under its case's name."""
    return [pytest.param(case, id=case.name, marks=[getattr(pytest.mark, mark) for mark in marks]) for case in those]


def is_left_out(marks: Iterable[str], large: bool) -> bool:
    """Whether a run does not select a case that has these marks."""
    return LARGE in marks and not large


def why_not_here(marks: Iterable[str], device: str) -> str:
    """The reason to skip a case that has these marks on a device, "" where there is none."""
    return f"{MARKS[GPU]}, and this is --device {device}" if GPU in marks and not device.startswith("cuda") else ""


def weight_of(marks: Iterable[str]) -> int:
    """How many times the share of others a case gets."""
    return _WEIGHT if HEAVY in marks else 1
