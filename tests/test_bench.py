"""The comparison scripts run, small; what they print is for people."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"


@pytest.mark.parametrize(
    ("script", "expected"), [("compare.py", "x public, float32"), ("compare_replaced.py", "MB more")]
)
def test_comparisons_run(script, expected):
    command = [sys.executable, script, "--smoke", *(["--only", "14x14"] if script == "compare.py" else [])]
    result = subprocess.run(command, capture_output=True, text=True, cwd=BENCH)
    assert result.returncode == 0, result.stderr
    assert expected in result.stdout, result.stdout
