"""A few inputs for every target; `python -m tests.fuzz` tries many."""

import pytest

from .targets import TARGETS, TRITON, run

BUDGET = 600


@pytest.mark.parametrize("name", TARGETS)
def test_fuzz(name):
    wanted = max(15, round(BUDGET * TARGETS[name].share))
    assert run(TARGETS[name], wanted) > 0


@pytest.mark.parametrize("name", TRITON)
def test_fuzz_in_the_interpreter(name):
    pytest.importorskip("triton")
    assert run(TRITON[name], 6) > 0
