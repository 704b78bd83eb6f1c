"""Our products of a linear layer: numbers on every instruction set, every layout, any number of threads."""

import pytest
import torch
from uniad_fast.kernels.cpu import build, launch, launch_linear

from uniad_fast.ops import products
from uniad_fast.ops.products import OWN, TORCH
from uniad_fast.testing import assert_within_budget

if build.problem() is not None:
    pytest.skip("no kernels here", allow_module_level=True)

SHAPES = [(1, 1, 1), (7, 20, 11), (33, 272, 272), (700, 40, 300), (650, 300, 17), (97, 321, 33), (13, 1300, 5)]
"""Rows, inputs, outputs: parts of tiles, of panels, of what is summed in registers; and whole ones."""


DTYPES = [torch.float32, torch.bfloat16]


def made(rows, ins, outs, dtype=torch.float32):
    """Tokens, weight, bias, gradient: the first and the last in `dtype`."""
    tokens, gradient = torch.randn(rows, ins).to(dtype), torch.randn(rows, outs).to(dtype)
    return tokens, torch.randn(outs, ins), torch.randn(outs), gradient


def needs(dtype, path=None):
    if dtype == torch.bfloat16 and not build.load(path).uniad_linear_has_pairs():
        pytest.skip("no products of pairs here, or none that pay")


def all_products(way, tokens, weight, bias, gradient):
    weight = products.operand(way, weight, tokens.dtype)
    return {
        "output": products.output(way, tokens, weight, bias),
        "output without bias": products.output(way, tokens, weight, None),
        "gradient of tokens": products.token_gradient(way, gradient, weight),
        **dict(zip(("weight", "bias"), products.weight_gradient(way, tokens, gradient, True), strict=True)),
        "weight alone": products.weight_gradient(way, tokens, gradient, False)[0],
    }


def exactly(tokens, weight, bias, gradient):
    """All products in float64, of what the kernel multiplies: a weight rounded as tokens are."""
    tensors = tokens, products.operand(TORCH, weight, tokens.dtype), bias, gradient
    return all_products(TORCH, *(t.double() for t in tensors))


@pytest.mark.parametrize("path", build.paths())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_instruction_set_within_budget(shape, dtype, path, monkeypatch):
    needs(dtype, path)
    monkeypatch.setattr(launch_linear, "load", lambda: build.load(path))
    tensors = made(*shape, dtype)
    truth, plain = exactly(*tensors), all_products(TORCH, *tensors)
    for name, ours in all_products(OWN, *tensors).items():
        is_parameters = name.startswith(("weight", "bias"))
        assert ours.dtype == (torch.float32 if is_parameters else dtype) and ours.is_contiguous()
        assert_within_budget(ours, truth[name], plain[name], f"{path} {name}")
        if is_parameters and dtype == torch.bfloat16:  # not rounded to it on the way
            torch.testing.assert_close(ours.double(), truth[name], rtol=1e-5, atol=1e-4)
    assert products.weight_gradient(OWN, tensors[0], tensors[3], False)[1] is None


@pytest.mark.parametrize("path", build.paths())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3, 0.999999])
@pytest.mark.parametrize("shape", [(7, 20, 11), (205, 300, 130)], ids=str)
def test_relu_and_dropout_at_the_end_of_a_product(shape, dropout_p, dtype, path, monkeypatch):
    """What is dropped is what dropout drops; in float32 all is the same to the bit as one after the other."""
    needs(dtype, path)
    for launcher in (launch, launch_linear):
        monkeypatch.setattr(launcher, "load", lambda: build.load(path))
    tokens, weight, bias, gradient = made(*shape, dtype)
    ending = dropout_p, torch.tensor([2**40 + 7, 5]) if dropout_p else None
    ours = launch_linear.output(tokens, weight, bias, ending)
    apart = launch.dropout_forward(launch_linear.output(tokens, weight, bias), dropout_p, True, ending[1])
    rounded = products.operand(TORCH, weight, dtype).float()
    unrounded = launch.dropout_forward(launch_linear.output(tokens.float(), rounded, bias), dropout_p, True, ending[1])
    activated = torch.randn(shape[0], shape[1]).to(dtype)
    back = launch_linear.token_gradient(gradient, weight, ending, activated)
    plain = launch_linear.token_gradient(gradient, weight)
    back_apart = launch.dropout_backward(plain, activated, dropout_p, True, None)
    assert torch.equal(ours == 0, apart == 0) and torch.equal(back == 0, back_apart == 0)
    if dtype == torch.float32:
        assert torch.equal(ours, apart) and torch.equal(back, back_apart)
    else:
        torch.testing.assert_close(ours.float(), unrounded, rtol=2**-8, atol=1e-3)  # rounded once, at the end
        torch.testing.assert_close(back, back_apart, rtol=2**-7, atol=0)
    if dropout_p < 0.5:
        assert 0.3 < (ours == 0).float().mean() < 0.8


