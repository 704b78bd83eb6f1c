"""What a recipe's precision means on a device."""

import torch

from ..errors import UniadFastError
from ..ops.checks import multiplies_bfloat16

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
    return precision == "bfloat16" or (precision == "auto" and multiplies_bfloat16(device.type))
