"""The Triton kernels beyond what every impl is held to: the reference's own draws, tiles, tracing, memory."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from uniad_fast import UniAD, jitter_project, neighbor_masked_attention
from uniad_fast.ops import dispatch as impls
from uniad_fast.ops import noise
from uniad_fast.ops.geometry import hidden_keys
from uniad_fast.testing import assert_within_budget

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from uniad_fast.kernels import launch, philox, tiles  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def attention_inputs(feature_size, batch=2, heads=2, head_dim=16, dtype=torch.float32, query_batch=None):
    tokens = feature_size[0] * feature_size[1]
    shapes = [(query_batch or batch, heads, tokens, head_dim)] + 2 * [(batch, heads, tokens, head_dim)]
    return [torch.randn(shape, device=DEVICE).to(dtype).requires_grad_() for shape in shapes]


def run(tensors, feature_size, neighbor_size, impl, p=0.0, seed=None, **options):
    tensors = [t.detach().requires_grad_() for t in tensors]
    out = neighbor_masked_attention(*tensors, feature_size, neighbor_size, dropout_p=p, seed=seed, impl=impl, **options)
    weight = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype).view_as(out)
    return [out, *torch.autograd.grad(out, tensors, weight)]


def plain_low_precision(tensors, feature_size, neighbor_size, p, seed):
    """Attention by stock operations in the tensors' own dtype, with the reference's draws."""
    query, key, value = (t.detach().requires_grad_() for t in tensors)
    scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    hidden = hidden_keys(feature_size, neighbor_size, DEVICE)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1).masked_fill(hidden.all(1, keepdim=True), 0)
    if p > 0:
        keep = noise.keep_mask(seed, (weights.shape[0] * weights.shape[1], *weights.shape[2:]), p, DEVICE)
        weights = weights * keep.view_as(weights) / (1 - p)
    out = weights @ value
    weight = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype).view_as(out)
    return [out, *(g.nan_to_num() for g in torch.autograd.grad(out, (query, key, value), weight))]


def assert_agree(tensors, ours, feature_size, neighbor_size, low_precision=False, **options):
    """`ours` within the budget of the reference in float64, the plain way being the reference in the same dtype.

    low_precision: the plain way is stock operations that round every intermediate; the reference computes in float32.
    """
    truth = run([t.double() for t in tensors], feature_size, neighbor_size, "reference", **options)
    if low_precision:
        plain = plain_low_precision(tensors, feature_size, neighbor_size, **options)
    else:
        plain = run(tensors, feature_size, neighbor_size, "reference", **options)
    for name, mine, true, theirs in zip(("out", "dq", "dk", "dv"), ours, truth, plain, strict=True):
        assert_within_budget(mine, true, theirs, name)


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
    monkeypatch.setattr(impls, "kernel_problem", lambda *_: None)


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


ALL_TILES = sorted({*tiles.ATTENTION.values(), *tiles.ATTENTION_AMD.values()}, key=repr)


@pytest.mark.parametrize("tile", ALL_TILES, ids=lambda t: f"{t.block_m}x{t.block_n}x{t.num_warps}")
def test_every_tile_runs(tile, monkeypatch):
    """Tokens that fill no block, and blocks that are hidden, visible and mixed."""
    monkeypatch.setattr(launch, "attention_tile", lambda *_: tile)
    feature_size, neighbor_size = (2, 65), (1, 129)
    tensors = attention_inputs(feature_size, batch=1, heads=1)
    ours = run(tensors, feature_size, neighbor_size, "triton", p=0.1, seed=5)
    assert_agree(tensors, ours, feature_size, neighbor_size, p=0.1, seed=5)


@pytest.mark.parametrize(
    ("feature_size", "neighbor_size"), [((14, 14), (7, 7)), ((2, 65), (1, 129)), ((5, 13), (9, 25)), ((16, 16), None)]
)
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_whole_sequences(feature_size, neighbor_size, p, monkeypatch):
    """One program a head. float32 is too wide for it on a chip; here it holds outputs, and gradients from its sums."""
    monkeypatch.setattr(launch, "whole_sequence_tile", lambda *_: tiles.TileConfig(64, 256, 4, 1, whole=True))
    tensors = attention_inputs(feature_size, batch=2, heads=1, query_batch=1)
    ours = run(tensors, feature_size, neighbor_size, "triton", p=p, seed=5)
    assert_agree(tensors, ours, feature_size, neighbor_size, p=p, seed=5)


def test_whole_sequences_serve_what_fits():
    assert tiles.whole_sequence_tile(196, 2, 32, blackwell=False) == tiles.TileConfig(64, 256, 4, 1, whole=True)
    assert tiles.whole_sequence_tile(100, 2, 16, blackwell=False).block_n == 128
    for tokens, element_size, head_dim, blackwell in (
        (64, 2, 32, False), (257, 2, 32, False), (196, 4, 32, False), (196, 2, 64, False), (196, 2, 32, True),
    ):  # fmt: skip
        assert tiles.whole_sequence_tile(tokens, element_size, head_dim, blackwell) is None


@pytest.fixture
def tf32_switches():
    """Torch's switches for products on a GPU, put back afterwards."""
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("the newer names came with torch 2.9")
    before = torch.backends.fp32_precision, matmul.fp32_precision
    yield torch.backends, matmul
    torch.backends.fp32_precision, matmul.fp32_precision = before


