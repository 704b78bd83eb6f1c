"""Linear layers: under autocast by the tiles of AMX, in float32 by our kernels, and what is torch's to answer."""

import pytest
import torch
import torch.nn.functional as F
from test_whole_network import make
from uniad_fast.kernels.cpu import build, launch_weight_gradient

from uniad_fast.ops import linear as linear_module
from uniad_fast.ops import products
from uniad_fast.ops.dropout import dropout
from uniad_fast.ops.linear import linear, linear_relu_dropout
from uniad_fast.testing import assert_within_budget

HAS_TILES = build.problem() is None and launch_weight_gradient.has_tiles()
needs_tiles = pytest.mark.skipif(not HAS_TILES, reason="this processor has no tiles")
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


@needs_tiles
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_under_autocast(dtype, bias):
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


@needs_tiles
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_only_what_is_wanted_is_computed(wanted):
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
    monkeypatch.setattr(linear_module._LinearInTiles, "apply", None)
    tensors = [torch.randn(5, 20), torch.randn(11, 20).requires_grad_(), torch.randn(11)]
    with torch.autocast("cpu", torch.float16):
        assert linear(*tensors, None).dtype == torch.float16
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(*tensors, None), F.linear(*tensors))
    assert linear(*tensors, None).dtype == torch.float32


@needs_tiles
def test_another_dtype_is_refused_by_the_kernel():
    with pytest.raises(ValueError, match="bfloat16, got torch.float32 and torch.bfloat16"):
        launch_weight_gradient.weight_gradient(torch.zeros(2, 3), torch.zeros(2, 4).bfloat16(), True)


@needs_tiles
def test_a_backward_pass_inside_another_autocast():
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


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
def test_relu_and_dropout_in_the_products_place(dropout_p, bias, own):
    """The same bits as one after the other, gradients too, and nothing of the caller's is written to."""
    made = [torch.randn(2, 30, 20), torch.randn(11, 20), *([torch.randn(11)] if bias else [])]
    upstream = torch.randn(2, 30, 11)

    def run(function):
        tensors = [t.clone().requires_grad_() for t in made]
        torch.manual_seed(3)
        out = function(tensors[0], tensors[1], tensors[2] if bias else None)
        gradients = torch.autograd.grad(out, tensors, upstream)
        assert all(torch.equal(a, b) for a, b in zip(tensors, made, strict=True))
        return [out, *gradients, torch.get_rng_state()]

    together = run(lambda *t: linear_relu_dropout(*t, dropout_p, "cpu"))
    apart = run(lambda *t: dropout(linear(*t, "cpu"), dropout_p, relu=True, impl="cpu"))
    for ours, expected in zip(together, apart, strict=True):
        assert torch.equal(ours, expected)
    assert (together[0] == 0).float().mean() > 0.4 and together[0].min() == 0


def test_relu_and_dropout_keep_one_tensor_of_the_hidden_width(own):
    tokens, weight = torch.randn(64, 16), torch.randn(4096, 16, requires_grad=True)
    counted = []
    for function in (
        lambda: linear_relu_dropout(tokens, weight, None, 0.1, "cpu"),
        lambda: dropout(linear(tokens, weight, None, "cpu"), 0.1, relu=True, impl="cpu"),
    ):
        with torch.profiler.profile(profile_memory=True) as profiled:
            function()
        sizes = [event.self_cpu_memory_usage for event in profiled.key_averages()]
        counted.append(sum(size for size in sizes if size > 0) // (64 * 4096 * 4))
    assert counted == [1, 2]


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_relu_and_dropout_give_what_is_wanted_alone(wanted, own):
    made = [torch.randn(5, 20), torch.randn(11, 20), torch.randn(11)]
    tensors = [t.requires_grad_(number in wanted) for number, t in enumerate(made)]
    linear_relu_dropout(*tensors, 0.0, "cpu").sum().backward()
    ours = [t.grad for t in tensors]
    for t in tensors:
        t.grad = None
    F.relu(F.linear(*tensors)).sum().backward()
    for number, (mine, tensor) in enumerate(zip(ours, tensors, strict=True)):
        assert (mine is not None) == (number in wanted)
        if mine is not None:
            torch.testing.assert_close(mine, tensor.grad)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_relu_and_dropout_of_many_gradients_at_once(own):
    tokens, weight = torch.randn(4, 20, requires_grad=True), torch.randn(11, 20, requires_grad=True)
    upstream = torch.randn(3, 4, 11)
    out = linear_relu_dropout(tokens, weight, None, 0.3, "cpu")
    many = torch.autograd.grad(out, (tokens, weight), upstream, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(out, (tokens, weight), one, retain_graph=True) for one in upstream]
    for ours, expected in zip(many, zip(*single, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.stack(expected))


def test_a_hook_on_the_first_layer_sees_the_product(own):
    """So ReLU and dropout are not in its place."""
    layer, seen = make().train().transformer.encoder.layers[0], []
    layer.linear1.register_forward_hook(lambda _, __, out: seen.append(out))
    tokens = torch.randn(2, 35, layer.linear1.in_features, requires_grad=True)
    layer.feed_forward(tokens).sum().backward()
    torch.testing.assert_close(seen[0], F.linear(tokens, layer.linear1.weight, layer.linear1.bias))
    assert (seen[0] < 0).any()


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
