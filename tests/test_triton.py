"""The Triton kernels beyond what every impl is held to: the reference's own draws, tiles, tracing, memory."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from triton_cases import DEVICE, assert_agree, attention_inputs, run

from bench.tools.seeds import drawn_singly
from uniad_fast import UniAD, jitter_project, neighbor_masked_attention
from uniad_fast.ops import dispatch, noise
from uniad_fast.ops.dropout import dropout_add_norm
from uniad_fast.testing import assert_within_budget

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from uniad_fast.kernels.gpu import launch, philox  # noqa: E402


@pytest.fixture
def right_bfloat16(monkeypatch):
    """Triton 3.8's interpreter multiplies bfloat16's bit patterns, and truncates where a GPU rounds to nearest even.

    Both are put right here, so that the kernels' bfloat16 is run and not only compiled. A GPU needs nothing.
    """
    if DEVICE.type == "cuda":
        return
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, dot = builder.cast_impl, builder.create_dot

    def widen(tensor):
        if tensor.dtype.scalar != tl.bfloat16:
            return tensor
        return handle((tensor.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == tl.bfloat16:
            return cast(self, widen(src), dst_type) if dst_type.scalar != tl.float32 else widen(src)
        if dst_type.scalar == tl.bfloat16:
            assert src.dtype.scalar == tl.float32 and not np.isnan(src.data).any()
            bits = np.ascontiguousarray(src.data).view(np.uint32)
            return handle(((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16), tl.bfloat16)
        return cast(self, src, dst_type)

    monkeypatch.setattr(builder, "cast_impl", cast_impl)
    monkeypatch.setattr(builder, "create_dot", lambda self, a, b, *rest: dot(self, widen(a), widen(b), *rest))
    monkeypatch.setattr(dispatch, "kernel_problem", lambda *_: None)


@triton.jit
def _write_keep(out_ptr, seed, threshold, cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    row = tl.arange(0, BLOCK_M)
    for first in range(0, cols, BLOCK_N):
        keep = philox.keep_tile(seed, 3, row, first, threshold, BLOCK_M, BLOCK_N)
        tl.store(out_ptr + row[:, None] * cols + first + tl.arange(0, BLOCK_N)[None, :], keep.to(tl.int8))


@pytest.mark.parametrize("block_n", [16, 32, 64, 128])
def test_keep_decisions_are_the_references_to_the_bit(block_n):
    seed = -0x1234_5678_9ABC_DEF
    out = torch.empty(16, 256, dtype=torch.int8, device=DEVICE)
    _write_keep[(1,)](out, seed, noise.keep_threshold(0.3), 256, BLOCK_M=16, BLOCK_N=block_n)
    assert torch.equal(out.bool(), noise.keep_mask(seed, (4, 16, 256), 0.3, DEVICE)[3])


@triton.jit
def _write_normals(out_ptr, seed, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    token, channel = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_C)
    tl.store(
        out_ptr + token[:, None] * BLOCK_C + channel[None, :], philox.jitter_tile(seed, token, 0, BLOCK_M, BLOCK_C)
    )


def test_normals_are_the_references_to_rounding():
    out = torch.empty(256, 64, device=DEVICE)
    _write_normals[(1,)](out, 77, BLOCK_M=256, BLOCK_C=64)
    expected = noise.jitter_normals(77, (256, 64), torch.float64, DEVICE)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("feature_size", "neighbor_size"), [((7, 13), (3, 5)), ((9, 9), None), ((5, 6), (5, 7)), ((14, 14), (7, 7))]
)
def test_dropout_is_the_references(feature_size, neighbor_size, dtype):
    few = 1 if feature_size == (14, 14) else 2  # the interpreter takes minutes otherwise
    tensors = attention_inputs(feature_size, batch=few, heads=few, dtype=dtype)
    ours = run(tensors, feature_size, neighbor_size, "triton", p=0.3, seed=11)
    assert_agree(tensors, ours, feature_size, neighbor_size, p=0.3, seed=11)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("feature_size", "neighbor_size"), [((7, 13), (3, 5)), ((5, 6), (5, 7)), ((14, 14), (7, 7))])
def test_bfloat16_attention(right_bfloat16, feature_size, neighbor_size, p):
    tensors = attention_inputs(feature_size, dtype=torch.bfloat16)
    ours = run(tensors, feature_size, neighbor_size, "triton", p=p, seed=11)
    assert_agree(tensors, ours, feature_size, neighbor_size, low_precision=True, p=p, seed=11)


@pytest.mark.parametrize("shape", [(7, 13), (2, 49, 272)], ids=str)
def test_bfloat16_jitter(right_bfloat16, shape):
    tensors = [torch.randn(s, device=DEVICE).to(torch.bfloat16) for s in (shape, (10, shape[-1]), (10,))]

    def run_jitter(impl, *tensors):
        tensors = [t.detach().requires_grad_() for t in tensors]
        out = jitter_project(*tensors, scale=5.0, seed=9, impl=impl)
        return [out, *torch.autograd.grad(out.float().square().sum() / shape[-1], tensors)]

    truth = run_jitter("reference", *(t.double() for t in tensors))
    ours = run_jitter("triton", *tensors)
    assert all(t.dtype == torch.bfloat16 for t in ours)
    for name, mine, true in zip(("out", "dtokens", "dweight", "dbias"), ours, truth, strict=True):
        # Plain bfloat16 rounds the noisy tokens and the gradient of the output, as the kernels do.
        assert_within_budget(mine, true, true + 2.0**-8 * true.abs().max(), name)


@pytest.mark.parametrize("head_dim", [16, 24, 32, 64, 80, 128])
def test_head_widths(head_dim):
    tensors = attention_inputs((5, 7), batch=1, head_dim=head_dim)
    assert_agree(tensors, run(tensors, (5, 7), (3, 3), "triton"), (5, 7), (3, 3))


def test_a_broadcast_query_with_dropout():
    tensors = attention_inputs((5, 7), batch=3, query_batch=1)
    assert_agree(tensors, run(tensors, (5, 7), (3, 3), "triton", p=0.2, seed=3), (5, 7), (3, 3), p=0.2, seed=3)


def test_the_same_inputs_give_the_same_bits():
    tensors = attention_inputs((7, 9))
    first, second = (run(tensors, (7, 9), (3, 3), "triton", p=0.1, seed=2) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_output_element_is_forgotten(monkeypatch):
    """What the launchers allocate is poisoned with NaN first."""

    def poisoned(allocate):
        def call(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return call

    tensors = attention_inputs((5, 13))
    tokens, weight = torch.randn(19, 40, device=DEVICE, requires_grad=True), torch.randn(24, 40, device=DEVICE)
    jitter = [tokens, weight.clone().requires_grad_(), torch.ones(24, device=DEVICE, requires_grad=True)]
    x, norm = torch.randn(600, 40, device=DEVICE), [torch.ones(40, device=DEVICE, requires_grad=True) for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", poisoned(torch.empty))
        patch.setattr(torch, "empty_like", poisoned(torch.empty_like))
        patch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
        ours = run(tensors, (5, 13), (3, 3), "triton", p=0.1, seed=1)
        out = jitter_project(tokens, weight, scale=3.0, seed=1, impl="triton")
        (gradient,) = torch.autograd.grad(out.sum(), tokens)
        weights = torch.autograd.grad(jitter_project(*jitter, scale=3.0, seed=1, impl="triton").sum(), jitter[1:])
        norms = [
            t
            for rows in (3, 600)  # programs that have no row of their own too
            for t in torch.autograd.grad(dropout_add_norm(x[:rows], x[:rows], *norm, impl="triton").sum(), norm)
        ]
    assert all(t.isfinite().all() for t in (*ours, out, gradient, *weights, *norms))


def step(model, x):
    torch.manual_seed(4)
    reconstruction = model({"feature_align": x})["feature_rec"]
    loss = F.mse_loss(reconstruction, x)
    return loss, torch.autograd.grad(loss, list(model.parameters()))


def test_a_training_step_of_uniad_is_the_references():
    """Dropout 0.1 and jitter on: the loss and every parameter's gradient."""
    options = dict(
        inplanes=[24], instrides=[16], feature_size=(7, 9), feature_jitter={"scale": 20.0, "prob": 1.0},
        neighbor_mask={"neighbor_size": (3, 5), "mask": [True] * 3}, hidden_dim=32, pos_embed_type="learned",
        save_recon=None, initializer={"method": "xavier_uniform"}, nhead=2, num_encoder_layers=1,
        num_decoder_layers=2, dim_feedforward=64, dropout=0.1,
    )  # fmt: skip
    ours, definition = (UniAD(**options, impl=impl).to(DEVICE) for impl in ("triton", "reference"))
    definition.load_state_dict(ours.state_dict())
    x = torch.randn(1, 24, 7, 9, device=DEVICE)
    with drawn_singly():
        loss, gradients = step(ours, x)
    expected_loss, expected = step(definition, x)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    for (name, _), mine, other in zip(ours.named_parameters(), gradients, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5 + 1e-4 * other.abs().max().item(), msg=name)


