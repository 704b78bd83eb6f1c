"""Our products of a linear layer in float32: numbers on every instruction set, every layout, any number of threads."""

import pytest
import torch
from uniad_fast.kernels.cpu import build, launch_linear

from uniad_fast.ops import products
from uniad_fast.ops.products import OWN, TORCH
from uniad_fast.testing import assert_within_budget

if build.problem() is not None:
    pytest.skip("no kernels here", allow_module_level=True)

SHAPES = [(1, 1, 1), (7, 20, 11), (33, 272, 272), (700, 40, 300), (650, 300, 17), (97, 321, 33), (13, 1300, 5)]
"""Rows, inputs, outputs: parts of tiles, of panels, of what is summed in registers; and whole ones."""


def made(rows, ins, outs):
    return torch.randn(rows, ins), torch.randn(outs, ins), torch.randn(outs), torch.randn(rows, outs)


def all_products(way, tokens, weight, bias, gradient):
    return {
        "output": products.output(way, tokens, weight, bias),
        "output without bias": products.output(way, tokens, weight, None),
        "gradient of tokens": products.token_gradient(way, gradient, weight),
        **dict(zip(("weight", "bias"), products.weight_gradient(way, tokens, gradient, True), strict=True)),
        "weight alone": products.weight_gradient(way, tokens, gradient, False)[0],
    }


@pytest.mark.parametrize("path", build.paths())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_instruction_set_within_budget(shape, path, monkeypatch):
    monkeypatch.setattr(launch_linear, "load", lambda: build.load(path))
    tensors = made(*shape)
    truth, plain = all_products(TORCH, *(t.double() for t in tensors)), all_products(TORCH, *tensors)
    for name, ours in all_products(OWN, *tensors).items():
        assert ours.dtype == torch.float32 and ours.is_contiguous()
        assert_within_budget(ours, truth[name], plain[name], f"{path} {name}")
    assert products.weight_gradient(OWN, tensors[0], tensors[3], False)[1] is None


@pytest.mark.parametrize(
    "shapes",
    [((4, 30), (11, 20), (11,)), ((4, 10), (11, 20), (11,)), ((4, 20), (11, 20), (12,)), ((4,), (11, 4), (11,))],
)
def test_what_does_not_fit_is_refused(shapes):
    """A row's length is told to the kernel once, for both operands."""
    tokens, weight, bias = (torch.randn(shape) for shape in shapes)
    with pytest.raises(ValueError, match="a product needs float32 of shapes RI, OI, O, got"):
        launch_linear.output(tokens, weight, bias)
    with pytest.raises(ValueError, match="float32 of shapes RO, OI, got .*float64"):
        launch_linear.token_gradient(torch.randn(4, 11), torch.randn(11, 20).double())
    with pytest.raises(ValueError, match="float32 of shapes RI, RO"):
        launch_linear.weight_gradient(torch.randn(4, 20), torch.randn(5, 11), True)


LAYOUTS = {
    "apart": lambda t: torch.stack([t, t], 1)[:, 0],
    "turned": lambda t: t.t().contiguous().t(),
    "not at the start of a line": lambda t: torch.cat([torch.zeros(1), t.flatten()])[1:].view(t.shape),
    "every second": lambda t: torch.stack([t, t], 2).flatten(1)[:, ::2],
    "one row for all": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_are_read_as_they_lie(layout):
    tokens, weight, bias, gradient = made(50, 37, 70)
    laid = [LAYOUTS[layout](t) for t in (tokens, weight, gradient)]
    plain = [t.contiguous() for t in laid]
    ours = all_products(OWN, laid[0], laid[1], torch.stack([bias, bias], 1)[:, 0], laid[2])
    for name, expected in all_products(OWN, plain[0], plain[1], bias, plain[2]).items():
        assert torch.equal(ours[name], expected), name


def test_threads_change_no_bit():
    tensors = made(700, 300, 290)
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            found.append(all_products(OWN, *tensors))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0][name], other[name]) for other in found[1:] for name in other)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_stays_where_it_belongs(value):
    """Tiles are filled up with rows and columns that are there already, or with zeros: neither may reach another."""
    tokens, weight, bias, gradient = made(19, 23, 29)
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


def test_nothing_in_nothing_out():
    for shape in ((0, 3, 5), (4, 0, 5), (4, 3, 0)):
        tokens, weight, bias, gradient = made(*shape)
        for name, ours in all_products(OWN, tokens, weight, bias, gradient).items():
            expected = all_products(TORCH, tokens, weight, bias, gradient)[name]
            assert ours.shape == expected.shape and torch.equal(ours, expected), name
