"""Kernels compiled for chips that are not here: no spill, no local memory, within shared memory, on the matrix unit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
CHOSEN_ON = (3, 8)
ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < CHOSEN_ON,
    reason="older releases of Triton spill in some kernels, see docs/design/gpu-kernels.md",
)
@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_the_papers_kernels_fit(chip):
    """A process of its own: this one has the kernels under the interpreter. The report itself says what is unfit."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        "-m",
        "bench.reports.compile_report",
        "--quick",
        "--chip",
        chip,
        "--dtype",
        "fp32",
        "--dtype",
        "bf16",
    ]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr
    assert "all fit: no spill" in result.stdout, result.stdout[-3000:]
    # In 2 dtypes: 3 attention kernels with and without dropout, 3 of jitter, 4 between products. In bf16, with and
    # without: the gradients of whole sequences, and off Blackwell their outputs.
    assert result.stdout.count(chip) == 28 + (0 if chip == "sm_100" else 2)
