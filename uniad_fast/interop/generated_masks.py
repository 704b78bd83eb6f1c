"""A model's own `generate_mask`, called once for each mask instead of in every forward pass."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..ops.geometry import Window
from .identify_mask import identify_mask


def generates_masks(module: nn.Module) -> bool:
    """Whether it has the public code's method: of these names, and not put there by an instance of its own."""
    method = getattr(type(module), "generate_mask", None)
    if not callable(method):
        return False
    try:
        return list(inspect.signature(method).parameters)[1:] == ["feature_size", "neighbor_size"]
    except (TypeError, ValueError):
        return False


class CachedMask:
    """In place of a module's `generate_mask(feature_size, neighbor_size)`: each mask built once, on its device."""

    def __init__(self, owner: nn.Module) -> None:
        self._owner = owner
        self._masks: dict[tuple, tuple[Tensor, int]] = {}
        self._others: set[tuple] = set()  # sizes at which it builds something of another meaning

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        build: Any = type(self._owner).generate_mask  # type: ignore[attr-defined]
        bound = inspect.signature(build).bind(self._owner, *args, **kwargs).arguments
        sizes = tuple(tuple(bound[name]) for name in ("feature_size", "neighbor_size"))
        device = next((p.device for p in self._owner.parameters()), torch.device("cpu"))
        if sizes in self._others:
            return build(self._owner, *args, **kwargs)
        kept = self._masks.get((sizes, device))
        if kept and kept[0]._version == kept[1]:  # not written to by a caller
            return kept[0]
        with torch.inference_mode(False), torch.no_grad(), _CudaIsWhereTheModelIs(device):
            mask = build(self._owner, *args, **kwargs)
        if not isinstance(mask, Tensor) or not isinstance(identify_mask(mask, sizes[0]), Window):
            self._others.add(sizes)
            return build(self._owner, *args, **kwargs)
        mask = mask.to(device)
        self._masks[sizes, device] = mask, mask._version
        return mask


class _CudaIsWhereTheModelIs(TorchFunctionMode):
    """The public code sends its mask to a GPU by name, which fails on a machine without one. Of this thread alone."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, function: Any, _types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.cuda and self._device.type != "cuda":
            return args[0]
        return function(*args, **(kwargs or {}))
