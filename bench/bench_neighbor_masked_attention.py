"""Attention forward, and forward + backward with and without dropout, each impl beside the public way."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.tools.cases import ATTENTION, AttentionCase
from bench.tools.timing import IMPLEMENTED, note_device_figures, synchronized_clock
from uniad_fast import neighbor_masked_attention
from uniad_fast.testing import PublicUniAD

CASES = pytest.mark.parametrize("case", ATTENTION, ids=lambda case: case.name)
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", IMPLEMENTED)


def attention(implementation: str, case: AttentionCase, dropout_p: float) -> Callable[..., Tensor]:
    """A function of (query, key, value). The public way rebuilds the mask in each call and keeps the weights."""
    if implementation != "public":
        return lambda q, k, v: neighbor_masked_attention(
            q, k, v, case.feature_size, case.neighbor_size, dropout_p=dropout_p, impl=implementation
        )
    masks = PublicUniAD(1, 1, case.feature_size, case.neighbor_size, hidden_dim=2, nhead=1, layers=0)

    def public(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = masks.generate_mask(case.feature_size, case.neighbor_size).to(query.device, query.dtype)
        scores = torch.baddbmm(mask, query.flatten(0, 1) * query.shape[-1] ** -0.5, key.flatten(0, 1).transpose(1, 2))
        weights = F.dropout(scores.softmax(dim=-1), dropout_p)
        out = torch.bmm(weights, value.flatten(0, 1)).view_as(query)
        weights.view(*query.shape[:2], *weights.shape[1:]).mean(dim=1)  # need_weights, averaged over the heads
        return out

    return public


def inputs(case: AttentionCase, device: torch.device, dtype: torch.dtype, grad: bool) -> list[Tensor]:
    torch.manual_seed(0)
    shape = (case.batch, case.heads, case.tokens, case.head_dim)
    return [torch.randn(shape, device=device).to(dtype).requires_grad_(grad) for _ in range(3)]


def note(benchmark, case: AttentionCase, implementation: str, what: str) -> None:
    benchmark.group = f"attention {what} {case.name}"
    benchmark.extra_info.update(
        implementation=implementation, flops=case.forward_flops, bytes=case.forward_bytes, heads=case.heads
    )


@CASES
@IMPLEMENTATIONS
@pytest.mark.benchmark(timer=synchronized_clock, min_rounds=5, warmup=True, warmup_iterations=2, max_time=2)
def test_benchmark_forward(benchmark, case, implementation, sized, device, dtype):
    case = sized(case)
    note(benchmark, case, implementation, "forward")
    tensors = inputs(case, device, dtype, grad=False)
    run = attention(implementation, case, 0.0)
    out = benchmark(run, *tensors)
    note_device_figures(benchmark, lambda: run(*tensors))
    expected = attention("torch", case, 0.0)(*tensors)
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


@CASES
@IMPLEMENTATIONS
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.benchmark(timer=synchronized_clock, min_rounds=5, warmup=True, warmup_iterations=1, max_time=2)
def test_benchmark_forward_backward(benchmark, case, implementation, dropout_p, sized, device, dtype):
    case = sized(case)
    note(benchmark, case, implementation, f"forward+backward dropout {dropout_p}")
    tensors = inputs(case, device, dtype, grad=True)
    weight = torch.randn_like(tensors[0])
    run = attention(implementation, case, dropout_p)

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(*tensors), tensors, weight)

    gradients = benchmark(step)
    note_device_figures(benchmark, step)
    assert all(gradient.isfinite().all() for gradient in gradients)
    if dropout_p == 0:
        plain = attention("torch", case, 0.0)
        for ours, expected in zip(gradients, torch.autograd.grad(plain(*tensors), tensors, weight), strict=True):
            torch.testing.assert_close(ours, expected, rtol=5e-2, atol=5e-2)
