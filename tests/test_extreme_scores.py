"""Attention where numbers are large, not finite or out of range."""

from contextlib import nullcontext

import pytest
import torch
from op_cases import device_of

from uniad_fast import neighbor_masked_attention
from uniad_fast.ops.dispatch import IMPLS

IMPL = pytest.mark.parametrize("impl", IMPLS)
# The kernels take no float64: theirs is the widest they have, with what that allows.
WIDEST = {impl: torch.float32 if impl in ("cpu", "triton") else torch.float64 for impl in IMPLS}


def inputs(feature_size, batch=2, heads=2, head_dim=16, dtype=torch.float64, query_batch=None, device=None):
    tokens = feature_size[0] * feature_size[1]
    query = torch.randn(query_batch or batch, heads, tokens, head_dim).to(device, dtype)
    key, value = (torch.randn(batch, heads, tokens, head_dim).to(device, dtype) for _ in range(2))
    return [tensor.requires_grad_() for tensor in (query, key, value)]


@IMPL
@pytest.mark.parametrize("score", [4e2, 4e6, 4e8, 4e12, 4e30])
def test_large_scores_keep_their_weights(impl, score):
    """One visible key has all the weight, whatever its score, so the value's gradient is 1; it was 0.006 at 4e8."""
    device = device_of(impl)
    query = torch.full((1, 1, 2, 16), score / 4, dtype=WIDEST[impl], device=device)  # sixteen products, scale 1/4
    key = torch.full_like(query, 0.25)
    value = torch.randn_like(query).requires_grad_()
    out = neighbor_masked_attention(query * 4, key * 4, value, (1, 2), (1, 1), impl=impl)
    torch.testing.assert_close(out, value.detach().flip(2))
    (gradient,) = torch.autograd.grad(out.sum(), value)
    torch.testing.assert_close(gradient, torch.ones_like(gradient))


@IMPL
@pytest.mark.parametrize("score", [1e3, 1e5, 4e8])
def test_large_scores_of_random_directions(impl, score):
    """The kernels of a GPU compute products in other orders forward and backward: a rounding of the score is theirs."""
    device, dtype = device_of(impl), WIDEST[impl]
    query, key, value = (torch.randn(1, 1, 2, 32, dtype=dtype, device=device) for _ in range(3))
    query *= (score * 32**0.5 / (query * key.flip(2)).sum(-1).abs())[..., None].sqrt()
    key *= (score * 32**0.5 / (query.flip(2) * key).sum(-1).abs())[..., None]
    value.requires_grad_()
    out = neighbor_masked_attention(query, key, value, (1, 2), (1, 1), impl=impl)
    torch.testing.assert_close(out, value.detach().flip(2))
    (gradient,) = torch.autograd.grad(out.sum(), value)
    off = (gradient - 1).abs().max().item()
    assert gradient.max() <= 1 + 1e-5
    assert off <= (min(1.0, 16 * score * 2.0**-23) if impl == "triton" else 1e-5)


@IMPL
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_gradients_of_large_scores(impl, size):
    """Two keys whose scores differ by one, far from zero: what the softmax tells apart, the gradient does too."""
    device, dtype = device_of(impl), WIDEST[impl]
    query = torch.zeros(1, 1, 3, 16, dtype=dtype, device=device)
    query[..., 0] = size
    key = torch.zeros_like(query)
    key[0, 0, :, 0] = torch.tensor([4 * size, 4 * size + 4 / size, 4 * size - 4 / size])
    value = torch.randn(1, 1, 3, 16).to(query)

    def run(impl, *tensors):
        tensors = [t.detach().requires_grad_() for t in tensors]
        out = neighbor_masked_attention(*tensors, (1, 3), None, impl=impl)
        return [out, *torch.autograd.grad(out.square().sum(), tensors)]

    truth = run("reference", query.double(), key.double(), value.double())
    plain = run("reference", query.cpu().float(), key.cpu().float(), value.cpu().float())
    for ours, true, theirs in zip(run(impl, query, key, value), truth, plain, strict=True):
        error, allowed = (ours.cpu() - true.cpu()).abs().max(), (theirs - true.cpu()).abs().max()
        # Weights near 1/3 to a rounding or two, times keys of 4 * size, which cancel.
        assert error <= 2 * allowed + 1e-6 * max(4 * size, true.abs().max())


@IMPL
def test_windows_far_larger_than_the_grid(impl):
    query, key, value = (t.detach() for t in inputs((4, 5), dtype=WIDEST[impl], device=device_of(impl)))
    for huge in (2**31, 2**63, 2**64 - 2, 2**65):
        everything = neighbor_masked_attention(query, key, value, (4, 5), (huge, huge), impl=impl)
        assert (everything == 0).all()
        rows = neighbor_masked_attention(query, key, value, (4, 5), (huge, 1), impl=impl)
        torch.testing.assert_close(rows, neighbor_masked_attention(query, key, value, (4, 5), (9, 1), impl=impl))


@pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl != "torch"])  # whose NaNs are torch's own affair
def test_a_nan_in_one_key_reaches_the_gradients_that_it_reaches_by_definition(impl):
    tensors = [t.detach() for t in inputs((1, 9), batch=1, heads=1, dtype=WIDEST[impl], device=device_of(impl))]
    tensors[1][0, 0, 0, 0] = float("nan")

    def run(impl):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = neighbor_masked_attention(*leaves, (1, 9), (1, 1), impl=impl)
        return [out, *torch.autograd.grad(out.sum(), leaves)]

    for ours, expected in zip(run(impl), run("reference"), strict=True):
        assert torch.equal(ours.isnan(), expected.isnan())


@IMPL
def test_without_a_key_the_output_is_zero_whatever_the_values_are(impl):
    query, key, value = (t.detach() for t in inputs((4, 5), dtype=WIDEST[impl], device=device_of(impl)))
    value[0, 0, 3, 2], value[1, 1, 7, 1] = float("inf"), float("nan")
    assert (neighbor_masked_attention(query, key, value, (4, 5), (9, 11), impl=impl) == 0).all()


@IMPL
@pytest.mark.parametrize(
    ("p", "acts_as"), [(1e-9, 0.0), (2.0**-18, 0.0), (0.1, 6554 / 65536), (1 - 1e-9, 65535 / 65536)]
)
def test_a_probability_acts_as_what_sixteen_bits_can_draw(impl, p, acts_as):
    query, key, value = (t.detach() for t in inputs((4, 5), dtype=WIDEST[impl], device=device_of(impl)))

    def run(p):
        return neighbor_masked_attention(query, key, value, (4, 5), (3, 3), dropout_p=p, seed=3, impl=impl)

    assert run(p).isfinite().all() and torch.equal(run(p), run(acts_as))


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf")])
@IMPL
def test_a_scale_that_is_not_finite_is_refused(impl, scale):
    query, key, value = inputs((4, 5), dtype=WIDEST[impl], device=device_of(impl))
    with pytest.raises(ValueError, match="scale must be a finite number"):
        neighbor_masked_attention(query, key, value, (4, 5), (3, 3), scale=scale, impl=impl)


@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-60])
def test_a_scale_that_the_kernels_do_not_take_is_served_by_default(scale):
    query, key, value = (t.detach().float() for t in inputs((4, 5)))
    with pytest.warns(UserWarning, match="they take a scale from") if scale != 1e-60 else nullcontext():
        out = neighbor_masked_attention(query, key, value, (4, 5), (3, 3), scale=scale)
    torch.testing.assert_close(
        out, neighbor_masked_attention(query, key, value, (4, 5), (3, 3), scale=scale, impl="reference")
    )
