"""Jitter and project, forward and forward + backward, beside what the public code does."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.tools.harness import name_of
from bench.tools.turns import Way, Work
from uniad_fast import jitter_project

BATCH, TOKENS, CHANNELS, OUT = 32, 196, 272, 256
SCALE = 20.0


def jitter(name: str) -> Callable[..., Tensor]:
    """A function of (tokens, weight, bias)."""
    if name != "public":
        return lambda tokens, weight, bias: jitter_project(tokens, weight, bias, scale=SCALE, impl=name)

    def public(tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        norms = tokens.norm(dim=2, keepdim=True) / tokens.shape[2]
        return F.linear(tokens + torch.randn_like(tokens) * norms * SCALE, weight, bias)

    return public


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_backward"])
def test_benchmark_jitter_project(turns, run, backward):
    """The features are frozen, so the tokens take no gradient."""
    torch.manual_seed(0)
    tokens = torch.randn(1 if run.smoke else BATCH, TOKENS, CHANNELS, device=run.device)
    weight = torch.randn(OUT, CHANNELS, device=run.device) / CHANNELS**0.5
    works: dict[Way, Work] = {}
    for dtype in run.dtypes:
        rows, matrix = tokens.to(dtype), weight.to(dtype).requires_grad_(backward)
        bias = torch.zeros(OUT, device=run.device, dtype=dtype, requires_grad=backward)
        for name in ("public", "torch", "triton" if run.device.type == "cuda" else "cpu"):
            call = jitter(name)

            def work(call=call, rows=rows, matrix=matrix, bias=bias) -> Tensor:
                out = call(rows, matrix, bias)
                return torch.autograd.grad(out.sum(), (matrix, bias))[0] if backward else out

            works[Way(name, name_of(dtype))] = work
    what = "forward + backward" if backward else "forward"
    group = f"jitter_project {what}, {BATCH} x {TOKENS} x {CHANNELS} -> {OUT}"
    for out in turns(group, works, capturable=works).values():
        assert out.isfinite().all()
        if not backward:  # mean 0 and the law's deviation: 20 / 272 of the norm, through the weight
            added = (out.float() - F.linear(tokens, weight)).std().item()
            assert added == pytest.approx(SCALE / CHANNELS * CHANNELS**0.5, rel=0.05)
