"""The jitter op: its definition, its gradients through the norm too, its laws, its messages."""

import pytest
import torch
from conftest import impls_and_dtypes

from uniad_fast import jitter_project
from uniad_fast.ops import noise
from uniad_fast.ops.dispatch import IMPLS
from uniad_fast.testing import assert_within_budget

IMPL = pytest.mark.parametrize("impl", IMPLS)
WIDEST = {impl: torch.float32 if impl in ("cpu", "triton") else torch.float64 for impl in IMPLS}
CPU = torch.device("cpu")


def inputs(shape=(2, 15, 24), out=10, dtype=torch.float64, bias=True):
    tokens = torch.randn(shape).to(dtype)
    weight, offset = torch.randn(out, shape[-1]).to(dtype), torch.randn(out).to(dtype)
    return [t.requires_grad_() for t in (tokens, weight, *([offset] if bias else []))]


def test_reference_is_the_definition_token_by_token():
    tokens, weight, bias = inputs(shape=(3, 11))
    out = jitter_project(tokens, weight, bias, scale=4.0, prob=0.5, seed=7, impl="reference")
    normals = noise.jitter_normals(7, (3, 11), torch.float64, CPU)
    chosen = noise.jittered_tokens(7, 3, 0.5, CPU)
    for t in range(3):
        noisy = tokens[t] + (4.0 * tokens[t].norm() / 11 * normals[t] if chosen[t] else 0)
        torch.testing.assert_close(out[t], weight @ noisy + bias)


def test_gradcheck():
    def op(tokens, weight, bias):
        return jitter_project(tokens, weight, bias, scale=3.0, prob=0.7, seed=5, impl="reference")

    assert torch.autograd.gradcheck(op, inputs(shape=(2, 3, 6), out=4))


@pytest.mark.parametrize(("impl", "dtype"), impls_and_dtypes(leave_out="torch"))
@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (2, 49, 192), (3, 5, 272)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_forward_and_gradients_within_budget(impl, shape, bias, dtype):
    tensors = inputs(shape, dtype=dtype, bias=bias)
    noisy_channels = shape[-1]

    def run(impl, *tensors):
        tensors = [t.detach().requires_grad_() for t in tensors]
        out = jitter_project(*tensors, scale=20.0, seed=9, impl=impl)
        return [out, *torch.autograd.grad(out.float().square().sum() / noisy_channels, tensors)]

    def plain(*tensors):
        """The same noise by stock operations in the low precision."""
        tensors = [t.detach().requires_grad_() for t in tensors]
        flat = tensors[0].flatten(0, -2)
        normals = noise.jitter_normals(9, tuple(flat.shape), torch.float32, flat.device).to(flat.dtype)
        noisy = flat + normals * (flat.norm(dim=-1, keepdim=True) * (20.0 / noisy_channels))
        out = torch.nn.functional.linear(noisy, *tensors[1:]).view(*shape[:-1], -1)
        return [out, *torch.autograd.grad(out.float().square().sum() / noisy_channels, tensors)]

    truth = run("reference", *(t.double() for t in tensors))
    names = ("out", "dtokens", "dweight", "dbias")
    for name, ours, true, theirs in zip(names, run(impl, *tensors), truth, plain(*tensors), strict=False):
        assert_within_budget(ours, true, theirs, name)


@pytest.mark.parametrize("impl", ["reference", "torch"])  # test_triton: the kernels draw what the reference draws
def test_noise_has_the_papers_law(impl):
    """Deviation scale * norm / channels, mean zero, on the share `prob` of the tokens."""
    tokens = torch.randn(1, 16, dtype=torch.float64) * 3
    out = jitter_project(tokens.expand(40_000, -1), torch.eye(16).double(), scale=8.0, prob=0.5, seed=1, impl=impl)
    added = out - tokens
    jittered = added.abs().sum(-1) > 0
    assert abs(jittered.double().mean() - 0.5) < 0.01
    deviation = 8.0 * tokens.norm() / 16
    assert abs(added[jittered].mean()) < 4 * deviation / (jittered.sum() * 16) ** 0.5
    torch.testing.assert_close(added[jittered].std(), deviation, rtol=0.01, atol=0)


@IMPL
@pytest.mark.parametrize("options", [dict(scale=0.0), dict(scale=5.0, prob=0.0)], ids=str)
def test_without_noise_it_is_a_linear_layer(impl, options):
    tokens, weight, bias = inputs(dtype=WIDEST[impl])
    out = jitter_project(tokens, weight, bias, impl=impl, **options)
    torch.testing.assert_close(out, torch.nn.functional.linear(tokens, weight, bias))


@IMPL
def test_seeds(impl):
    tokens, weight, _ = inputs(dtype=WIDEST[impl])

    def run(seed):
        return jitter_project(tokens, weight, scale=5.0, seed=seed, impl=impl)

    assert torch.equal(run(1), run(torch.tensor(1)))
    assert not torch.equal(run(1), run(2))
    torch.manual_seed(5)
    first, second = run(None), run(None)
    torch.manual_seed(5)
    assert torch.equal(run(None), first) and not torch.equal(first, second)


@IMPL
def test_a_zero_token_has_a_finite_gradient(impl):
    tokens = torch.zeros(2, 8, dtype=WIDEST[impl], requires_grad=True)
    jitter_project(tokens, torch.randn(3, 8, dtype=WIDEST[impl]), scale=5.0, seed=1, impl=impl).sum().backward()
    assert tokens.grad is not None and tokens.grad.isfinite().all()


@IMPL
def test_strided_empty_and_autocast(impl):
    tokens, weight, bias = inputs(shape=(4, 6, 24), dtype=torch.float32)
    swapped = tokens.transpose(0, 1)
    torch.testing.assert_close(
        jitter_project(swapped, weight, bias, scale=0.0, impl=impl),
        jitter_project(swapped.contiguous(), weight, bias, scale=0.0, impl=impl),
    )
    assert jitter_project(tokens[:0], weight, bias, scale=5.0, impl=impl).shape == (0, 6, 10)
    with torch.autocast(tokens.device.type, torch.float16):
        assert jitter_project(tokens, weight, bias, scale=5.0, impl=impl).dtype == torch.float16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(scale=-1.0), "-1.0"),
        (dict(scale=float("inf")), "inf"),
        (dict(prob=1.5), "1.5"),
        (dict(impl="gpu"), "'gpu'"),
        (dict(weight=torch.zeros(3, 7)), r"\(3, 7\)"),
        (dict(bias=torch.zeros(4)), r"\(4,\)"),
        (dict(bias=torch.zeros(3, dtype=torch.float16)), "float16"),
        (dict(tokens=torch.zeros(2, 8, dtype=torch.int64)), "int64"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_input_is_named(change, message):
    given = dict(tokens=torch.zeros(2, 8), weight=torch.zeros(3, 8), bias=torch.zeros(3), scale=1.0) | change
    with pytest.raises(ValueError, match=message):
        jitter_project(given.pop("tokens"), given.pop("weight"), given.pop("bias"), **given)
