"""Parts of one projection in heads, and their gradients in one piece of memory again.

Queries, keys and values of one tensor come out of one product, and so should their gradients go into one. Autograd
joins them by a copy of all. Here the projection has memory for them, which each attention's backward pass asks for and
writes into; where all have done so, nothing is left to be joined.
"""

from typing import Any

import torch
from torch import Tensor

from .tracing import is_traced


class GradientMemory:
    """Memory for the gradients of all parts of a projection [B, N, parts * C], one backward pass after the other.

    So the gradient of a part and that of the projection, where somebody asks for both, share memory.
    """

    def __init__(self, projected: Tensor, parts: int, heads: int) -> None:
        self._shape, self._dtype, self._device = projected.shape, projected.dtype, projected.device
        self._parts, self._heads = parts, heads
        self._memory: Tensor | None = None
        self._taken: set[int] = set()

    def take(self, part: int) -> Tensor | None:
        """Where a part's gradient [B, heads, N, head_dim] may be written; None if somebody has it already."""
        if part in self._taken:
            return None
        if self._memory is None:
            self._memory = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        self._taken.add(part)
        return views_of(self._memory, self._parts, self._heads)[part]

    def joined(self, gradients: tuple[Tensor, ...]) -> Tensor:
        """The gradients of all parts as one, [B, N, parts * C]: as they lie, if they all lie here."""
        memory, self._memory, self._taken = self._memory, None, set()
        # Gradients that are differentiated again say so themselves, or that they can't be.
        if memory is not None and not any(gradient.requires_grad for gradient in gradients):
            places = views_of(memory, self._parts, self._heads)
            if all(_is_at(*pair) for pair in zip(gradients, places, strict=True)):
                return memory
        # What was written here may be somebody's by now, so it is left alone.
        return _copied_together(gradients)


def in_heads(projected: Tensor, parts: int, heads: int) -> list[Tensor]:
    """A projection [B, N, parts * C] as its parts in heads, [B, heads, N, C / heads] each, views of it."""
    if parts == 1 or not _is_served(projected):
        return list(views_of(projected, parts, heads))
    memory = GradientMemory(projected, parts, heads)
    found = _Parts.apply(projected, parts, heads, memory)
    for number, part in enumerate(found):
        part.gradient_memory = (memory, number)
    return list(found)


def views_of(projected: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """[B, N, parts * C] -> a view [B, heads, N, C / heads] of each part."""
    return projected.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind()


def _is_served(projected: Tensor) -> bool:
    return (
        type(projected) is Tensor
        and projected.device.type == "cpu"
        and torch.is_grad_enabled()
        and projected.requires_grad
        and not is_traced()
        and torch.autograd.forward_ad._current_level < 0
    )


def _copied_together(gradients: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([gradient.transpose(1, 2).flatten(2) for gradient in gradients], dim=-1)


def _is_at(gradient: Tensor, place: Tensor) -> bool:
    same = gradient.dtype == place.dtype and gradient.shape == place.shape and gradient.stride() == place.stride()
    return same and gradient.data_ptr() == place.data_ptr()


class _Parts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor, parts: int, heads: int, memory: GradientMemory) -> tuple[Tensor, ...]:
        ctx.memory = memory
        return views_of(projected, parts, heads)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.memory.joined(gradients), None, None, None
