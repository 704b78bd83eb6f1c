"""Linear layers and FFNs: under autocast by tiles or pairs, in float32 by our kernels; and what is torch's."""

import pytest
import torch
import torch.nn.functional as F
from test_whole_network import make
from uniad_fast.kernels.cpu import build, launch_linear, launch_weight_gradient

from uniad_fast.ops import linear as linear_module
from uniad_fast.ops import products
from uniad_fast.ops.linear import linear
from uniad_fast.testing import assert_within_budget

HAS_TILES = build.problem() is None and launch_weight_gradient.has_tiles()
needs_tiles = pytest.mark.skipif(not HAS_TILES, reason="this processor has no tiles")
HAS_PAIRS = build.problem() is None and launch_linear.has_pairs()
WAYS = {
    **({"tiles": products.Ways(products.ONEDNN, products.TORCH, products.TILES)} if HAS_TILES else {}),
    **({"pairs": products.Ways(*[products.OWN] * 3)} if HAS_PAIRS else {}),
    **({"torch": products.Ways(*[products.TORCH] * 3)} if HAS_TILES or HAS_PAIRS else {}),
}


@pytest.fixture(params=WAYS or [pytest.param(None, marks=pytest.mark.skip(reason="bfloat16 is torch's here"))])
def narrow(request, monkeypatch):
    """Products in bfloat16 go this way, however few rows there are."""
    monkeypatch.setattr(products, "fastest", lambda *_: WAYS[request.param])
    monkeypatch.setattr(products, "serves_bfloat16", lambda _: True)


SHAPES = [(1, 1, 1), (7, 20, 11), (33, 272, 272), (1100, 40, 300), (600, 300, 17), (512, 256, 64)]
"""Rows, inputs, outputs: parts of tiles, of chunks, of tasks; and whole ones."""


@needs_tiles
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_of_weight_and_bias(shape):
    rows, ins, outs = shape
    tokens, gradient = torch.randn(rows, ins).bfloat16(), torch.randn(rows, outs).bfloat16()
    weight, bias = launch_weight_gradient.weight_gradient(tokens, gradient, True)
    truth = gradient.double().t() @ tokens.double(), gradient.double().sum(0)
    plain = gradient.float().t() @ tokens.float(), gradient.float().sum(0)
    for ours, true, torchs in zip((weight, bias), truth, plain, strict=True):
        assert ours.dtype == torch.float32
        assert_within_budget(ours, true, torchs, str(tuple(ours.shape)))


@needs_tiles
def test_rows_apart_are_read_where_they_lie():
    tokens, gradient = torch.randn(50, 3, 40).bfloat16(), torch.randn(2, 70, 50).bfloat16()
    for a, b in ((tokens[:, 1, 5:33], gradient[0].t()), (tokens[:, 0].flip(1), gradient[1, 7:30].t())):
        ours, none = launch_weight_gradient.weight_gradient(a, b, False)
        assert none is None
        torch.testing.assert_close(ours.double(), b.double().t() @ a.double(), rtol=1e-5, atol=1e-4)


@needs_tiles
def test_threads_change_no_bit():
    tokens, gradient = torch.randn(700, 300).bfloat16(), torch.randn(700, 290).bfloat16()
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            found.append(launch_weight_gradient.weight_gradient(tokens, gradient, True))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_under_autocast(dtype, bias, narrow):
    made = [torch.randn(3, 7, 20), torch.randn(11, 20), *([torch.randn(11)] if bias else [])]
    upstream = torch.randn(3, 7, 11).bfloat16()

    def run(function, double=False):
        tensors = [t.double() if double else t.clone() for t in made]
        if not double:
            tensors[0] = tensors[0].to(dtype)
        tensors = [t.requires_grad_() for t in tensors]
        with torch.autocast("cpu", torch.bfloat16, enabled=not double):
            out = function(tensors[0], tensors[1], tensors[2] if bias else None)
        return [out, *torch.autograd.grad(out, tensors, upstream.to(out.dtype))]

    ours, plain, truth = run(lambda *t: linear(*t, None)), run(F.linear), run(F.linear, double=True)
    assert [t.dtype for t in ours] == [t.dtype for t in plain]
    for number, results in enumerate(zip(ours, truth, plain, strict=True)):
        assert_within_budget(*results, str(number))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_only_what_is_wanted_is_computed(wanted, narrow):
    made = [torch.randn(5, 20), torch.randn(11, 20), torch.randn(11)]
    tensors = [t.requires_grad_(number in wanted) for number, t in enumerate(made)]
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = linear(*tensors, None), F.linear(*tensors)
    out.float().sum().backward()
    ours = [t.grad for t in tensors]
    for t in tensors:
        t.grad = None
    expected.float().sum().backward()
    for number, (mine, tensor) in enumerate(zip(ours, tensors, strict=True)):
        assert (mine is not None) == (number in wanted)
        if mine is not None:
            torch.testing.assert_close(mine, tensor.grad, rtol=2e-2, atol=2e-2)


def test_another_dtype_of_autocast_or_none_is_torchs(monkeypatch):
    monkeypatch.setattr(products, "serves_bfloat16", lambda _: False)
    tensors = [torch.randn(5, 20), torch.randn(11, 20).requires_grad_(), torch.randn(11)]
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype):
            out = linear(*tensors, None)
            assert out.dtype == dtype and torch.equal(out, F.linear(*tensors))
    assert linear(*tensors, None).dtype == torch.float32


