"""Time and memory of one pass of attention forward and backward on a CPU, whose peak only a process of its own tells.

python -m bench.tools.attention_peak CASE NAME THREADS
"""

import subprocess
import sys
import time
from pathlib import Path

import torch

from bench.tools.cases import ATTENTION, LARGE, AttentionCase
from bench.tools.competitors import attention, inputs
from bench.tools.peak import extra_bytes

_CPU, _DROPOUT = torch.device("cpu"), 0.1
_ROOT = Path(__file__).parents[2]


def attention_peak(name: str, case: AttentionCase) -> tuple[float, int]:
    """Seconds, and bytes beside the inputs at the peak; what is loaded once is brought in by a small case before."""
    for each in (case.tiny, case):
        run = attention(name, each, _DROPOUT, _CPU, torch.float32)
        tensors = inputs(each, _CPU, torch.float32, grad=True)
        weight = torch.ones_like(tensors[0])
        start = time.perf_counter()
        extra = extra_bytes(lambda: torch.autograd.grad(run(*tensors), tensors, weight))  # noqa: B023
    return time.perf_counter() - start, extra


def attention_peak_elsewhere(name: str, case: AttentionCase) -> tuple[float, int]:
    """`attention_peak` of a case of `ATTENTION` or `LARGE`, in a new process with as many threads."""
    command = [sys.executable, "-m", "bench.tools.attention_peak", case.name, name, str(torch.get_num_threads())]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=_ROOT).stdout
    seconds, extra = out.split()
    return float(seconds), int(extra)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(*attention_peak(sys.argv[2], next(case for case in (*ATTENTION, *LARGE) if case.name == sys.argv[1])))