def test_nothing_of_n_by_n_is_allocated(monkeypatch):
    """At N = 10,000 the launchers' own tensors add up to less than three times q, k, v and out. Kernels don't run."""
    from types import SimpleNamespace

    class Launched:
        def __getitem__(self, grid):
            assert grid[0] < 2**31
            return lambda **_: None

    sizes = []
    for name in ("empty", "empty_like", "zeros"):
        allocate = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, _f=allocate, **k: (t := _f(*a, **k), sizes.append(t.nbytes))[0])
    kernels = ("forward_kernel", "query_gradient_kernel", "key_value_gradient_kernel")
    monkeypatch.setattr(launch, "attention", SimpleNamespace(**{name: Launched() for name in kernels}))
    query, key, value = (torch.ones(1, 3, 10_000, 32, device=DEVICE) for _ in range(3))
    sizes.clear()
    arguments = ((100, 100, 4, 4), 0.1, 1.0, torch.tensor(1, device=DEVICE))
    out, stats = launch.attention_forward(query, key, value, *arguments)
    launch.attention_backward(out, query, key, value, out, stats, *arguments)
    assert 0 < sum(sizes) < 3 * 4 * query.nbytes


def test_activation_checkpointing_draws_the_same_noise_again():
    query, key, value = attention_inputs((5, 7))

    def op(query, key, value):
        return neighbor_masked_attention(query, key, value, (5, 7), (3, 3), dropout_p=0.5, impl="triton")

    torch.manual_seed(1)
    plain = torch.autograd.grad(op(query, key, value).square().sum(), query)
    torch.manual_seed(1)
    again = torch.autograd.grad(checkpoint(op, query, key, value, use_reentrant=False).square().sum(), query)
    assert torch.equal(plain[0], again[0])


