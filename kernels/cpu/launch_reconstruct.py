"""From a network's parameters on a CPU to the C++ kernel that runs all of it in one call."""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..layout import contiguous
from .build import load

__all__ = ["Sizes", "has_pairs", "has_tiles", "panel", "reconstruct"]


class Sizes(NamedTuple):
    """`Sizes` of reconstruct.cpp, but for the batch."""

    tokens: int
    channels: int
    width: int
    heads: int
    hidden: int
    encoder_layers: int
    decoder_layers: int


def panel() -> int:
    """Tokens of a panel, which is how many bits `seen` has."""
    return load().uniad_panel()


def has_pairs() -> bool:
    """Whether the kernel was compiled to multiply bfloat16, by vectors of pairs or by tiles."""
    return bool(load().uniad_has_pairs())


def has_tiles() -> bool:
    """Whether it multiplies bfloat16 by tiles (AMX), which this process is allowed."""
    return bool(load().uniad_has_tiles())


def reconstruct(
    tokens: Tensor, position: Tensor, sizes: Sizes, network: Sequence[Tensor | float | None], in_bfloat16: bool
) -> Tensor:
    """The network's output [B, N, C] of tokens [B, N, C], float32; position [N, width].

    network: parameters in the order of reconstruct.cpp, float32; a float is a norm's epsilon.
    in_bfloat16: round the operands of linear layers to it where `has_pairs`; elsewhere all is float32 all the same.
    """
    out = torch.empty(tokens.shape, dtype=torch.float32, device="cpu")
    held = [contiguous(word) if isinstance(word, Tensor) else word for word in network]  # until the kernel returns
    words = (ctypes.c_uint64 * len(held))(*map(_word, held))
    position = contiguous(position)
    load().uniad_reconstruct(
        (ctypes.c_int64 * 8)(tokens.shape[0], *sizes),
        words,
        *(ctypes.c_void_p(t.data_ptr()) for t in (position, tokens, out)),
        (ctypes.c_int64 * 6)(*tokens.stride(), *out.stride()),
        ctypes.c_int64(in_bfloat16),
    )
    return out


def _word(value: Tensor | float | None) -> int:
    """A pointer, or the bits of a number."""
    if value is None:
        return 0
    if isinstance(value, Tensor):
        return value.data_ptr()
    return int.from_bytes(ctypes.c_double(value), "little")
