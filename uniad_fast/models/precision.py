"""What a recipe's precision means on a device."""

import warnings
from functools import lru_cache

import torch

from ..errors import UniadFastError

PRECISIONS = ("float32", "bfloat16", "auto")


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """A context in which a model computes in that precision: see `computes_in_bfloat16`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=computes_in_bfloat16(precision, device))


def computes_in_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether "auto" is bfloat16 on this device, as it is where that is the faster one; the others are what they say.

    Raises:
        UniadFastError: another name.
    """
    if precision not in PRECISIONS:
        raise UniadFastError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    return precision == "bfloat16" or (precision == "auto" and _multiplies_bfloat16(device.type))


def warn_if_emulated(dtype: torch.dtype, device_type: str) -> None:
    """Says, once, that autocast to this dtype is a trap here: right, and far slower than float32."""
    if dtype == torch.bfloat16 and device_type == "cpu" and not torch.compiler.is_compiling():
        _warn_of_emulation()


@lru_cache
def _warn_of_emulation() -> None:
    if not _multiplies_bfloat16("cpu"):
        warnings.warn(
            "this processor has no bfloat16 instructions: under autocast to bfloat16 torch emulates them, which takes "
            "many times longer than float32",
            stacklevel=5,
        )


@lru_cache
def _multiplies_bfloat16(device_type: str) -> bool:
    """Whether it multiplies bfloat16 matrices well: on a processor with AVX2 alone they take 70 times float32's."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device_type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
