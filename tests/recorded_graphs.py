"""A stand-in for CUDA graphs on a CPU: it writes down what is computed, and computes just that again.

What a replay does is what a graph's replay does: the same operators and Triton kernels, on the same memory, with the
same numbers from Python; draws go on where the generator is. What a capture does not allow is an error here too: to
read back what is computed, to copy from Python's memory, and shapes that hang on values. Not shown: streams, memory
that is used again inside a graph, and what a GPU's own operators do besides computing.
"""

import contextlib
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.reports.launches import FREE
from uniad_fast.models import training_pass
from uniad_fast.ops import geometry, linear, packed_heads, tracing

_READ_BACK = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique"}
_FROM_PYTHON = {"lift_fresh", "lift_fresh_copy", "scalar_tensor"}


class RecordedGraphs:
    """Captures; `replayed` counts what replays have called."""

    def __init__(self) -> None:
        self.replayed = 0

    def beside(self, call: Callable[[], Tensor]) -> Tensor:
        return call()

    def capture(self, call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        from triton.runtime.interpreter import InterpretedFunction

        calls: list[Callable[[], object]] = []
        run = InterpretedFunction.run

        def launch(kernel: Any, *args: Any, **options: Any) -> None:
            with torch._C._DisableTorchDispatch():
                run(kernel, *args, **options)
            calls.append(lambda: run(kernel, *args, **options))

        generator = torch.get_rng_state()  # a capture computes nothing
        with contextlib.ExitStack() as stack:
            stack.enter_context(patch.object(InterpretedFunction, "run", launch))
            # A recorder is a mode of torch's, under which the ops would be operators.
            for module in (tracing, linear, training_pass, geometry, packed_heads):
                stack.enter_context(patch.object(module, "is_traced", lambda: False))
            stack.enter_context(patch.object(geometry, "is_captured", lambda: True))
            stack.enter_context(_Recorder(calls))
            found = call()
        torch.set_rng_state(generator)

        def replay() -> None:
            with torch.no_grad():
                for each in calls:
                    each()
            self.replayed += len(calls)

        return replay, found


class _Recorder(TorchDispatchMode):
    """Appends each operator that computes to `calls`."""

    def __init__(self, calls: list[Callable[[], object]]) -> None:
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, options = func.name().split("::")[1].split(".")[0], kwargs or {}
        if name in _READ_BACK or _has_mask(args):
            raise RuntimeError(f"{name} reads back what the device computes")
        if name in _FROM_PYTHON:
            raise RuntimeError(f"{name} copies from Python's memory")
        found = func(*args, **options)
        writes = any(result.alias_info is not None for result in func._schema.returns)
        if name not in FREE:
            self._calls.append(
                (lambda: func(*args, **options)) if writes else lambda: _into(found, func(*args, **options))
            )
        return found


def _has_mask(args: Any) -> bool:
    """Whether a tensor is indexed by a mask, in `index(tensor, indices)` and its like."""
    lists = [each for each in args if isinstance(each, list | tuple)]
    return any(isinstance(t, Tensor) and t.dtype == torch.bool for each in lists for t in each)


def _into(kept: Any, new: Any) -> None:
    """Results of a replay where those of the capture lie."""
    if isinstance(kept, Tensor):
        kept.copy_(new)
    elif isinstance(kept, list | tuple):
        for old, one in zip(kept, new, strict=True):
            _into(old, one)
