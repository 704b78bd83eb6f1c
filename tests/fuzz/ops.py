"""The four ops, with shapes, dtypes, layouts, windows, noise and magnitudes drawn, against the definition in float64.

Held is: where the definition in the same dtype is finite, so is the kernel, and its error is at most twice the
definition's plus what rounding may do to numbers of this size; whatever is not accepted raises a ValueError.
"""

import math

import torch
from hypothesis import assume
from hypothesis import strategies as st
from op_cases import layouts
from torch import Tensor

from uniad_fast import jitter_project, neighbor_masked_attention
from uniad_fast.ops.dropout import dropout, dropout_add_norm

_EPS = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
_ROUNDINGS = 32
PROBABILITIES = st.one_of(st.sampled_from([0.0, 0.1, 0.5, 1e-6, 1 - 2.0**-17]), st.floats(0, 1, exclude_max=True))
SEEDS = st.one_of(st.integers(-(2**63), 2**63 - 1), st.sampled_from([0, -1, 2**32, 2**63 - 1]))
MAGNITUDES = st.one_of(st.just(1.0), st.floats(-6, 6).map(lambda e: 10.0**e))
EXTREMES = st.floats(-30, 30).map(lambda e: 10.0**e)


def dtypes(interpreted: bool) -> st.SearchStrategy[torch.dtype]:
    """float32 most of the time. Triton's interpreter computes bfloat16 wrongly, and the kernels refuse it there."""
    halves = [torch.float16] if interpreted else [torch.bfloat16, torch.float16]
    return st.sampled_from([torch.float32, torch.float32, *halves])


def tensor(draw, generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype, size: float) -> Tensor:
    """Random numbers of about this size, laid out in memory in any way."""
    plain = (torch.randn(shape, generator=generator) * size).to(dtype)
    assume(plain.isfinite().all())
    if plain.numel() == 0 or draw(st.booleans()):
        return plain
    ways = dict(layouts(plain))
    return ways[draw(st.sampled_from(sorted(ways)))]


