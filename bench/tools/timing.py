"""Timing that waits for the device, and which implementations are worth timing."""

import statistics
import time
from collections.abc import Callable

import torch

# The reference is the definition, written to be read, and Triton's interpreter is for tests: their time says nothing.
IMPLEMENTED = ["public", "torch", "triton" if torch.cuda.is_available() else "cpu"]


Work = Callable[[], object]


def interleaved(works: dict[str, Work], rounds: int) -> dict[str, float]:
    """Median seconds of each, after one call to warm up."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if number:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def synchronized_clock() -> float:
    """Wall time once the device has done what it was given; as a pytest-benchmark timer."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def note_device_figures(benchmark, function: Callable[[], object]) -> None:
    """On a GPU: time of the kernels alone and peak memory of a call, into `extra_info`."""
    if not torch.cuda.is_available() or benchmark.disabled:
        return
    from triton.testing import do_bench

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    benchmark.extra_info["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    benchmark.extra_info["device_ms"] = do_bench(function, return_mode="median")
