"""A value that depends on parameters alone, computed once and kept until one of them changes."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Kept:
    """Holds one such tensor. Copies and pickles of it are empty."""

    def __init__(self) -> None:
        self._state: tuple | None = None
        self._value: Tensor | None = None

    def get(self, sources: Sequence[Tensor], compute: Callable[[], Tensor]) -> Tensor:
        """compute(), or what it gave last time if no source has changed since.

        A change is noticed when it is made by an optimiser, `load_state_dict`, `.to()`, assignment or any in-place
        operation on the parameter; not when made in place on `.data`, for which there is `clear`. Nothing is kept
        while gradients are recorded, under torch.compile or torch.export, or for sources made in inference mode.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or any(s.is_inference() for s in sources):
            return compute()
        device_type = sources[0].device.type
        autocast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
        state = (autocast, *((s.data_ptr(), s._version, s.dtype, s.device) for s in sources))
        if self._value is None or state != self._state:
            # An inference tensor could not be a source in its turn: it has no version.
            with torch.inference_mode(False), torch.no_grad():
                self._value = compute()
            self._state = state
        return self._value

    def clear(self) -> None:
        """Forget the value."""
        self._state = self._value = None

    def __reduce__(self) -> tuple:
        return Kept, ()
