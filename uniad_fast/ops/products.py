"""What multiplies fastest on this processor: of float32 torch's own library or oneDNN, and float32 or bfloat16.

Torch's own is MKL as a rule, which on some processors stops at AVX2, where oneDNN is twice as fast. On others it is the
faster one, above all for gradients of weights: their operands are transposed, and oneDNN copies them. It is measured
once on a machine, by the product's kind and shape, since libraries and processors change, and remembered, since the
choice decides about last bits: a run has what the run before it had.
"""

import statistics
import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

KINDS = ("output", "gradient of tokens", "gradient of weight")
OF_DOCTOR = (2048, 256, 1024)
"""Rows, channels in and out of what `doctor` tells: eight images of the paper's, an FFN's first layer."""
_FEWEST, _MOST = 256, 2048
"""Rows that are measured: powers of two between these stand for all numbers of rows."""
_ROUNDS = 7
_GAIN = 1.05
"""By which oneDNN, and bfloat16, has to be faster."""


def has_onednn() -> bool:
    """Whether torch has what calls it."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """rows [R, K] times weight [O, K], plus bias [O]: [R, O], float32 on a CPU; no gradient is recorded."""
    # It reads the bias as if it lay in a row.
    bias = None if bias is None else bias.contiguous()
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


def by_onednn(rows: int, ins: int, outs: int) -> frozenset[str]:
    """The kinds of product of a linear layer, rows x ins to rows x outs, that oneDNN computes here.

    All of them where a measurement can't be remembered.
    """
    return _chosen(min(max(1 << (rows - 1).bit_length(), _FEWEST), _MOST), ins, outs)


@cache
def bfloat16_gain() -> float:
    """How many times as fast as float32's products torch computes those of bfloat16, in a layer of the paper's size."""
    from ..kernels.cpu import build

    found = build.remembered("products-bfloat16", _measured_bfloat16) or _measured_bfloat16()
    return found.get("gain", 0.0)


def bfloat16_pays() -> bool:
    """Whether products of bfloat16 are the faster ones here. Not on Intel's processors where AMX is out of reach."""
    return bfloat16_gain() > _GAIN


def _measured_bfloat16() -> dict[str, float]:
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        rows, ins, outs = OF_DOCTOR
        shapes = ((outs,), (rows, ins), (ins, outs))
        narrow, wide = (
            [torch.ones(s, dtype=dtype, device="cpu") for s in shapes] for dtype in (torch.bfloat16, torch.float32)
        )
        return {"gain": _ratio(lambda: torch.addmm(*narrow), lambda: torch.addmm(*wide))}


@cache
def _chosen(rows: int, ins: int, outs: int) -> frozenset[str]:
    from ..kernels.cpu import build

    if not has_onednn():
        return frozenset()
    found = build.remembered(f"products-{rows}-{ins}-{outs}", lambda: _measured(rows, ins, outs))
    return frozenset(KINDS if found is None else (kind for kind in KINDS if found.get(kind, 0.0) > _GAIN))


def _measured(count: int, ins: int, outs: int) -> dict[str, float]:
    """How many times as fast as torch's own oneDNN is, by kind."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        shapes = ((count, ins), (outs, ins), (outs,), (count, outs))
        rows, weight, bias, gradient = (torch.ones(s, dtype=torch.float32, device="cpu") for s in shapes)
        ways: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
            KINDS[0]: (lambda: onednn(rows, weight, bias), lambda: torch.addmm(bias, rows, weight.t())),
            KINDS[1]: (lambda: onednn(gradient, weight.t(), None), lambda: gradient @ weight),
            KINDS[2]: (lambda: onednn(gradient.t(), rows.t(), None), lambda: gradient.t() @ rows),
        }
        return {kind: _ratio(*pair) for kind, pair in ways.items()}


def _ratio(ours: Callable[[], Tensor], theirs: Callable[[], Tensor]) -> float:
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(_ROUNDS):
        for call, own in zip((ours, theirs), seconds, strict=True):
            start = time.perf_counter()
            call()
            own.append(time.perf_counter() - start)
    return round(statistics.median(seconds[1]) / statistics.median(seconds[0]), 2)
