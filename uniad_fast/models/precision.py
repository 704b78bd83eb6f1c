"""What a recipe's precision means on a device."""

import torch

from ..errors import UniadFastError
from ..ops.checks import multiplies_bfloat16
from ..ops.products import bfloat16_pays

PRECISIONS = ("float32", "bfloat16", "auto")


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """A context in which a model computes in that precision: see `computes_in_bfloat16`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=computes_in_bfloat16(precision, device))


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16, be they the faster ones or not."""
    return multiplies_bfloat16(device.type)


def computes_in_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether "auto" is bfloat16 on this device; the others are what they say.

    It is on a GPU that has it, and on a processor that was measured to multiply it faster than float32: some have the
    instruction, and it is the slower one.

    Raises:
        UniadFastError: another name.
    """
    if precision not in PRECISIONS:
        raise UniadFastError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision != "auto":
        return precision == "bfloat16"
    return has_bfloat16(device) and (device.type != "cpu" or bfloat16_pays())