def run(function, tensors: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Output and every gradient."""
    inputs = [t.detach().to(dtype or t.dtype) for t in tensors]
    if dtype is not None:
        inputs = [t.clone() for t in inputs]
    inputs = [t.requires_grad_() for t in inputs]
    out = function(*inputs)
    weight = torch.linspace(-1, 1, max(1, out.numel()), dtype=torch.float64)[: out.numel()].view(out.shape)
    if not out.numel():
        return [out]
    return [out.detach(), *torch.autograd.grad(out, inputs, weight.to(out.dtype))]


def compare(ours: list[Tensor], plain: list[Tensor], truth: list[Tensor], allowed: list[float], what: object) -> None:
    """ours: the kernel's. plain: the definition in the same dtype. truth: in float64. allowed: by rounding."""
    for number, (mine, theirs, true, band) in enumerate(zip(ours, plain, truth, allowed, strict=True)):
        assert mine.shape == true.shape and mine.dtype == theirs.dtype, (number, mine.shape, what)
        if not mine.numel():
            continue
        if not theirs.isfinite().all() or not true.isfinite().all() or true.abs().max() > torch.finfo(mine.dtype).max:
            return  # the definition itself has left what the dtype can hold, and so have the gradients after it
        if band > torch.finfo(mine.dtype).max / 4:
            continue  # a rounding alone may leave what the dtype can hold
        error, other = (mine.double() - true).abs().max().item(), (theirs.double() - true).abs().max().item()
        assert error <= 2 * other + band, (
            f"result {number}: error {error:.3g}, definition {other:.3g}, {band=:.3g}, {what}"
        )


@st.composite
def attention_cases(draw, small=False):
    """(tensors, function of an implementation, description). small: for Triton's interpreter, which is slow."""
    height, width = draw(st.integers(1, 5 if small else 9)), draw(st.integers(1, 5 if small else 9))
    if not small and draw(st.integers(0, 19)) == 0:
        height, width = draw(st.sampled_from([(14, 14), (1, 70), (70, 1), (23, 23), (33, 33)]))
    batch, heads = draw(st.integers(0, 2 if small else 3)), draw(st.integers(1, 1 if small else 3))
    head_dim = draw(st.sampled_from([1, 3, 8, 16, 17, 24, 32, 64, 100, 128]))
    window = draw(
        st.one_of(
            st.none(),
            st.tuples(st.integers(1, 2 * height + 2), st.integers(1, 2 * width + 2)),
            st.tuples(st.integers(1, 2**70), st.integers(1, 2**70)),
        )
    )
    dtype, generator = draw(dtypes(small)), torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    sizes = [draw(st.one_of(MAGNITUDES, EXTREMES)) for _ in range(3)]
    query_batch = draw(st.sampled_from([batch, 1])) if batch else batch
    shape = (heads, height * width, head_dim)
    tensors = [
        tensor(draw, generator, (b, *shape), dtype, size)
        for b, size in zip((query_batch, batch, batch), sizes, strict=True)
    ]
    p, seed = draw(PROBABILITIES), draw(SEEDS)
    scale = draw(st.one_of(st.none(), st.floats(1e-6, 1e3)))

    def function(impl):
        return lambda q, k, v: neighbor_masked_attention(
            q, k, v, (height, width), window, dropout_p=p, scale=scale, seed=seed, impl=impl
        )

    return tensors, function, (height, width, window, head_dim, dtype, sizes, p, seed, scale)


def check_attention(case, impl: str) -> None:
    tensors, function, told = case
    dtype = tensors[1].dtype
    q, k, v = (t.double() for t in tensors)
    truth = run(function("reference"), tensors, torch.float64)
    plain = run(function("reference"), tensors)
    ours = run(function(impl), tensors)
    if not ours[0].numel():
        return compare(ours, plain, truth, [0.0], told)
    scale, p = told[-1] or 1 / math.sqrt(told[3]), min(told[-3], 1 - 2.0**-16)
    largest = {name: float(t.abs().max()) for name, t in (("q", q), ("k", k), ("v", v))}
    tokens, keep = k.shape[2], 1 / (1 - p)
    score = scale * float((q.abs() @ k.abs().transpose(-1, -2)).max())
    # A score's rounding error acts on a weight by its exponential.
    eps = _EPS[dtype]
    assume(score * 2.0**-23 < 0.05)
    relative = _ROUNDINGS * (eps + 2.0**-23 * (1 + score))
    weight_gradient = largest["v"] * told[3] * keep
    batch = max(1, k.shape[0]) if tensors[0].shape[0] != k.shape[0] else 1
    allowed = [
        relative * largest["v"] * keep,
        relative * scale * weight_gradient * largest["k"] * batch * 2,
        relative * scale * weight_gradient * largest["q"] * tokens * 2,
        relative * keep * tokens,
    ]
    smallest = float(torch.finfo(dtype).smallest_normal)
    compare(ours, plain, truth, [a + 4 * smallest for a in allowed], told)


@st.composite
def jitter_cases(draw, small=False):
    shape = tuple(draw(st.lists(st.integers(0, 5), min_size=0, max_size=2))) + (draw(st.integers(1, 70)),)
    outs, dtype = draw(st.integers(0, 40)), draw(dtypes(small))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    sizes = [draw(MAGNITUDES) for _ in range(3)]
    shapes = [shape, (outs, shape[-1]), *([(outs,)] if draw(st.booleans()) else [])]
    tensors = [tensor(draw, generator, s, dtype, size) for s, size in zip(shapes, sizes, strict=False)]
    scale = draw(st.one_of(st.sampled_from([0.0, 20.0]), st.floats(0, 100)))
    prob, seed = draw(st.floats(0, 1)), draw(SEEDS)

    def function(impl):
        return lambda *t: jitter_project(*t, scale=scale, prob=prob, seed=seed, impl=impl)

    return tensors, function, (shapes, dtype, sizes, scale, prob, seed)


def check_jitter(case, impl: str) -> None:
    tensors, function, told = case
    truth = run(function("reference"), tensors, torch.float64)
    plain, ours = run(function("reference"), tensors), run(function(impl), tensors)
    if not ours[0].numel():
        return compare(ours, plain, truth, [0.0], told)
    tokens, weight = (float(t.double().abs().max()) for t in tensors[:2])
    channels, outs = tensors[1].shape[1], tensors[1].shape[0]
    count = ours[0].numel() // outs
    noisy = tokens * (1 + 6 * told[3] / math.sqrt(channels))  # Box and Muller's largest normal of 24 bits is 5.9
    bias = float(tensors[2].double().abs().max()) if len(tensors) == 3 else 0.0
    relative = _ROUNDINGS * _EPS[tensors[0].dtype]
    allowed = [
        relative * (noisy * weight * channels + bias),
        relative * weight * outs * (1 + 6 * told[3]),
        relative * noisy * count,
        relative * count,
    ]
    smallest = float(torch.finfo(tensors[0].dtype).smallest_normal)
    compare(ours, plain, truth, [a + 4 * smallest for a in allowed[: len(ours)]], told)


@st.composite
def norm_cases(draw, small=False):
    shape = (draw(st.integers(0, 3)), *draw(st.lists(st.integers(1, 5), max_size=1)), draw(st.integers(1, 140)))
    dtype, generator = draw(dtypes(small)), torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    sizes = [draw(MAGNITUDES) for _ in range(2)] + [1.0, 1.0]
    other = draw(st.sampled_from([torch.float32, dtype]))
    residual = (1, *shape[1:]) if shape[0] and draw(st.booleans()) else shape
    shapes, kinds = [shape, residual, shape[-1:], shape[-1:]], [dtype, dtype, other, other]
    tensors = [tensor(draw, generator, s, k, size) for s, k, size in zip(shapes, kinds, sizes, strict=True)]
    p, seed = draw(st.one_of(st.just(0.0), st.floats(0, 0.99))), draw(SEEDS)

    def function(impl):
        return lambda *t: dropout_add_norm(*t, dropout_p=p, eps=1e-5, seed=seed, impl=impl)

    return tensors, function, (shapes, dtype, sizes, p, seed)


def check_norm(case, impl: str) -> None:
    tensors, function, told = case
    truth = run(function("reference"), tensors, torch.float64)
    plain, ours = run(function("reference"), tensors), run(function(impl), tensors)
    if not ours[0].numel():
        return compare(ours[:1], plain[:1], truth[:1], [0.0], told)
    x, residual, weight, _ = (t.double() for t in tensors)
    p, seed = told[3], told[4]
    with torch.no_grad():
        z = residual + dropout(x, p, seed=seed, impl="reference")
        rstd = (z.var(-1, correction=0) + 1e-5) ** -0.5
        # The sum's rounding error, which a small deviation makes large.
        amplified = float((z.abs().amax(-1) * rstd).max()) + 1
    width, rows, batch = z.shape[-1], z.numel() // z.shape[-1], z.shape[0]
    relative = _ROUNDINGS * (_EPS[told[1]] + 2.0**-23 * math.sqrt(width) * amplified)
    assume(relative < 0.3)
    largest, keep = float(weight.abs().max()), 1 / (1 - min(p, 1 - 2.0**-16))
    down = relative * largest * float(rstd.max()) * width * keep
    allowed = [
        relative * (largest * math.sqrt(width) + 1),
        down,
        down * batch,
        relative * width * rows,
        relative * rows,
    ]
    smallest = 4 * float(torch.finfo(told[1]).smallest_normal)
    allowed = [a + smallest for a in allowed]
    compare(ours, plain, truth, allowed, told)


@st.composite
def dropout_cases(draw, small=False):
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=2))) + (draw(st.integers(0, 200)),)
    dtype, generator = draw(dtypes(small)), torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    size = draw(st.one_of(MAGNITUDES, EXTREMES))
    x = tensor(draw, generator, shape, dtype, size)
    p, seed, relu = draw(PROBABILITIES), draw(SEEDS), draw(st.booleans())

    def function(impl):
        return lambda t: dropout(t, p, relu=relu, seed=seed, impl=impl)

    return [x], function, (shape, dtype, size, p, seed, relu)


