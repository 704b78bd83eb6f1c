"""A value that depends on parameters alone, computed once and kept until one of them is another."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .neighborhood import is_traced


class Kept:
    """Holds one such tensor, for parameters on a CPU. Copies and pickles of it are empty."""

    def __init__(self) -> None:
        self._sources: list[Tensor] = []
        self._autocast: torch.dtype | None = None
        self._value: Tensor | None = None

    def get(self, sources: Sequence[Tensor], compute: Callable[[], Tensor]) -> Tensor:
        """compute(), or what it gave last time if every source still holds the same numbers.

        The numbers themselves are compared, with a copy: torch counts the writes to a tensor, but not those through
        `.data` or NumPy, by which much code averages or prunes weights. So sources should be few and small. Nothing is
        kept while gradients are recorded, under a tracer or mode of torch's, or where looking means to wait for a GPU.
        """
        if torch.is_grad_enabled() or is_traced() or any(source.device.type != "cpu" for source in sources):
            return compute()
        autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        if self._value is None or autocast != self._autocast or not self._are_the_same(sources):
            # An inference tensor could not be used where gradients are recorded.
            with torch.inference_mode(False), torch.no_grad():
                self._value = compute()
                self._sources = [source.detach().clone() for source in sources]
            self._autocast = autocast
        return self._value

    def _are_the_same(self, sources: Sequence[Tensor]) -> bool:
        return len(sources) == len(self._sources) and all(
            now.dtype == before.dtype and torch.equal(now, before)
            for now, before in zip(sources, self._sources, strict=True)
        )

    def __reduce__(self) -> tuple:
        return Kept, ()
