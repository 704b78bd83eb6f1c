"""Whether somebody writes down, or answers for, what torch does now: what of it may be used later, or read now."""

import torch
from torch import Tensor


def is_traced() -> bool:
    """Whether tensors made now may be stand-ins without memory: under torch.compile, export, jit, func or a mode."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
    )


def is_captured() -> bool:
    """Whether a CUDA graph is captured: tensors made now are its own, and hold nothing before it is replayed."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def without_memory(*tensors: Tensor | None) -> bool:
    """Whether a launcher can't be handed these: they are traced, many in one (as a backward pass may be given them),
    or of a class that answers for its own operators.
    """
    return is_traced() or any(
        type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__ or not torch._C._has_storage(t)
        for t in tensors
        if t is not None
    )