def test_double_backward_is_refused():
    query, key, value = attention_inputs((3, 4))
    out = neighbor_masked_attention(query, key, value, (3, 4), (1, 1), impl="triton")
    (gradient,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_without_gradients_no_graph_is_built(monkeypatch):
    from uniad_fast.ops.neighbor_masked_attention import _Attention

    def never(*_):
        raise AssertionError("a graph was built")

    monkeypatch.setattr(_Attention, "apply", never)
    query, key, value = attention_inputs((3, 4))
    with torch.no_grad():
        neighbor_masked_attention(query, key, value, (3, 4), (1, 1), impl="triton")


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [((1, 1, 6, 136), torch.float32, "136"), ((1, 1, 6, 16), torch.float64, "torch.float64")],
)
def test_what_it_does_not_take_is_named(shape, dtype, message):
    query = torch.zeros(shape, dtype=dtype, device=DEVICE)
    with pytest.raises(ValueError, match=f"impl='triton' can't serve this call: .*{message}"):
        neighbor_masked_attention(query, query, query, (2, 3), (1, 1), impl="triton")
    with pytest.raises(ValueError, match="a scale from .*, not -1.0"):
        query = torch.zeros(1, 1, 6, 16, device=DEVICE)
        neighbor_masked_attention(query, query, query, (2, 3), (1, 1), scale=-1.0, impl="triton")


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU does bfloat16 right")
def test_the_interpreter_is_not_trusted_with_bfloat16():
    query = torch.zeros(1, 1, 6, 16, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="interpreter computes bfloat16 wrongly"):
        neighbor_masked_attention(query, query, query, (2, 3), (1, 1), impl="triton")
