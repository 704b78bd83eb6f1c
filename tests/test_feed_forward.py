"""An FFN as one function: the bits of its parts, what it keeps, and who else may see what is inside."""

import pytest
import torch
import torch.nn.functional as F
from test_linear import narrow, own  # noqa: F401  fixtures, by name
from test_whole_network import make

from uniad_fast.ops.dropout import dropout
from uniad_fast.ops.feed_forward import feed_forward
from uniad_fast.ops.linear import linear
from uniad_fast.testing import assert_within_budget


def network(bias=True, ins=20, hidden=11, outs=6):
    shapes = [(hidden, ins), (hidden,), (outs, hidden), (outs,)]
    return [None if len(shape) == 1 and not bias else torch.randn(shape) for shape in shapes]


def apart(tokens, first, second, dropout_p, impl):
    noise = "cpu" if impl == "cpu" else "reference"  # which is the same
    return linear(dropout(linear(tokens, *first, impl), dropout_p, relu=True, impl=noise), *second, impl)


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
def test_an_ffn_in_one(dropout_p, bias):
    """The same bits as one after the other, gradients too, and nothing of the caller's is written to."""
    made = [torch.randn(2, 30, 20), *(t for t in network(bias) if t is not None)]
    upstream = torch.randn(2, 30, 6)

    def run(function):
        tokens, *parameters = tensors = [t.clone().requires_grad_() for t in made]
        layers = (parameters[:2], parameters[2:]) if bias else ([parameters[0], None], [parameters[1], None])
        torch.manual_seed(3)
        out = function(tokens, *layers, dropout_p, "cpu")
        gradients = torch.autograd.grad(out, tensors, upstream)
        assert all(torch.equal(a, b) for a, b in zip(tensors, made, strict=True))
        with torch.no_grad():
            torch.manual_seed(3)
            assert torch.equal(function(tokens, *layers, dropout_p, "cpu"), out)
        return [out, *gradients, torch.get_rng_state()]

    for ours, expected in zip(run(feed_forward), run(apart), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_an_ffn_under_autocast(dropout_p):
    made, upstream = [torch.randn(3, 70, 20), *network()], torch.randn(3, 70, 6).bfloat16()

    def run(function, dtype=torch.float32):
        tokens, *parameters = tensors = [t.to(dtype).requires_grad_() for t in made]
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            out = function(tokens, parameters[:2], parameters[2:], dropout_p)
        return [out, *torch.autograd.grad(out, tensors, upstream.to(out.dtype))]

    ours = run(lambda *a: feed_forward(*a, "cpu"))
    plain, truth = run(lambda *a: apart(*a, "torch")), run(lambda *a: apart(*a, "torch"), torch.float64)
    assert [t.dtype for t in ours] == [t.dtype for t in plain]
    for number, results in enumerate(zip(ours, truth, plain, strict=True)):
        assert_within_budget(*results, str(number))


@pytest.mark.usefixtures("own")
def test_an_ffn_keeps_one_tensor_of_the_hidden_width():
    tokens, parameters = torch.randn(64, 16), network(False, 16, 4096, 16)
    layers = [(weight.requires_grad_(), None) for weight in (parameters[0], parameters[2])]
    counted = []
    for function in (feed_forward, apart):
        with torch.profiler.profile(profile_memory=True) as profiled:
            function(tokens, *layers, 0.1, "cpu")
        sizes = [event.self_cpu_memory_usage for event in profiled.key_averages()]
        counted.append(sum(size for size in sizes if size > 0) // (64 * 4096 * 4))
    assert counted == [1, 2]


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (4,), (0, 2), (1, 4), (2, 3), (0, 1, 2, 3, 4)], ids=str)
def test_an_ffn_gives_what_is_wanted_alone(wanted):
    made = [torch.randn(5, 20), *network()]
    tensors = [t.requires_grad_(number in wanted) for number, t in enumerate(made)]
    feed_forward(tensors[0], tensors[1:3], tensors[3:], 0.0, "cpu").sum().backward()
    ours = [t.grad for t in tensors]
    for t in tensors:
        t.grad = None
    F.linear(F.relu(F.linear(*tensors[:3])), *tensors[3:]).sum().backward()
    for number, (mine, tensor) in enumerate(zip(ours, tensors, strict=True)):
        assert (mine is not None) == (number in wanted)
        if mine is not None:
            torch.testing.assert_close(mine, tensor.grad)


@pytest.mark.usefixtures("own")
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.usefixtures("narrow")
def test_gradients_of_an_ffn_of_many_at_once_under_autocast():
    parameters = [t.requires_grad_() for t in network()]
    tokens, upstream = torch.randn(40, 20, requires_grad=True), torch.randn(3, 40, 6).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = feed_forward(tokens, parameters[:2], parameters[2:], 0.3, "cpu")
    tensors = (tokens, *parameters)
    many = torch.autograd.grad(out, tensors, upstream, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(out, tensors, one, retain_graph=True) for one in upstream]
    for ours, expected in zip(many, zip(*single, strict=True), strict=True):
        assert (ours - torch.stack(expected)).float().norm() < 0.02 * ours.float().norm()


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(("ins", "hidden", "outs"), [(20, 11, 0), (20, 0, 6), (0, 11, 6)])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_width_of_nothing_is_torchs(ins, hidden, outs, autocast):
    (first, bias, second, _), tokens = network(True, ins, hidden, outs), torch.randn(40, ins)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = feed_forward(tokens, (first, bias), (second, None), 0.0, "cpu")
        torch.testing.assert_close(ours, F.linear(F.relu(F.linear(tokens, first, bias)), second))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_of_an_ffn_of_many_at_once():
    parameters = [t.requires_grad_() for t in network()]
    tokens, upstream = torch.randn(4, 20, requires_grad=True), torch.randn(3, 4, 6)
    out = feed_forward(tokens, parameters[:2], parameters[2:], 0.3, "cpu")
    tensors = (tokens, *parameters)
    many = torch.autograd.grad(out, tensors, upstream, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(out, tensors, one, retain_graph=True) for one in upstream]
    for ours, expected in zip(many, zip(*single, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.stack(expected))


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("second", [(6, 12), (12,)], ids=str)
def test_a_second_layer_that_does_not_fit_is_torchs_to_refuse(second):
    parameters = network()
    with pytest.raises(RuntimeError, match="mat1 and mat2|size mismatch"):
        feed_forward(torch.randn(5, 20), parameters[:2], (torch.randn(second), None), 0.0, "cpu")


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("hooked", ["linear1", "linear2"])
def test_a_hook_on_a_layer_of_the_ffn_sees_its_product(hooked):
    """So the FFN is not in one."""
    layer, seen = make().train().transformer.encoder.layers[0], []
    getattr(layer, hooked).register_forward_hook(lambda module, given, out: seen.append((module, *given, out)))
    tokens = torch.randn(2, 35, layer.linear1.in_features, requires_grad=True)
    layer.feed_forward(tokens).sum().backward()
    module, given, out = seen[0]
    torch.testing.assert_close(out, F.linear(given, module.weight, module.bias))
    assert (out < 0).any() and (hooked == "linear1" or (given >= 0).all())
