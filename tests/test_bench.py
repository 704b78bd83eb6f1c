"""The comparison scripts run, small; what they print is for people."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("compare.py --smoke --only 14x14", "x public, float32"),
        ("compare_replaced.py --smoke", "MB more"),
        ("profile_step.py --steps 1 --smoke", "attention, backward"),
        ("pace.py --smoke", "x fast"),
    ],
)
def test_comparisons_run(command, expected):
    result = subprocess.run([sys.executable, *command.split()], capture_output=True, text=True, cwd=BENCH)
    assert result.returncode == 0, result.stderr
    assert expected in result.stdout, result.stdout