@pytest.mark.parametrize("rows", [31, 32])
def test_few_rows_under_autocast_are_torchs(rows, monkeypatch):
    """To pack a weight takes longer than to multiply it by them."""
    if not HAS_PAIRS:
        pytest.skip("by tiles any number of rows is ours, and without either none is")
    monkeypatch.setattr(products, "fastest", lambda *_: WAYS["pairs"])
    called = []
    monkeypatch.setattr(launch_linear, "output", lambda *a, real=launch_linear.output: called.append(1) or real(*a))
    with torch.autocast("cpu", torch.bfloat16):
        linear(torch.randn(rows, 20), torch.randn(11, 20), None, None)
    assert len(called) == (rows == 32)


@needs_tiles
def test_another_dtype_is_refused_by_the_kernel():
    with pytest.raises(ValueError, match="bfloat16, got torch.float32 and torch.bfloat16"):
        launch_weight_gradient.weight_gradient(torch.zeros(2, 3), torch.zeros(2, 4).bfloat16(), True)


def test_a_backward_pass_inside_another_autocast(narrow):
    tensors = [torch.randn(5, 20).requires_grad_(), torch.full((11, 20), 100.0).requires_grad_()]
    with torch.autocast("cpu", torch.bfloat16):
        out = linear(*tensors, None, None)
    with torch.autocast("cpu", torch.float16):
        out.backward(torch.full_like(out, 1000.0))  # products beyond what float16 holds
    assert tensors[0].grad.isfinite().all() and tensors[0].grad.max() > 1e6


@pytest.mark.skipif(HAS_TILES, reason="they are there")
def test_without_tiles_the_kernel_says_so():
    if build.problem() is not None:
        pytest.skip("no kernels here")
    with pytest.raises(RuntimeError, match="needs AMX"):
        launch_weight_gradient.weight_gradient(torch.zeros(1, 1).bfloat16(), torch.zeros(1, 1).bfloat16(), True)


KERNELS = build.problem() is None
needs_kernels = pytest.mark.skipif(not KERNELS, reason="no kernels here")


@pytest.fixture
def own(monkeypatch):
    """Our kernels multiply, whatever is fastest."""
    if not KERNELS:
        pytest.skip("no kernels here")
    monkeypatch.setattr(products, "fastest", lambda *_: products.Ways(*[products.OWN] * 3))


@pytest.mark.parametrize(
    ("tokens", "weight"),
    [((4, 30), (11, 20)), ((4, 10), (11, 20)), ((2, 3, 30), (11, 20)), ((2, 3, 20), (2, 3, 20)), ((5,), (11, 20))],
    ids=str,
)
@pytest.mark.parametrize("wanted", [True, False])
def test_what_does_not_fit_is_torchs_to_refuse(tokens, weight, wanted, own):
    tensors = torch.randn(tokens), torch.randn(weight, requires_grad=wanted)
    with pytest.raises(RuntimeError, match="mat1 and mat2|must match|matrix|dimensions"):
        F.linear(*tensors)
    with pytest.raises(RuntimeError, match="mat1 and mat2|must match|matrix|dimensions"):
        linear(*tensors, None, "cpu")


def test_a_network_refuses_channels_that_are_not_its_own(own):
    model = make()
    for channels in (5, 30):
        for training in (True, False):
            with pytest.raises((RuntimeError, ValueError), match="mat1 and mat2|13|shape"):
                model.train(training).reconstruct(torch.randn(2, 35, channels))


@pytest.mark.parametrize("weight", [torch.randn(20), torch.randn(11, 20).to_sparse_csr()], ids=["a vector", "sparse"])
def test_what_torch_alone_takes_is_torchs(weight, own):
    tokens = torch.randn(4, 20)
    torch.testing.assert_close(linear(tokens, weight, None, "cpu"), F.linear(tokens, weight))


@needs_kernels
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_of_many_at_once_and_of_gradients_that_move(own):
    tokens, weight = torch.randn(4, 20, requires_grad=True), torch.randn(11, 20, requires_grad=True)
    upstream = torch.randn(3, 4, 11)
    many = [
        torch.autograd.grad(function(tokens, weight), (tokens, weight), upstream, is_grads_batched=True)
        for function in (lambda *t: linear(*t, None, "cpu"), F.linear)
    ]
    for ours, expected in zip(*many, strict=True):
        torch.testing.assert_close(ours, expected)
    with torch.autograd.forward_ad.dual_level():
        out = F.linear(tokens.detach(), weight.detach())  # no dual itself
        moving = torch.autograd.forward_ad.make_dual(torch.ones_like(out), torch.full_like(out, 2.0))
        function = linear_module._Linear.apply(tokens, weight, None)
        (gradient,) = torch.autograd.grad(function, tokens, moving)
        tangent = torch.autograd.forward_ad.unpack_dual(gradient).tangent
    torch.testing.assert_close(tangent, 2 * gradient)


def test_what_was_made_without_gradients_may_be_added_to(own):
    tokens, weight = torch.randn(2, 3, 20), torch.randn(11, 20)
    with torch.no_grad():
        out = linear(tokens, weight, None, "cpu")
    assert not out._is_view()
    out.add_(torch.ones(11, requires_grad=True)).sum().backward()


def test_only_what_a_gradient_needs_is_kept(own):
    """So that tokens of a frozen layer may be changed in place, and those of inference mode be shifted."""
    weight, bias = torch.randn(11, 20), torch.zeros(11, requires_grad=True)
    with torch.inference_mode():
        tokens = torch.randn(4, 20)
    linear(tokens, weight, bias, "cpu").sum().backward()
    assert torch.equal(bias.grad, torch.full((11,), 4.0))
    tokens = torch.randn(4, 20, requires_grad=True) * 1
    out = linear(tokens, weight, None, "cpu")
    tokens.mul_(2)
    out.sum().backward()


def test_it_is_compiled_whole(own):
    tensors = torch.randn(40, 20), torch.randn(11, 20), torch.randn(11)
    compiled = torch.compile(lambda *t: linear(*t, "cpu"), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*tensors), F.linear(*tensors))
