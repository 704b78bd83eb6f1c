"""Attention weights that are computed if somebody looks: most callers ask for them by default and drop them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops.checks import seed_of
from ..ops.geometry import Window, hidden_keys
from ..ops.noise import keep_mask


def attention_weights(
    query: Tensor, key: Tensor, window: Window, dropout_p: float, seed: Tensor | None, average: bool
) -> Tensor:
    """The weights that the op used: [B, N, N] averaged over heads, or [B, heads, N, N], in the dtype of `query`.

    query, key: [B, heads, N, head_dim], projected. A query without a key has weights 0.
    """
    batch, heads, tokens, head_dim = key.shape
    scores = query.float() @ key.float().transpose(-1, -2) / head_dim**0.5
    hidden = hidden_keys(window, query.device)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1).masked_fill(hidden, 0.0)
    if dropout_p > 0 and seed is not None:
        counted = seed_of(seed, query.device, heads, "reference")
        assert counted is not None
        keep = keep_mask(counted, (batch * heads, tokens, tokens), dropout_p, query.device)
        weights = weights * keep.view_as(weights) / (1 - dropout_p)
    return (weights.mean(1) if average else weights).to(query.dtype)


class LazyWeights:
    """Stands for a tensor and becomes it at the first use: an attribute, an index, an operator, a torch function."""

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self._compute: Callable[[], Tensor] | None = compute
        self._value: Tensor | None = None

    def tensor(self) -> Tensor:
        """The weights themselves."""
        if self._value is None:
            assert self._compute is not None
            self._value, self._compute = self._compute(), None
        return self._value

    @classmethod
    def __torch_function__(cls, function: Any, _types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        def real(value: Any) -> Any:
            if isinstance(value, LazyWeights):
                return value.tensor()
            return type(value)(map(real, value)) if type(value) in (list, tuple) else value

        return function(*map(real, args), **{name: real(value) for name, value in (kwargs or {}).items()})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)


def _forwarded(name: str) -> Callable[..., Any]:
    def method(self: LazyWeights, *args: Any) -> Any:
        others = (other.tensor() if isinstance(other, LazyWeights) else other for other in args)
        return getattr(torch.Tensor, name)(self.tensor(), *others)

    return method


# Python looks operators up on the class, where __getattr__ is not asked.
_OPERATORS = (
    "getitem len iter float bool repr neg eq ne lt le gt ge add radd sub rsub mul rmul truediv rtruediv pow matmul "
    "rmatmul array deepcopy"
)
for _name in _OPERATORS.split():
    setattr(LazyWeights, f"__{_name}__", _forwarded(f"__{_name}__"))
