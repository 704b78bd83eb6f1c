"""What every public op checks of its arguments and makes of them: dtype, device, seed, probability, autocast."""

import operator
import warnings
from functools import lru_cache

import torch
from torch import Tensor

from .noise import draw_for_torch, draw_seed, drawable

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_same_kind(**tensors: Tensor) -> None:
    """ValueError unless all are dense, floating point, of one dtype and on one device."""
    (first_name, first), *others = tensors.items()
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_nested:
            kind = "nested" if tensor.is_nested else tensor.layout
            raise ValueError(f"{name} must be a dense tensor, got a {kind} one")
    if first.dtype not in _FLOATS:
        raise ValueError(f"{first_name} must be float32, float16, bfloat16 or float64, got {first.dtype}")
    for name, tensor in others:
        if tensor.dtype != first.dtype:
            raise ValueError(f"{first_name} is {first.dtype} but {name} is {tensor.dtype}")
        if tensor.device != first.device:
            raise ValueError(f"{first_name} is on {first.device} but {name} on {tensor.device}")


def checked_dropout_p(dropout_p: float) -> float:
    """The probability that acts, see `noise.drawable`; ValueError unless it is in [0, 1)."""
    dropout_p = float(dropout_p)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    return drawable(dropout_p)


def checked_seed(seed: int | Tensor | None, device: torch.device) -> int | Tensor | None:
    """The seed as it is, or as a Python int; ValueError where it is no 64-bit integer, or a tensor elsewhere."""
    if isinstance(seed, Tensor):
        if seed.shape not in ((), (2,)) or seed.dtype != torch.int64 or seed.device != device:
            raise ValueError(
                f"a seed tensor must be int64 [] or [2] on {device}, "
                f"got {tuple(seed.shape)} {seed.dtype} on {seed.device}"
            )
    elif seed is not None:
        try:
            seed = operator.index(seed)
        except TypeError:
            raise ValueError(f"seed must be an integer, a tensor or None, got {seed!r}") from None
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed must fit in a signed 64-bit integer, got {seed}")
    return seed


def seed_of(seed: int | Tensor | None, device: torch.device, rows: int, impl: str) -> int | Tensor | None:
    """The seed that an op computes with, drawn where there is none; None leaves "torch" to its own generator.

    rows: planes, rows or tokens of an image, which the seed of a part of a batch is counted in from here on.
    """
    if seed is None:
        seed = draw_for_torch(device) if impl == "torch" else draw_seed(device)
    if not isinstance(seed, Tensor) or seed.ndim == 0:
        return seed
    key, first = seed.unbind()
    return torch.stack((key, first * rows))


def seed_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    """The seed as the kernels take it: an int64 tensor on the device, [] or [2]."""
    return seed if isinstance(seed, Tensor) else torch.full((), seed, dtype=torch.int64, device=device)


def autocasted(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as autocast casts those of a matrix product, float64 as it is."""
    device_type = tensors[0].device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    warn_if_emulated(dtype, device_type)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def warn_if_emulated(dtype: torch.dtype, device_type: str) -> None:
    """Says, once, that autocast to this dtype is a trap here: right, and far slower than float32."""
    if dtype == torch.bfloat16 and device_type == "cpu" and not torch.compiler.is_compiling():
        _warn_of_emulation()


@lru_cache
def _warn_of_emulation() -> None:
    if not multiplies_bfloat16("cpu"):
        warnings.warn(
            "this processor has no bfloat16 instructions: under autocast to bfloat16 torch emulates them, which takes "
            "many times longer than float32",
            stacklevel=5,
        )


@lru_cache
def multiplies_bfloat16(device_type: str) -> bool:
    """Whether it has instructions for bfloat16: with AVX2 alone, products of matrices take 70 times float32's time."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device_type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
