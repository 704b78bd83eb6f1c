"""What a call costs a GPU besides wall time: the time of its kernels without launches, and its peak of memory."""

import statistics
import time
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")
_CALLS, _REPLAYS, _SECONDS = 10, 15, 1.0


def peak_mib(call: Callable[[], object]) -> float:
    """How far allocated memory rises above where it is, while `call` runs."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def captured(call: Callable[[], Result], calls: int = 1) -> tuple[torch.cuda.CUDAGraph, Result]:
    """A CUDA graph of so many calls, and what the last of them gave, which a replay overwrites.

    Raises:
        RuntimeError: the call can't be captured.
    """
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what the first calls allocate and compile must not be captured
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            result = call()
    return graph, result


def graph_ms(call: Callable[[], object]) -> float:
    """Median time of a call in a replayed CUDA graph of ten: no launch gaps, the L2 warm, as between two layers.

    Raises:
        RuntimeError: the call can't be captured.
    """
    graph, _ = captured(call, _CALLS)
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 3 or (len(times) < _REPLAYS and time.perf_counter() - start < _SECONDS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / _CALLS)
    return statistics.median(times)


def device_figures(call: Callable[[], object], capturable: bool) -> tuple[dict[str, float], str]:
    """Columns of the table that only a GPU has, and why one of them is missing."""
    figures = {"peak MiB": peak_mib(call)}
    if not capturable:
        return figures, ""
    try:
        return figures | {"graph ms": graph_ms(call)}, ""
    except RuntimeError as problem:
        return figures, f"not captured: {first_line(problem)}"


def refusal(call: Callable[[], object]) -> str:
    """Why a backend does not take this call, "" where it does.

    Raises:
        RuntimeError: the device itself failed, after which nothing that it computes means anything.
    """
    try:
        call()
    except RuntimeError as problem:
        if "CUDA error" in str(problem):
            raise
        return first_line(problem)
    return ""


def first_line(problem: BaseException) -> str:
    """What a table has room for of an error."""
    return f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0][:100]}"
