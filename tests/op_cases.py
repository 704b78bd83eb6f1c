"""The four ops, with arguments that are all tensors by name: what the tests by kind go through."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from uniad_fast import jitter_project, neighbor_masked_attention
from uniad_fast.ops.dispatch import IMPLS
from uniad_fast.ops.dropout import dropout, dropout_add_norm
from uniad_fast.ops.linear import linear

GRID, WINDOW = (3, 5), (1, 3)
ON_GPU = torch.cuda.is_available()


def device_of(impl: str | None) -> torch.device:
    """Where this implementation takes its tensors: a GPU's kernels want them there, where there is one."""
    return torch.device("cuda" if impl == "triton" and ON_GPU else "cpu")


@dataclass(frozen=True)
class OpCase:
    """An op with its tensors' shapes; `call(impl, **tensors)` runs it."""

    name: str
    shapes: dict[str, tuple[int, ...]]
    call: Callable[..., Tensor] = field(repr=False)

    def make(self, impl: str | None = None, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
        """Random tensors for it."""
        generator = torch.Generator().manual_seed(seed)
        return {
            name: torch.randn(shape, generator=generator, device="cpu").to(device_of(impl), dtype)
            for name, shape in self.shapes.items()
        }

    def run(self, impl: str | None, tensors: dict[str, Tensor]) -> list[Tensor]:
        """Output, and the gradient of every tensor that asks for one, under a fixed weighting."""
        out = self.call(impl, **tensors)
        wanted = [t for t in tensors.values() if t.requires_grad]
        weight = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype).view_as(out)
        return [out, *torch.autograd.grad(out, wanted, weight)] if wanted else [out]


def _attention(impl: str | None, query: Tensor, key: Tensor, value: Tensor, p: float = 0.2, seed: int = 5) -> Tensor:
    return neighbor_masked_attention(query, key, value, GRID, WINDOW, dropout_p=p, seed=seed, impl=impl)


def _jitter(impl: str | None, tokens: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return jitter_project(tokens, weight, bias, scale=4.0, prob=0.7, seed=5, impl=impl)


def _norm(impl: str | None, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, p: float = 0.2) -> Tensor:
    return dropout_add_norm(x, residual, weight, bias, dropout_p=p, seed=5, impl=impl)


OPS = [
    OpCase("attention", {"query": (2, 1, 15, 8), "key": (2, 1, 15, 8), "value": (2, 1, 15, 8)}, _attention),
    OpCase(
        "attention_without_dropout",
        {"query": (1, 2, 15, 8), "key": (2, 2, 15, 8), "value": (2, 2, 15, 8)},
        lambda impl, **t: _attention(impl, **t, p=0.0),
    ),
    OpCase("jitter", {"tokens": (2, 9, 24), "weight": (20, 24), "bias": (20,)}, _jitter),
    OpCase("norm", {"x": (3, 5, 64), "residual": (3, 5, 64), "weight": (64,), "bias": (64,)}, _norm),
    OpCase(
        "norm_without_dropout",
        {"x": (3, 5, 64), "residual": (1, 5, 64), "weight": (64,), "bias": (64,)},
        lambda impl, **t: _norm(impl, **t, p=0.0),
    ),
    OpCase("relu", {"x": (9, 70)}, lambda impl, x: dropout(x, 0.2, relu=True, seed=5, impl=impl)),
    OpCase("dropout", {"x": (9, 70)}, lambda impl, x: dropout(x, 0.2, seed=5, impl=impl)),
]
LINEAR = OpCase(
    "linear",
    {"tokens": (2, 9, 24), "weight": (20, 24), "bias": (20,)},
    lambda impl, tokens, weight, bias: linear(tokens, weight, bias, impl),
)
"""No op of the public ones, but it hands memory on too."""
NAMED_OPS = {case.name: case for case in OPS}


def _padded(tensor: Tensor, axis: int) -> Tensor:
    """The same values as every second one along an axis of a larger tensor, whose others are NaN."""
    whole = torch.full([2 * n if i == axis % tensor.ndim else n for i, n in enumerate(tensor.shape)], float("nan"))
    part = whole.to(tensor).movedim(axis, 0)[1::2]
    part.copy_(tensor.movedim(axis, 0))
    return part.movedim(0, axis)


def _offset(tensor: Tensor) -> Tensor:
    """The same values in the middle of a larger storage, at an odd element."""
    whole = torch.full((tensor.numel() + 7,), float("nan"), dtype=tensor.dtype, device=tensor.device)
    part = whole[3 : 3 + tensor.numel()].view(tensor.shape)
    return part.copy_(tensor)


def _transposed(tensor: Tensor) -> Tensor:
    order = tuple(reversed(range(tensor.ndim)))
    return tensor.permute(order).contiguous().permute(order)


def _expanded(tensor: Tensor, axis: int) -> Tensor:
    """One slice along an axis, met again at each place: other values, and a stride of 0."""
    return tensor.narrow(axis, 0, 1).contiguous().expand_as(tensor)


def _negated(tensor: Tensor) -> Tensor:
    """A tensor that torch negates when it is read: the imaginary part of a conjugate."""
    part = torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
    assert part.is_neg()
    return part


def layouts(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensor in every way that memory can hold it."""
    for axis in range(tensor.ndim):
        yield f"every second along {axis}", _padded(tensor, axis)
        yield f"expanded along {axis}", _expanded(tensor, axis)
    yield "transposed", _transposed(tensor)
    yield "offset", _offset(tensor)
    yield "expanded everywhere", tensor.flatten()[:1].view([1] * tensor.ndim).expand_as(tensor)
    if tensor.dtype in (torch.float32, torch.float64):
        yield "negated", _negated(tensor)


KERNELS = [impl for impl in IMPLS if impl in ("cpu", "triton")]


def positional(name, impl):
    """The op as a function of its tensors by position, and them."""
    case = NAMED_OPS[name]
    tensors = case.make(impl)

    def function(*values):
        return case.call(impl, **dict(zip(tensors, values, strict=True)))

    return function, list(tensors.values())
