"""What multiplies fastest on this processor: our kernel, torch's own library or oneDNN; float32 or bfloat16.

Torch's own is MKL as a rule, which on some processors stops at AVX2, where oneDNN is twice as fast. On others it is the
faster one, above all for gradients of weights: their operands are transposed, and oneDNN copies them. Our own sums a
bias's gradient on the way, and copies no bias. It is measured once on a machine, by the kind, shape and dtype of the
product, since libraries and processors change, and remembered, since the choice decides about last bits: a run has what
the run before it had.

Tokens [R, I], gradients [R, O] and what comes of them, which is all called rows, are in float32 or bfloat16. A layer's
weight [O, I] and bias [O] are float32, as are their gradients.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .dispatch import launchers

if TYPE_CHECKING:
    from ..kernels.layout import ReluDropout

KINDS = ("output", "gradient of tokens", "gradients of weight and bias")
OWN, TORCH, ONEDNN, TILES = "own", "torch", "onednn", "tiles"
"""TILES: our kernel for AMX, for gradients of weight and bias in bfloat16."""
OF_DOCTOR = (2048, 256, 1024)
"""Rows, channels in and out of what `doctor` tells: eight images of the paper's, an FFN's first layer."""
_FEWEST, _MOST = 32, 2048
"""Rows that are measured: powers of two between these stand for all numbers of rows. Fewer are torch's: to pack a
weight takes longer than to multiply it by them."""
_ROUNDS, _SECONDS = 5, 0.01
"""Of a measurement: rounds at least, and how long each way is tried at least."""
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_GAIN = 1.15
"""By which a library has to be faster than our kernel: here all is in caches, and in a step it comes from memory."""
_BFLOAT16_GAIN = 1.05
"""By which bfloat16 has to be faster than float32."""


class Ways(NamedTuple):
    """Who computes a layer's products."""

    output: str
    token_gradient: str
    weight_gradient: str


def has_onednn() -> bool:
    """Whether torch has what calls it."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def operand(way: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight as `way` takes it beside rows of this dtype: only our kernel rounds it by itself."""
    return weight if way == OWN else weight.to(dtype)


def output(way: str, rows: Tensor, weight: Tensor, bias: Tensor | None, ending: "ReluDropout | None" = None) -> Tensor:
    """Tokens times weight, an `operand`, plus bias, then ReLU and dropout: [R, O] on a CPU; no gradient is recorded."""
    if way == OWN:
        return _own().output(rows, weight, bias, ending)
    bias = None if bias is None else bias.to(rows.dtype)
    if way == ONEDNN:
        out = onednn(rows, weight, bias)
    else:
        out = torch.mm(rows, weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())
    # oneDNN's may lie in an order of its own.
    return out if ending is None else launchers("cpu").relu_dropout_in_place(out.contiguous(), *ending)


def token_gradient(
    way: str,
    out_gradient: Tensor,
    weight: Tensor,
    ending: "ReluDropout | None" = None,
    activated: Tensor | None = None,
) -> Tensor:
    """Gradient times weight, an `operand`: [R, I] on a CPU.

    With the `ending` that made `activated` [R, I] of what was before it, the gradient of that.
    """
    if way == OWN:
        return _own().token_gradient(out_gradient, weight, ending, activated)
    gradient = onednn(out_gradient, weight.t(), None) if way == ONEDNN else torch.mm(out_gradient, weight)
    if ending is None or activated is None:
        return gradient
    return launchers("cpu").dropout_backward(gradient, activated, ending[0], True, ending[1])


def weight_gradient(way: str, rows: Tensor, out_gradient: Tensor, with_bias: bool) -> tuple[Tensor, Tensor | None]:
    """Gradient transposed times tokens, and its sum over R: [O, I] and [O], float32 on a CPU."""
    if way == OWN:
        return _own().weight_gradient(rows, out_gradient, with_bias)
    if way == TILES:
        return _tiles().weight_gradient(rows, out_gradient, with_bias)
    turned = out_gradient.t()
    weight = onednn(turned, rows.t(), None) if way == ONEDNN else torch.mm(turned, rows)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(dtype), out_gradient.sum(0, dtype=dtype) if with_bias else None


