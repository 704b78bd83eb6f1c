"""The forward and backward pass of a training step as one CUDA graph, which one call from Python replays.

A step of UniAD is hundreds of short kernels, and a CPU takes longer to launch them than a GPU to run them. What a graph
replays is fixed: which kernels, in which memory, with which numbers from Python. So all that changes from step to step
is on the device, at one place: the batch, which is copied there, the parameters, which an optimizer changes in place,
and the state of torch's generator, from which seeds are drawn.

The optimizer stays outside. A one-cycle schedule changes the rate and beta1 in each step; torch's fused AdamW, a few
launches, takes beta1 as a number alone, and its capturable one reads it back from the device.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from ..errors import UniadFastError

Step = Callable[[Tensor], Tensor]
"""Tokens [b, N, C] on the device -> a few numbers there; gradients are in the parameters afterwards."""
_FIRST_CALLS = 3
"""That are not captured: kernels are compiled by them, libraries loaded, and memory found."""


class Graphs(Protocol):
    """Who captures, on one kind of device."""

    def beside(self, call: Callable[[], Tensor]) -> Tensor:
        """call(), where the graph will be captured."""

    def capture(self, call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """(what replays the call, its result, which a replay overwrites); RuntimeError if it can't be captured."""


class CudaGraphs:
    """Of torch, for a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def beside(self, call: Callable[[], Tensor]) -> Tensor:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            found = call()
        current.wait_stream(self._stream)
        found.record_stream(current)
        return found

    def capture(self, call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        graph, generator = torch.cuda.CUDAGraph(), torch.cuda.get_rng_state(self._device)
        try:
            # A capture that fails leaves its stream the current one. Other threads may use the device meanwhile.
            with (
                torch.cuda.stream(torch.cuda.current_stream(self._device)),
                torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
            ):
                found = call()
        except RuntimeError as error:
            self._go_on_after(error, generator)
            raise
        return graph.replay, found

    def _go_on_after(self, failure: RuntimeError, generator: Tensor) -> None:
        """The device and its generator as before a capture that failed.

        Raises:
            UniadFastError: they can't be had again in this process.
        """
        try:
            torch.cuda.synchronize(self._device)
            torch.rand(1, device=self._device)  # which some releases of torch refuse from then on
            torch.cuda.set_rng_state(generator, self._device)
        except RuntimeError as error:
            raise UniadFastError(
                f"the training step can't be captured as a CUDA graph ({first_line(failure)}), and torch can't go on "
                f"after it ({first_line(error)}): set UNIAD_FAST_CUDA_GRAPH=0 to train without"
            ) from failure


class CapturedStep:
    """A step that is called as it is a few times, then captured, and from then on replayed.

    Batches of another shape than the captured one's are stepped as without a graph. If capturing fails, it says so once
    and never tries again. Every way gives the same numbers, as long as nobody changes the step: a parameter that has
    moved or is trained no more is seen, a hook, a switch of torch's or another rate of dropout is not.

    Args:
        step: sets all gradients anew; reads nothing back from the device.
        parameters: those that get gradients.
    """

    def __init__(self, step: Step, parameters: Sequence[nn.Parameter], graphs: Graphs) -> None:
        self._step, self._parameters, self._graphs = step, parameters, graphs
        self._calls = 0
        self._shape: torch.Size | None = None
        self._tokens: Tensor | None = None
        self._replay: Callable[[], None] | None = None
        self._found: Tensor | None = None
        self._gradients: list[Tensor | None] = []
        self._places: list[tuple[int, bool]] = []
        self._refused = False

    @property
    def is_captured(self) -> bool:
        return self._replay is not None

    def __call__(self, tokens: Tensor) -> Tensor:
        """What the step gives for tokens [b, N, C] on the device; nothing overwrites it later."""
        self._shape = self._shape or tokens.shape
        if self._refused or tokens.shape != self._shape:
            return self._step(tokens)
        if self._replay is not None and self._places != self._where():
            self._forget()  # somebody has moved parameters, or frozen some
        if self._calls < _FIRST_CALLS:
            self._calls += 1
            return self._graphs.beside(lambda: self._step(tokens))
        if self._replay is None and not self._capture(tokens):
            return self._step(tokens)
        assert self._tokens is not None and self._found is not None and self._replay is not None
        self._tokens.copy_(tokens, non_blocking=True)
        self._replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient  # a step without the graph may have set others
        return self._found.clone()

    def _capture(self, tokens: Tensor) -> bool:
        static = tokens.clone()
        try:
            replay, found = self._graphs.capture(lambda: self._step(static))
        except RuntimeError as error:
            self._refused = True
            warnings.warn(
                f"the training step is no CUDA graph, and waits for Python: {first_line(error)}", stacklevel=2
            )
            return False
        self._tokens, self._replay, self._found = static, replay, found
        self._gradients = [parameter.grad for parameter in self._parameters]
        self._places = self._where()
        return True

    def _forget(self) -> None:
        """The graph, with all that holds its memory."""
        self._tokens = self._replay = self._found = None
        self._gradients, self._calls = [], 0

    def _where(self) -> list[tuple[int, bool]]:
        """Of each parameter, where it lies and whether it is trained, which a graph holds still."""
        return [(parameter.data_ptr(), parameter.requires_grad) for parameter in self._parameters]


def first_line(error: BaseException) -> str:
    """The beginning of what it says."""
    return (str(error).splitlines() or [type(error).__name__])[0]
