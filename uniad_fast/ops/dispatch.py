"""Which implementation serves a call: by name, or the best for the tensors' device."""

import warnings
from functools import lru_cache

import torch
from torch import Tensor

from . import registered

IMPLS = ("reference", "torch", "cpu", "triton")
KERNELS = ("cpu", "triton")


def choose_impl(impl: str | None, tensor: Tensor, problem: str | None = None) -> str:
    """The implementation that serves a call with this tensor.

    problem: why the kernels do not take the call, besides what its device and dtype say.

    Raises:
        ValueError: there is none of that name, or the one named does not take such a tensor; says why.
    """
    check_impl(impl)
    if impl in KERNELS:
        problem = kernel_problem(impl, tensor) or problem
        if problem:
            raise ValueError(f"impl={impl!r} can't serve this call: {problem}")
        return impl
    if impl is not None:
        return impl
    best = {"cuda": "triton", "cpu": "cpu"}.get(tensor.device.type)
    # float64 is asked for its digits, and the kernels have none of them: nothing to be told about.
    if best is None or tensor.dtype == torch.float64 or (best == "cpu" and not registered.cpu_pays()):
        return "torch"
    problem = kernel_problem(best, tensor) or problem
    if problem is None:
        return best
    _say_once(f"uniad_fast uses impl='torch' because the {best} kernels can't serve this call: {problem}")
    return "torch"


def check_impl(impl: str | None) -> None:
    """ValueError unless `impl` is None or the name of an implementation."""
    if impl is not None and impl not in IMPLS:
        raise ValueError(f"impl must be None or one of {', '.join(IMPLS)}, got {impl!r}")


def kernel_problem(impl: str, tensor: Tensor) -> str | None:
    """Why the kernels of "triton" or "cpu" do not take this tensor, or None."""
    if impl == "cpu":
        if tensor.device.type != "cpu":
            return f"the tensors are on {tensor.device}"
    else:
        try:
            launch = registered.launch(impl)
        except ImportError as error:
            return f"Triton can't be imported ({error})"
    if problem := _differentiation_problem():
        return problem
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"they take float32, float16 and bfloat16, not {tensor.dtype}"
    if impl == "cpu":
        return None if torch.compiler.is_compiling() else registered.launch(impl).problem()
    if not tensor.is_cuda:
        if tensor.device.type != "cpu" or not launch.INTERPRETED:
            interpreter = "serves a CPU alone" if launch.INTERPRETED else "(TRITON_INTERPRET=1) is off"
            return f"the tensors are on {tensor.device}, and Triton's interpreter {interpreter}"
        if tensor.dtype == torch.bfloat16:
            return "Triton's interpreter computes bfloat16 wrongly"
    return None


def _differentiation_problem() -> str | None:
    """Why kernels, which have a gradient and nothing else, can't take part in what torch is doing, or None."""
    if torch.compiler.is_dynamo_compiling():
        # Dynamo follows the transforms themselves; a tangent it would drop.
        return "they have no forward-mode derivative" if torch.autograd.forward_ad._current_level >= 0 else None
    if torch._C._are_functorch_transforms_active():
        return "transforms of torch.func (vmap, grad, jvp, ...) do not see through them"
    if torch.autograd.forward_ad._current_level >= 0:
        return "they have no forward-mode derivative"
    return None


def attention_problem(query: Tensor, scale: float) -> str | None:
    """Why the attention kernels do not take a query of this shape or such a scale, or None."""
    if query.shape[-1] > 128:
        return f"they take a head_dim up to 128, not {query.shape[-1]}"
    smallest = torch.finfo(torch.float32).tiny
    largest = torch.finfo(torch.float32).max / 2  # it is multiplied by log2(e)
    return (
        None if smallest <= scale <= largest else f"they take a scale from {smallest:.3g} to {largest:.3g}, not {scale}"
    )


@lru_cache(maxsize=32)
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)
