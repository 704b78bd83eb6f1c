"""Dropout, add and norm; ReLU and dropout: every impl and dtype against float64, and the definition's own draws."""

import pytest
import torch
import torch.nn.functional as F
from conftest import impls_and_dtypes

from uniad_fast.ops import noise
from uniad_fast.ops.dispatch import IMPLS
from uniad_fast.ops.dropout import dropout, dropout_add_norm
from uniad_fast.testing import assert_within_budget

SHAPES = [(2, 5, 17), (3, 4, 64), (1, 6, 200), (2, 3, 5, 33)]
IMPL = pytest.mark.parametrize("impl", IMPLS)
OWN_NOISE = pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl != "torch"])


def norm_inputs(shape, dtype, residual_batch):
    residual_shape = (1, *shape[1:]) if residual_batch == 1 else shape
    return [
        torch.randn(shape).to(dtype),
        torch.randn(residual_shape).to(dtype),
        torch.randn(shape[-1]),
        torch.randn(shape[-1]),
    ]


def with_gradients(function, tensors, weight):
    tensors = [t.detach().requires_grad_() for t in tensors]
    out = function(*tensors)
    return [out, *torch.autograd.grad(out, tensors, weight.to(out.dtype))]


@pytest.mark.parametrize(("impl", "dtype"), impls_and_dtypes(leave_out="reference"))
@pytest.mark.parametrize("residual_batch", [1, None])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_within_budget(impl, dtype, shape, p, residual_batch):
    if impl == "torch" and p > 0:
        p = 0.0  # its draws are its own
    tensors, weight = norm_inputs(shape, dtype, residual_batch), torch.randn(shape)

    def run(impl):
        return lambda *t: dropout_add_norm(*t, dropout_p=p, seed=7, impl=impl)

    truth = with_gradients(run("reference"), [t.double() for t in tensors], weight)
    keep = noise.keep_mask(7, (1, weight[..., 0].numel(), shape[-1]), p, weight.device).view(shape)

    def plainly(x, residual, norm_weight, norm_bias):
        total = residual + x * keep.to(x.dtype) / (1 - p)
        return F.layer_norm(total, shape[-1:], norm_weight.to(x.dtype), norm_bias.to(x.dtype))

    plain = with_gradients(plainly, tensors, weight)
    for name, *three in zip(
        ("out", "dx", "dresidual", "dweight", "dbias"), with_gradients(run(impl), tensors, weight), truth, plain,
        strict=True,
    ):  # fmt: skip
        assert_within_budget(*three, name)


@pytest.mark.parametrize(("impl", "dtype"), impls_and_dtypes(leave_out="torch"))
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("shape", [*SHAPES, (70, 130)], ids=str)
def test_dropout_is_the_definitions(impl, dtype, shape, relu):
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    out, gradient = with_gradients(lambda x: dropout(x, 0.4, relu=relu, seed=11, impl=impl), [x], weight)
    keep = noise.keep_mask(11, (1, x[..., 0].numel(), shape[-1]), 0.4, x.device).view(shape)
    alive = keep & (x > 0) if relu else keep
    expected = torch.where(alive, x.float() / 0.6, 0.0)
    torch.testing.assert_close(out.float(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-3, atol=0)
    assert torch.equal(out != 0, alive & (x != 0)) and torch.equal(gradient != 0, alive)
    torch.testing.assert_close(gradient.float(), torch.where(alive, weight.float() / 0.6, 0.0), rtol=1e-2, atol=0)


@IMPL
def test_nothing_is_dropped_at_zero(impl):
    x = torch.randn(3, 4, 20)
    assert dropout(x, 0.0, impl=impl) is x
    assert torch.equal(dropout(x, 0.0, relu=True, impl=impl), x.relu())


@IMPL
def test_a_nan_goes_through(impl):
    x = torch.randn(2, 3, 8)
    x[1, 2, 3] = float("nan")
    assert dropout(x, 0.0, relu=True, impl=impl).isnan().sum() == 1
    out = dropout_add_norm(x, torch.zeros_like(x), torch.ones(8), torch.zeros(8), impl=impl)
    assert out[1, 2].isnan().all() and out.isnan().sum() == 8


@OWN_NOISE
def test_no_seed_follows_the_global_generator(impl):
    x = torch.randn(4, 50)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(dropout(x, 0.5, impl=impl))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


@IMPL
def test_under_autocast_the_result_is_narrow(impl):
    if impl == "triton" and not torch.cuda.is_available():
        pytest.skip("the interpreter takes no bfloat16")
    x, weight = torch.randn(2, 3, 8), torch.ones(8)
    with torch.autocast(x.device.type, torch.bfloat16):
        out = dropout_add_norm(x, x, weight, weight, impl=impl)
    assert out.dtype == torch.bfloat16


@IMPL
def test_empty_batches(impl):
    x, weight = torch.randn(0, 3, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    out = dropout_add_norm(x, x, weight, weight, dropout_p=0.1, impl=impl)
    out.sum().backward()
    assert out.shape == x.grad.shape == (0, 3, 8) and not weight.grad.any()
    assert dropout(x, 0.1, impl=impl).shape == (0, 3, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(residual=torch.randn(2, 3, 9)), "residual must have the shape of x"),
        (dict(residual=torch.randn(3, 3, 8)), "residual must have the shape of x"),
        (dict(residual=torch.randn(2, 3, 8).double()), "x is torch.float32 but residual is torch.float64"),
        (dict(x=torch.randn(8), residual=torch.randn(1)), "residual must have the shape"),
        (dict(eps=float("nan")), "eps must be a finite number >= 0, got nan"),
        (dict(weight=torch.ones(8, dtype=torch.int64)), "weight must be floating point"),
        (dict(bias=torch.ones(8, device="meta")), "bias must be floating point and on cpu"),
        (dict(weight=torch.ones(9)), r"weight and bias must be \[8\]"),
        (dict(dropout_p=1.0), r"dropout_p must be in \[0, 1\), got 1.0"),
        (dict(dropout_p=-0.1), "got -0.1"),
        (dict(impl="cuda"), "impl must be None or one of"),
    ],
)
def test_bad_input_says_what_is_wrong(change, message):
    arguments = dict(x=torch.randn(2, 3, 8), residual=torch.randn(2, 3, 8), weight=torch.ones(8), bias=torch.ones(8))
    with pytest.raises(ValueError, match=message):
        dropout_add_norm(**(arguments | change))


def test_double_backward_is_refused():
    x = torch.randn(2, 8, requires_grad=True)
    out = dropout(x, 0.1, relu=True, impl="cpu")
    (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|twice"):
        gradient.sum().backward()
