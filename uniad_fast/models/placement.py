"""Where and by what a network computes: the device and the implementation that a user names."""

import torch

from ..errors import UniadFastError
from ..ops.dispatch import check_impl
from ..printable import printable


def usable_device(device: str | torch.device | None) -> torch.device:
    """The torch device of that name, or for None a GPU if there is one.

    Raises:
        UniadFastError: torch knows no such device, or can't compute on it here.
    """
    try:
        wanted = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=wanted).add(1).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = printable(str(error).strip().split("\n")[0])
        raise UniadFastError(f"device {printable(device)!r} can't be used here: {reason}") from None
    return wanted


def usable_impl(impl: str | None) -> str | None:
    """The name of an implementation of the ops, or None for the best on each device.

    Raises:
        UniadFastError: there is none of that name.
    """
    try:
        check_impl(impl)
    except ValueError as error:
        raise UniadFastError(str(error)) from None
    return impl
