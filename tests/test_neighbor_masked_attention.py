"""The attention op: against a brute-force double loop, in every dtype, impl and awkward shape."""

import math

import pytest
import torch
from conftest import impls_and_dtypes

from uniad_fast import neighbor_masked_attention
from uniad_fast.ops.dispatch import IMPLS
from uniad_fast.ops.geometry import Window
from uniad_fast.testing import assert_within_budget

SHAPES = [
    pytest.param((1, 1), (1, 1), id="1x1-all_hidden"),
    pytest.param((1, 7), (1, 3), id="1x7"),
    pytest.param((5, 25), (3, 5), id="5x25"),
    pytest.param((7, 13), (4, 2), id="7x13-even_window"),
    pytest.param((7, 13), (13, 3), id="7x13-whole_axis"),
    pytest.param((5, 6), (11, 13), id="5x6-whole_grid"),
    pytest.param((7, 5), (7, 5), id="7x5-some_queries_without_key"),
    pytest.param((19, 29), (7, 7), id="19x29"),
    pytest.param((14, 14), (7, 7), id="14x14"),
    pytest.param((16, 16), (8, 8), id="16x16"),
    pytest.param((6, 8), None, id="6x8-nothing_hidden"),
]
IMPL = pytest.mark.parametrize("impl", IMPLS)
# The kernels take no float64: theirs is the widest they have, with what that allows.
WIDEST = {impl: torch.float32 if impl in ("cpu", "triton") else torch.float64 for impl in IMPLS}
CLOSE = {torch.float64: dict(rtol=1e-10, atol=1e-12), torch.float32: dict(rtol=1e-4, atol=1e-5)}


def inputs(feature_size, batch=2, heads=2, head_dim=16, dtype=torch.float64, query_batch=None, device=None):
    tokens = feature_size[0] * feature_size[1]
    query = torch.randn(query_batch or batch, heads, tokens, head_dim).to(device, dtype)
    key, value = (torch.randn(batch, heads, tokens, head_dim).to(device, dtype) for _ in range(2))
    return [tensor.requires_grad_() for tensor in (query, key, value)]


