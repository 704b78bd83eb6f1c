"""Which implementation serves a call: by name, or the best for the tensors' device; and the kernels' launchers."""

import warnings
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

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
    if best is None or tensor.dtype == torch.float64 or (best == "cpu" and not _cpu_kernels_pay()):
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


def launchers(impl: str) -> ModuleType:
    """The launchers of "triton" or "cpu", which take the same arguments; imported by the first call that needs them."""
    if impl == "cpu":
        from ..kernels.cpu import launch as of_cpu

        return of_cpu
    from ..kernels.gpu import launch as of_gpu

    return of_gpu


def _cpu_kernels_pay() -> bool:
    """Whether the C++ kernels are the fastest way on this processor."""
    from ..kernels.cpu import build

    return build.PAYS


def kernel_problem(impl: str, tensor: Tensor) -> str | None:
    """Why the kernels of "triton" or "cpu" do not take this tensor, or None."""
    if impl == "cpu":
        if tensor.device.type != "cpu":
            return f"the tensors are on {tensor.device}"
    else:
        try:
            triton_launchers = launchers(impl)
        except ImportError as error:
            return f"Triton can't be imported ({error})"
    if problem := _differentiation_problem():
        return problem
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"they take float32, float16 and bfloat16, not {tensor.dtype}"
    if impl == "cpu":
        return None if torch.compiler.is_compiling() else launchers(impl).problem()
    if not tensor.is_cuda:
        if tensor.device.type != "cpu" or not triton_launchers.INTERPRETED:
            interpreter = "serves a CPU alone" if triton_launchers.INTERPRETED else "(TRITON_INTERPRET=1) is off"
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


@lru_cache(maxsize=32)
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)
