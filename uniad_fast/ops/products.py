"""What multiplies fastest on this processor: of float32 our kernel, torch's own library or oneDNN; float32 or bfloat16.

Torch's own is MKL as a rule, which on some processors stops at AVX2, where oneDNN is twice as fast. On others it is the
faster one, above all for gradients of weights: their operands are transposed, and oneDNN copies them. Our own sums a
bias's gradient on the way, and copies no bias. It is measured once on a machine, by the product's kind and shape, since
libraries and processors change, and remembered, since the choice decides about last bits: a run has what the run before
it had.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

KINDS = ("output", "gradient of tokens", "gradients of weight and bias")
OWN, TORCH, ONEDNN = "own", "torch", "onednn"
OF_DOCTOR = (2048, 256, 1024)
"""Rows, channels in and out of what `doctor` tells: eight images of the paper's, an FFN's first layer."""
_FEWEST, _MOST = 32, 2048
"""Rows that are measured: powers of two between these stand for all numbers of rows. Fewer are torch's: to pack a
weight takes longer than to multiply it by them."""
_ROUNDS, _SECONDS = 5, 0.01
"""Of a measurement: rounds at least, and how long each way is tried at least."""
_GAIN = 1.05
"""By which a library has to be faster than our kernel, and bfloat16 than float32."""


class Ways(NamedTuple):
    """Who computes a layer's products."""

    output: str
    token_gradient: str
    weight_gradient: str


def has_onednn() -> bool:
    """Whether torch has what calls it."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def output(way: str, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """rows [R, K] times weight [O, K], plus bias [O]: [R, O], float32 on a CPU; no gradient is recorded."""
    if way == OWN:
        return _own().output(rows, weight, bias)
    if way == ONEDNN:
        return onednn(rows, weight, bias)
    return torch.mm(rows, weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())


def token_gradient(way: str, out_gradient: Tensor, weight: Tensor) -> Tensor:
    """out_gradient [R, O] times weight [O, K]: [R, K], float32 on a CPU."""
    if way == OWN:
        return _own().token_gradient(out_gradient, weight)
    return onednn(out_gradient, weight.t(), None) if way == ONEDNN else torch.mm(out_gradient, weight)


def weight_gradient(way: str, rows: Tensor, out_gradient: Tensor, with_bias: bool) -> tuple[Tensor, Tensor | None]:
    """out_gradient [R, O] transposed times rows [R, K], and its sum over R: [O, K] and [O], float32 on a CPU."""
    if way == OWN:
        return _own().weight_gradient(rows, out_gradient, with_bias)
    turned = out_gradient.t()
    weight = onednn(turned, rows.t(), None) if way == ONEDNN else torch.mm(turned, rows)
    return weight, out_gradient.sum(0) if with_bias else None


def onednn(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`output` by oneDNN, in float32 or bfloat16."""
    # It reads the bias as if it lay in a row.
    bias = None if bias is None else bias.contiguous()
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


def fastest(rows: int, ins: int, outs: int) -> Ways:
    """Who is fastest here at the products of a linear layer, rows x ins to rows x outs.

    Our kernel's, where a measurement can't be remembered.
    """
    if rows < _FEWEST:
        return Ways(TORCH, TORCH, TORCH)
    return _chosen(min(1 << (rows - 1).bit_length(), _MOST), ins, outs, torch.get_num_threads())


@cache
def bfloat16_gain() -> float:
    """How many times as fast as a library's products of float32 torch's of bfloat16 are, in a layer of the paper's."""
    from ..kernels.cpu import build

    found = build.remembered("bfloat16", _measured_bfloat16) or _measured_bfloat16()
    return found.get("gain", 0.0)


def bfloat16_pays() -> bool:
    """Whether products of bfloat16 are the faster ones here. Not on Intel's processors where AMX is out of reach."""
    return bfloat16_gain() > _GAIN


def _measured_bfloat16() -> dict[str, float]:
    with _by_itself():
        count, ins, outs = OF_DOCTOR
        shapes = ((count, ins), (outs, ins), (outs,))
        rows, weight, bias = (torch.ones(s, dtype=torch.float32, device="cpu") for s in shapes)
        narrow = [t.to(torch.bfloat16) for t in (rows, weight, bias)]
        in_bfloat16, *in_float32 = _seconds(
            lambda: torch.nn.functional.linear(*narrow),
            *(lambda way=way: output(way, rows, weight, bias) for way in _others()),
        )
        return {"gain": round(min(in_float32) / in_bfloat16, 2)}


@cache
def _chosen(rows: int, ins: int, outs: int, threads: int) -> Ways:
    from ..kernels.cpu import build

    name = f"linear-{rows}-{ins}-{outs}-threads-{threads}"
    found = build.remembered(name, lambda: _measured(rows, ins, outs)) or {}
    gains = ({way: found.get(f"{kind} {way}", 0.0) for way in _others()} for kind in KINDS)
    return Ways(*(max(gain, key=lambda way: gain[way]) if max(gain.values()) > _GAIN else OWN for gain in gains))


def _measured(count: int, ins: int, outs: int) -> dict[str, float]:
    """How many times as fast as our kernel the libraries are, by kind."""
    with _by_itself():
        shapes = ((count, ins), (outs, ins), (outs,), (count, outs))
        rows, weight, bias, gradient = (torch.ones(s, dtype=torch.float32, device="cpu") for s in shapes)
        calls: tuple[Callable[[str], object], ...] = (
            lambda way: output(way, rows, weight, bias),
            lambda way: token_gradient(way, gradient, weight),
            lambda way: weight_gradient(way, rows, gradient, True),
        )
        others = _others()
        found: dict[str, float] = {}
        for kind, call in zip(KINDS, calls, strict=True):
            ours, *theirs = _seconds(*(lambda way=way, call=call: call(way) for way in (OWN, *others)))
            found |= {f"{kind} {way}": round(ours / one, 2) for way, one in zip(others, theirs, strict=True)}
        return found


def _others() -> tuple[str, ...]:
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