def double_loop(query, key, value, feature_size, neighbor_size):
    """The rule in words, one query at a time."""
    height, width = feature_size
    out = torch.zeros_like(value)
    for i in range(height * width):
        visible = []
        for j in range(height * width):
            near = neighbor_size is not None and (
                abs(i // width - j // width) <= neighbor_size[0] // 2
                and abs(i % width - j % width) <= neighbor_size[1] // 2
            )
            if not near:
                visible.append(j)
        if visible:
            scores = (query[:, :, i : i + 1] * key[:, :, visible]).sum(-1) / math.sqrt(query.shape[-1])
            out[:, :, i] = (scores.softmax(-1)[..., None] * value[:, :, visible]).sum(2)
    return out


@pytest.mark.parametrize(("feature_size", "neighbor_size"), [p for p in SHAPES if "19x29" not in p.id])
@IMPL
def test_equals_a_double_loop(impl, feature_size, neighbor_size):
    query, key, value = inputs(feature_size, batch=1, dtype=WIDEST[impl])
    expected = double_loop(query, key, value, feature_size, neighbor_size)
    out = neighbor_masked_attention(query, key, value, feature_size, neighbor_size, impl=impl)
    torch.testing.assert_close(out, expected, **CLOSE[WIDEST[impl]])


@pytest.mark.parametrize(("impl", "dtype"), impls_and_dtypes())
@pytest.mark.parametrize(("feature_size", "neighbor_size"), SHAPES)
def test_forward_and_gradients_within_budget(impl, feature_size, neighbor_size, dtype):
    few = 1 if impl == "triton" and math.prod(feature_size) > 190 else 2  # the interpreter takes minutes otherwise
    tensors = inputs(feature_size, batch=few, heads=few, dtype=dtype)
    weight = torch.randn_like(tensors[1])

    def run(impl, *tensors):
        tensors = [t.detach().requires_grad_() for t in tensors]
        out = neighbor_masked_attention(*tensors, feature_size, neighbor_size, impl=impl)
        return [out, *torch.autograd.grad(out, tensors, weight.to(out.dtype))]

    truth = run("reference", *(t.double() for t in tensors))
    plain = run("torch", *tensors)
    for name, ours, true, theirs in zip(("out", "dq", "dk", "dv"), run(impl, *tensors), truth, plain, strict=True):
        assert_within_budget(ours, true, theirs, name)


@pytest.mark.parametrize("neighbor_size", [(3, 3), (5, 7)], ids=str)
def test_gradcheck(neighbor_size):
    """(5, 7) hides everything from the query in the middle."""
    feature_size = (5, 6)
    query, key, value = inputs(feature_size, batch=1, heads=1, head_dim=3)

    def op(query, key, value):
        return neighbor_masked_attention(
            query, key, value, feature_size, neighbor_size, dropout_p=0.2, seed=3, impl="reference"
        )

    assert torch.autograd.gradcheck(op, (query, key, value))


@IMPL
def test_a_query_without_key_gives_zeros_and_takes_no_gradient(impl):
    feature_size, neighbor_size = (5, 6), (5, 7)
    assert Window.of(feature_size, neighbor_size).leaves_a_query_without_key
    query, key, value = inputs(feature_size, dtype=WIDEST[impl])
    out = neighbor_masked_attention(query, key, value, feature_size, neighbor_size, impl=impl)
    lonely = [i for i in range(30) if abs(i // 6 - 2) <= 0 and i % 6 in (2, 3)]  # rows 0..4, cols 0..5 within (2, 3)
    assert (out[:, :, lonely] == 0).all()
    assert (out.abs().sum(dim=(0, 1, 3)) > 0).sum() == 30 - len(lonely)
    gradients = torch.autograd.grad(out[:, :, lonely].sum(), (query, key, value))
    assert all((gradient == 0).all() for gradient in gradients)


@IMPL
def test_a_query_of_batch_one_serves_the_batch(impl):
    query, key, value = inputs((5, 6), batch=3, query_batch=1, dtype=WIDEST[impl])

    def run(query):
        out = neighbor_masked_attention(query, key, value, (5, 6), (3, 3), impl=impl)
        return out, *torch.autograd.grad(out.square().sum(), (query, key, value))

    broadcast, repeated = run(query), run(query.detach().expand(3, -1, -1, -1).clone().requires_grad_())
    torch.testing.assert_close(broadcast[0], repeated[0])
    torch.testing.assert_close(broadcast[1], repeated[1].sum(0, keepdim=True))
    torch.testing.assert_close(broadcast[2:], repeated[2:])


@IMPL
def test_strided_inputs_and_an_empty_batch(impl):
    packed = torch.randn(35, 2, 3 * 4 * 8, dtype=WIDEST[impl])  # token first, packed qkv
    query, key, value = packed.unflatten(-1, (3, 4, 8)).permute(2, 1, 3, 0, 4)
    out = neighbor_masked_attention(query, key, value, (5, 7), (3, 3), impl=impl)
    whole = (t.contiguous() for t in (query, key, value))
    torch.testing.assert_close(out, neighbor_masked_attention(*whole, (5, 7), (3, 3), impl=impl))
    empty = neighbor_masked_attention(query[:0], key[:0], value[:0], (5, 7), (3, 3), impl=impl)
    assert empty.shape == (0, 4, 35, 8)


@IMPL
def test_scale_is_used(impl):
    query, key, value = inputs((4, 4), dtype=WIDEST[impl])
    out = neighbor_masked_attention(query, key, value, (4, 4), (1, 1), scale=0.5, impl=impl)
    scaled = neighbor_masked_attention(query * 0.5 * 4, key, value, (4, 4), (1, 1), impl=impl)
    torch.testing.assert_close(out, scaled)


@pytest.mark.parametrize("impl", ["reference", "torch"])  # test_triton: the kernels drop what the reference drops
def test_dropout_has_the_right_mean_and_variance(impl):
    """Over many draws: mean the undropped output, variance p / (1 - p) * sum of squared weights times values."""
    query, key, value = (t.detach().double() for t in inputs((4, 5), batch=1, heads=1, head_dim=4))
    p, draws = 0.25, 4000
    outs = neighbor_masked_attention(
        *(t.expand(draws, -1, -1, -1) for t in (query, key, value)), (4, 5), (3, 3), dropout_p=p, seed=11, impl=impl
    )
    plain = neighbor_masked_attention(query, key, value, (4, 5), (3, 3), impl=impl)
    eye = torch.eye(20, dtype=torch.float64)[None, None]
    weights = neighbor_masked_attention(
        torch.nn.functional.pad(query, (0, 16)),
        torch.nn.functional.pad(key, (0, 16)),
        eye,
        (4, 5),
        (3, 3),
        scale=0.5,
        impl=impl,
    )
    variance = p / (1 - p) * (weights**2 @ value**2)
    torch.testing.assert_close(outs.mean(0, keepdim=True), plain, rtol=0, atol=5 * (variance.max() / draws) ** 0.5)
    torch.testing.assert_close(outs.var(0, keepdim=True), variance, rtol=0.25, atol=0.02 * variance.max())


@IMPL
def test_seeds(impl):
    query, key, value = inputs((4, 5), dtype=WIDEST[impl])

    def run(seed):
        return neighbor_masked_attention(query, key, value, (4, 5), (3, 3), dropout_p=0.5, seed=seed, impl=impl)

    assert torch.equal(run(1), run(1))
    assert torch.equal(run(1), run(torch.tensor(1)))
    assert not torch.equal(run(1), run(2))
    torch.manual_seed(5)
    first, second = run(None), run(None)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(run(None), first)
    state = torch.get_rng_state()
    run(1)
    assert torch.equal(torch.get_rng_state(), state)  # a given seed leaves torch's generator alone


@IMPL
def test_autocast_casts_as_for_a_matrix_product(impl):
    query, key, value = inputs((4, 5), dtype=torch.float32)
    with torch.autocast(query.device.type, torch.float16):
        out = neighbor_masked_attention(query, key, value, (4, 5), (3, 3), impl=impl)
    assert out.dtype == torch.float16
    out.sum().backward()
    assert query.grad is not None and query.grad.dtype == torch.float32


GOOD = dict(shape=(2, 2, 20, 8), feature_size=(4, 5), neighbor_size=(3, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(feature_size=(4, 4)), "16 tokens"),
        (dict(feature_size=(4, 0)), "feature_size must be"),
        (dict(feature_size=20), "feature_size must be"),
        (dict(neighbor_size=(3,)), "neighbor_size must be"),
        (dict(neighbor_size=(3, 2.5)), "2.5"),
        (dict(dropout_p=1.0), r"dropout_p must be in \[0, 1\), got 1.0"),
        (dict(dropout_p=float("nan")), "nan"),
        (dict(seed=2**63), "64-bit"),
        (dict(seed=1.5), "seed must be an integer, a tensor or None, got 1.5"),
        (dict(seed=torch.zeros(1, dtype=torch.int64)), r"int64 \[\] or \[2\]"),
        (dict(impl="fastest"), "'fastest'"),
        (dict(key_shape=(2, 2, 20, 4)), r"\(2, 2, 20, 4\)"),
        (dict(query_shape=(3, 2, 20, 8)), r"\(3, 2, 20, 8\)"),
        (dict(query_shape=(2, 20, 8)), r"\(2, 20, 8\)"),
        (dict(key_dtype=torch.float16), "torch.float16"),
        (dict(dtype=torch.int32), "torch.int32"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_input_is_named(change, message):
    given = {**GOOD, **change}
    dtype = given.get("dtype", torch.float32)
    query = torch.zeros(given.get("query_shape", given["shape"]), dtype=dtype)
    key = torch.zeros(given.get("key_shape", given["shape"]), dtype=given.get("key_dtype", dtype))
    value = torch.zeros(given["shape"], dtype=dtype)
    options = {name: given[name] for name in ("dropout_p", "seed", "impl") if name in given}
    with pytest.raises(ValueError, match=message):
        neighbor_masked_attention(query, key, value, given["feature_size"], given["neighbor_size"], **options)
