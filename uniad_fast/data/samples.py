"""What a data set is: samples to learn from and to test on. `uniad_fast.data.datasets` reads what people have."""

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UniadFastError

GOOD = "good"
GOOD_WORDS = frozenset({"good", "ok", "normal"})


class DataError(UniadFastError):
    """A data set that can't be used; the message says where and why."""


@dataclass(frozen=True)
class Sample:
    """One image: its file, class, kind ("good" or the defect's name), and mask (a file, or a folder of them)."""

    path: Path
    class_name: str
    kind: str = GOOD
    mask: Path | None = None

    @property
    def defective(self) -> bool:
        return self.kind != GOOD


@dataclass(frozen=True)
class Dataset:
    """`train` holds good images only; `test` both, and may be empty. `notes` say what was not looked at, and why."""

    name: str
    train: list[Sample] = field(default_factory=list)
    test: list[Sample] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def is_good(kind: str) -> bool:
    """Whether the name of a kind of image means a good one: "good", "ok" or "normal", in any case."""
    return kind.strip().lower() in GOOD_WORDS


def hold_out(samples: list[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Split into (kept, held out): `share` of each class, at least one of a class with two or more, never all."""
    kept, held_out = [], []
    for _, members in sorted(by_class(samples).items()):
        members = list(members)
        random.Random(seed).shuffle(members)
        count = min(max(1, round(share * len(members))), len(members) - 1) if share > 0 else 0
        held_out += members[:count]
        kept += members[count:]
    return kept, held_out


def by_class(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    """{class: its samples}, in the order of their first."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.class_name, []).append(sample)
    return groups