@pytest.mark.parametrize(
    "shapes",
    [((4, 30), (11, 20), (11,)), ((4, 10), (11, 20), (11,)), ((4, 20), (11, 20), (12,)), ((4,), (11, 4), (11,))],
)
def test_what_does_not_fit_is_refused(shapes):
    """A row's length is told to the kernel once, for both operands."""
    tokens, weight, bias = (torch.randn(shape) for shape in shapes)
    with pytest.raises(ValueError, match="a product needs RI in float32.* and OI, O in float32, got"):
        launch_linear.output(tokens, weight, bias)
    with pytest.raises(ValueError, match="RO in float32.* and OI in float32, got .*float64"):
        launch_linear.token_gradient(torch.randn(4, 11), torch.randn(11, 20).double())
    with pytest.raises(ValueError, match="RO, RI in float32"):
        launch_linear.token_gradient(torch.randn(4, 11), torch.randn(11, 20), (0.0, None), torch.randn(4, 19))
    with pytest.raises(ValueError, match="RI, RO in float32"):
        launch_linear.weight_gradient(torch.randn(4, 20), torch.randn(5, 11), True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.bfloat16], ids=str)
def test_dtypes_that_no_kernel_has_are_refused(dtype, monkeypatch):
    monkeypatch.setattr(launch_linear, "has_pairs", lambda: False)
    tokens, weight, _, gradient = made(4, 20, 11, dtype)
    for call in (
        lambda: launch_linear.output(tokens, weight, None),
        lambda: launch_linear.token_gradient(gradient, weight),
        lambda: launch_linear.weight_gradient(tokens, gradient, False),
    ):
        with pytest.raises(ValueError, match=f"in float32.* got .*{dtype}"):
            call()


LAYOUTS = {
    "apart": lambda t: torch.stack([t, t], 1)[:, 0],
    "turned": lambda t: t.t().contiguous().t(),
    "not at the start of a line": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "rows of an odd length": lambda t: torch.cat([t, t[:, :1]], 1)[:, : t.shape[1]],
    "every second": lambda t: torch.stack([t, t], 2).flatten(1)[:, ::2],
    "one row for all": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ins", [36, 37])
def test_tensors_are_read_as_they_lie(ins, dtype, layout):
    needs(dtype)
    tokens, weight, bias, gradient = made(50, ins, 70, dtype)
    laid = [LAYOUTS[layout](t) for t in (tokens, weight, gradient)]
    plain = [t.contiguous() for t in laid]
    ours = all_products(OWN, laid[0], laid[1], torch.stack([bias, bias], 1)[:, 0], laid[2])
    for name, expected in all_products(OWN, plain[0], plain[1], bias, plain[2]).items():
        assert torch.equal(ours[name], expected), name


@pytest.mark.parametrize("shape", [(700, 300, 290), (700, 512, 96)], ids=["shared by outputs", "by inputs"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_change_no_bit(dtype, shape):
    needs(dtype)
    tensors = made(*shape, dtype)
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            found.append(all_products(OWN, *tensors))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0][name], other[name]) for other in found[1:] for name in other)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_no_number_stays_where_it_belongs(dtype, value):
    """Tiles are filled up with rows and columns that are there already, or with zeros: neither may reach another."""
    needs(dtype)
    tokens, weight, bias, gradient = made(19, 23, 29, dtype)
    tokens[18, 22] = gradient[18, 28] = value
    ours, expected = (all_products(way, tokens, weight, bias, gradient) for way in (OWN, TORCH))
    for name in ours:
        assert torch.equal(ours[name].isfinite(), expected[name].isfinite()), name
        assert 0 < (~expected[name].isfinite()).sum() < expected[name].numel(), name


def test_long_sums_keep_their_digits():
    """100,000 rows: one float that all of them are added to would be off by a thousandth."""
    gradient = torch.rand(100_000, 3) + 0.5
    weight, bias = products.weight_gradient(OWN, torch.ones(100_000, 1), gradient, True)
    truth = gradient.double().sum(0)
    torch.testing.assert_close(bias.double(), truth, rtol=1e-5, atol=0)
    torch.testing.assert_close(weight[:, 0].double(), truth, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_in_nothing_out(dtype):
    needs(dtype)
    for shape in ((0, 3, 5), (4, 0, 5), (4, 3, 0)):
        tokens, weight, bias, gradient = made(*shape, dtype)
        for name, ours in all_products(OWN, tokens, weight, bias, gradient).items():
            expected = all_products(TORCH, tokens, weight, bias, gradient)[name]
            assert ours.shape == expected.shape and torch.equal(ours, expected), name