@pytest.mark.skipif(torch.version.hip is not None, reason="AMD has no TF32")
def test_tf32_is_used_where_either_of_torchs_switches_allows_it(tf32_switches):
    """Reading the older name after the newer one was set raises, and every launch with it."""
    backends, matmul = tf32_switches
    tile = tiles.TileConfig(64, 64, 4, 2)
    for everywhere, products, expected in (
        ("none", "none", "tf32x3"), ("tf32", "none", "tf32"), ("none", "tf32", "tf32"), ("tf32", "ieee", "tf32x3"),
        ("ieee", "tf32", "tf32"),
    ):  # fmt: skip
        backends.fp32_precision, matmul.fp32_precision = everywhere, products
        assert tiles.dot_precision(tile) == expected, (everywhere, products)
        assert tiles.dot_precision(tiles.TileConfig(64, 64, 4, 2, precision="ieee")) == "ieee"
    backends.fp32_precision = matmul.fp32_precision = "none"
    matmul.allow_tf32 = True
    assert tiles.dot_precision(tile) == "tf32"
    matmul.allow_tf32 = False
    assert tiles.dot_precision(tile) == "tf32x3"


def test_wholly_hidden_blocks_are_skipped_where_there_are_enough():
    assert tiles.skipping_pays(2, 128, 0, 126, 64, 64)
    assert not tiles.skipping_pays(14, 14, 3, 3, 64, 64)
    assert not tiles.skipping_pays(28, 28, 7, 7, 64, 64)


def test_a_skipped_block_is_not_loaded():
    """Queries see the other row only: NaN in keys that are wholly hidden from them must not reach their output."""
    tile = tiles.TileConfig(64, 64, 4, 1)
    assert tiles.skipping_pays(2, 64, 0, 63, 64, 64)
    query, key, value = (t.detach() for t in attention_inputs((2, 64), batch=1, heads=1))
    expected, _ = launch.attention_forward(query, key, value, None, 2, 64, 0, 63, 0.0, 0.25, tile)
    poisoned = key.clone()
    poisoned[:, :, :64] = float("nan")
    out, _ = launch.attention_forward(query, poisoned, value, None, 2, 64, 0, 63, 0.0, 0.25, tile)
    assert torch.equal(out[:, :, :64], expected[:, :, :64]) and out[:, :, 64:].isnan().all()


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
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", poisoned(torch.empty))
        patch.setattr(torch, "empty_like", poisoned(torch.empty_like))
        patch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
        ours = run(tensors, (5, 13), (3, 3), "triton", p=0.1, seed=1)
        out = jitter_project(tokens, weight, scale=3.0, seed=1, impl="triton")
        (gradient,) = torch.autograd.grad(out.sum(), tokens)
    assert all(t.isfinite().all() for t in (*ours, out, gradient))


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
    geometry = (100, 100, 4, 4, 0.1, 1.0)
    seed = torch.tensor(1, device=DEVICE)
    out, stats = launch.attention_forward(query, key, value, seed, *geometry)
    launch.attention_backward(out, query, key, value, out, stats, seed, *geometry)
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
    from uniad_fast.ops import autograd

    def never(*_):
        raise AssertionError("a graph was built")

    monkeypatch.setattr(autograd._Attention, "apply", never)
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


@pytest.mark.parametrize("tile", [None, tiles.TileConfig(32, 16, 4, 1)])
def test_a_tile_can_be_given(tile):
    query, key, value = (t.detach() for t in attention_inputs((5, 7)))
    out, _ = launch.attention_forward(query, key, value, None, 5, 7, 1, 1, 0.0, 0.25, tile)
    expected = neighbor_masked_attention(query, key, value, (5, 7), (3, 3), impl="reference")
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
