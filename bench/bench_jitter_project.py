"""Jitter and project, forward and forward + backward, beside what the public code does."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.tools.timing import IMPLEMENTED, note_device_figures, synchronized_clock
from uniad_fast import jitter_project

BATCH, TOKENS, CHANNELS, OUT = 32, 196, 272, 256
SCALE = 20.0


def jitter(implementation: str) -> Callable[..., Tensor]:
    """A function of (tokens, weight, bias)."""
    if implementation != "public":
        return lambda tokens, weight, bias: jitter_project(tokens, weight, bias, scale=SCALE, impl=implementation)

    def public(tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        norms = tokens.norm(dim=2, keepdim=True) / tokens.shape[2]
        return F.linear(tokens + torch.randn_like(tokens) * norms * SCALE, weight, bias)

    return public


@pytest.mark.parametrize("implementation", IMPLEMENTED)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_backward"])
@pytest.mark.benchmark(timer=synchronized_clock, min_rounds=5, warmup=True, warmup_iterations=2, max_time=1)
def test_benchmark_jitter_project(benchmark, implementation, backward, device, dtype):
    """The features are frozen, so the tokens take no gradient."""
    benchmark.group = f"jitter_project {'forward+backward' if backward else 'forward'} 32x196x272->256"
    flops = 2 * BATCH * TOKENS * CHANNELS * OUT * (2 if backward else 1)
    benchmark.extra_info.update(implementation=implementation, flops=flops)
    torch.manual_seed(0)
    tokens = torch.randn(BATCH, TOKENS, CHANNELS, device=device).to(dtype)
    weight = (torch.randn(OUT, CHANNELS, device=device) / CHANNELS**0.5).to(dtype).requires_grad_(backward)
    bias = torch.zeros(OUT, device=device, dtype=dtype, requires_grad=backward)
    run = jitter(implementation)

    def step() -> Tensor:
        out = run(tokens, weight, bias)
        return torch.autograd.grad(out.sum(), (weight, bias))[0] if backward else out

    out = benchmark(step)
    note_device_figures(benchmark, step)
    assert out.isfinite().all()
    if not backward:  # mean 0 and the law's deviation: 20 / 272 of the norm, through the weight
        added = (out.float() - F.linear(tokens, weight, bias).float()).std().item()
        assert added == pytest.approx(SCALE / CHANNELS * CHANNELS**0.5, rel=0.05)