def check_dropout(case, impl: str) -> None:
    tensors, function, told = case
    truth = run(function("reference"), tensors, torch.float64)
    plain, ours = run(function("reference"), tensors), run(function(impl), tensors)
    keep = 1 / (1 - min(told[3], 1 - 2.0**-16))
    largest = float(tensors[0].double().abs().max()) if tensors[0].numel() else 0.0
    smallest = float(torch.finfo(told[1]).smallest_normal)
    relative = 4 * _EPS[told[1]] * keep
    compare(ours, plain, truth, [relative * largest + smallest, relative + smallest][: len(ours)], told)
    kept = ours[0] != 0
    assert torch.equal(kept | (tensors[0] == 0), (plain[0] != 0) | (tensors[0] == 0)) or largest < 1e-30, told


_ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.floats(), st.text(max_size=3), st.just((3, 3)), st.just([1, 2, 3]),
    st.just(torch.zeros(2)), st.just(torch.zeros((), dtype=torch.int64)), st.just(2**80),
)  # fmt: skip


@st.composite
def bad_calls(draw):
    """Every argument that is not a tensor, as anything at all."""
    return {
        name: draw(_ANYTHING)
        for name in draw(
            st.sets(st.sampled_from(["feature_size", "neighbor_size", "dropout_p", "scale", "seed", "impl"]))
        )
    }


def check_bad_call(changes) -> None:
    """Whatever is passed, it is served or refused with a ValueError or, for what is no number at all, a TypeError."""
    q = torch.randn(1, 1, 9, 8)
    arguments = dict(feature_size=(3, 3), neighbor_size=(1, 1), dropout_p=0.1, scale=0.5, seed=1, impl="cpu") | changes
    size, window = arguments.pop("feature_size"), arguments.pop("neighbor_size")
    try:
        out = neighbor_masked_attention(q, q, q, size, window, **arguments)
    except (ValueError, TypeError) as error:
        assert str(error)
    else:
        # Beyond, a product of the definition leaves float32.
        assert out.shape == q.shape and (out.isfinite().all() or abs(arguments["scale"]) > 1e30)