def onednn(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`output` by oneDNN, in float32 or bfloat16, all in one dtype."""
    # It reads the bias as if it lay in a row.
    bias = None if bias is None else bias.contiguous()
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


def fastest(rows: int, ins: int, outs: int, dtype: torch.dtype = torch.float32) -> Ways:
    """Who is fastest here at the products of a linear layer, rows x ins to rows x outs, with rows in this dtype.

    Our kernel's, where a measurement can't be remembered.
    """
    if dtype == torch.bfloat16 and in_tiles():
        return Ways(ONEDNN, TORCH, TILES)
    if rows < _FEWEST:
        return Ways(TORCH, TORCH, TORCH)
    return _chosen(min(1 << (rows - 1).bit_length(), _MOST), ins, outs, dtype, torch.get_num_threads())


def serves_bfloat16(rows: int) -> bool:
    """Whether products of so many rows in bfloat16 are ours, if not all: by tiles, or by pairs where those pay."""
    return in_tiles() or (rows >= _FEWEST and _own().has_pairs())


def in_tiles() -> bool:
    """Whether a layer's products in bfloat16 go by tiles (AMX)."""
    return has_onednn() and _tiles().has_tiles()


@cache
def bfloat16_gain() -> float:
    """How many times as fast as a library's products of float32 torch's of bfloat16 are, in a layer of the paper's."""
    from ..kernels.cpu import build

    found = build.remembered("bfloat16", _measured_bfloat16) or _measured_bfloat16()
    return found.get("gain", 0.0)


def bfloat16_pays() -> bool:
    """Whether products of bfloat16 are the faster ones here. Not on Intel's processors where AMX is out of reach."""
    return bfloat16_gain() > _BFLOAT16_GAIN


def _measured_bfloat16() -> dict[str, float]:
    with _by_itself():
        count, ins, outs = OF_DOCTOR
        shapes = ((count, ins), (outs, ins), (outs,))
        rows, weight, bias = (torch.ones(s, dtype=torch.float32, device="cpu") for s in shapes)
        narrow = [t.to(torch.bfloat16) for t in (rows, weight, bias)]
        in_bfloat16, *in_float32 = _seconds(
            lambda: torch.nn.functional.linear(*narrow),
            *(lambda way=way: output(way, rows, weight, bias) for way in _libraries()),
        )
        return {"gain": round(min(in_float32) / in_bfloat16, 2)}


@cache
def _chosen(rows: int, ins: int, outs: int, dtype: torch.dtype, threads: int) -> Ways:
    from ..kernels.cpu import build

    name = f"linear-{_NAMES[dtype]}-{rows}-{ins}-{outs}-threads-{threads}"
    found = build.remembered(name, lambda: _measured(rows, ins, outs, dtype)) or {}
    gains = ({way: found.get(f"{kind} {way}", 0.0) for way in _libraries()} for kind in KINDS)
    return Ways(*(max(gain, key=lambda way: gain[way]) if max(gain.values()) > _GAIN else OWN for gain in gains))


def _measured(count: int, ins: int, outs: int, dtype: torch.dtype) -> dict[str, float]:
    """How many times as fast as our kernel the libraries are, by kind. To cast the weight is theirs, once a step."""
    with _by_itself():
        shapes = ((count, ins), (count, outs), (outs, ins), (outs,))
        rows, gradient, weight, bias = (torch.ones(s, dtype=torch.float32, device="cpu") for s in shapes)
        rows, gradient = rows.to(dtype), gradient.to(dtype)
        operands = {way: operand(way, weight, dtype) for way in (OWN, *_libraries())}
        calls: tuple[Callable[[str], object], ...] = (
            lambda way: output(way, rows, operand(way, weight, dtype), bias),
            lambda way: token_gradient(way, gradient, operands[way]),
            lambda way: weight_gradient(way, rows, gradient, True),
        )
        found: dict[str, float] = {}
        for kind, call in zip(KINDS, calls, strict=True):
            ours, *theirs = _seconds(*(lambda way=way, call=call: call(way) for way in operands))
            found |= {f"{kind} {way}": round(ours / one, 2) for way, one in zip(_libraries(), theirs, strict=True)}
        return found


def _libraries() -> tuple[str, ...]:
    return (TORCH, ONEDNN) if has_onednn() else (TORCH,)


@contextmanager
def _by_itself() -> Iterator[None]:
    """Tensors made and multiplied inside are real ones, whatever mode the caller is in."""
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        yield


def _seconds(*ways: Callable[[], object]) -> list[float]:
    """The shortest of rounds in which all take turns, since whatever else the machine does only takes time."""
    for call in ways:
        call()
    seconds: list[list[float]] = [[] for _ in ways]
    while len(seconds[0]) < _ROUNDS or min(map(sum, seconds)) < _SECONDS:
        for call, own in zip(ways, seconds, strict=True):
            start = time.perf_counter()
            call()
            own.append(time.perf_counter() - start)
    return [min(each) for each in seconds]


def _own() -> ModuleType:
    from ..kernels.cpu import launch_linear

    return launch_linear


def _tiles() -> ModuleType:
    from ..kernels.cpu import launch_weight_gradient

    return launch_weight_gradient
