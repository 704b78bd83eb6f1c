"""Every op under every tracer, mode, device and way of differentiating of torch: the right value, or a clear error."""

import pytest
import torch
from op_cases import KERNELS, NAMED_OPS, device_of, positional
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from uniad_fast import neighbor_masked_attention
from uniad_fast.ops.dispatch import IMPLS

NAME = pytest.mark.parametrize("name", NAMED_OPS)
KERNEL = pytest.mark.parametrize("impl", KERNELS)
# Stock PyTorch seeds its generators from a number, which no tracer knows: it is traced without dropout.
TRACED = [(impl, name) for impl in IMPLS for name in NAMED_OPS if impl != "torch" or name.endswith("without_dropout")]
IMPL_AND_NAME = pytest.mark.parametrize(("impl", "name"), TRACED)


@pytest.mark.parametrize("impl", [None, "reference"])
@NAME
def test_meta_tensors(impl, name):
    function, tensors = positional(name, impl)
    out = function(*(t.to("meta") for t in tensors))
    assert out.device.type == "meta" and out.shape == function(*tensors).shape


@KERNEL
def test_a_named_kernel_says_that_it_has_no_use_for_meta_tensors(impl):
    function, tensors = positional("attention", impl)
    with pytest.raises(ValueError, match="on meta"):
        function(*(t.to("meta") for t in tensors))


@IMPL_AND_NAME
def test_fake_tensors(impl, name):
    function, tensors = positional(name, impl)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        out = function(*(mode.from_tensor(t) for t in tensors))
    assert type(out).__name__ == "FakeTensor" and out.shape == function(*tensors).shape


@IMPL_AND_NAME
def test_make_fx(impl, name):
    function, tensors = positional(name, impl)
    graph = make_fx(function)(*tensors)
    other = [t + 1 for t in tensors]
    torch.testing.assert_close(graph(*other), function(*other))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(("impl", "name"), [pair for pair in TRACED if pair[0] in KERNELS])
def test_jit_trace(impl, name):
    """It was a graph of empty tensors."""
    function, tensors = positional(name, impl)
    traced = torch.jit.trace(function, tuple(tensors), check_trace=False)
    other = [t + 1 for t in tensors]
    torch.testing.assert_close(traced(*other), function(*other))


@IMPL_AND_NAME
def test_a_dispatch_mode_sees_an_operator(impl, name):
    seen = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    function, tensors = positional(name, impl)
    with Log():
        out = function(*tensors)
    torch.testing.assert_close(out, function(*tensors))
    assert any("uniad_fast" in name for name in seen) == (impl in KERNELS)


@pytest.mark.parametrize(("impl", "name"), [pair for pair in TRACED if pair[0] not in KERNELS])
def test_functionalize(impl, name):
    """The kernels refuse every transform of torch.func, this one too."""
    function, tensors = positional(name, impl)
    torch.testing.assert_close(torch.func.functionalize(function)(*tensors), function(*tensors))


def in_export(impl):
    class Net(torch.nn.Module):
        def forward(self, query, key, value):
            return neighbor_masked_attention(query, key, value, (5, 7), (3, 5), impl=impl)

    return Net()


@pytest.mark.parametrize("impl", IMPLS)
def test_what_export_leaves_behind(impl):
    """A mask made while exporting was kept, and was the exporter's stand-in in every later call."""
    net = in_export(impl)
    tensors = tuple(torch.randn(2, 2, 35, 16, device=device_of(impl)) for _ in range(3))
    expected = in_export("reference")(*tensors)
    for _ in range(2):
        program = torch.export.export(net, tensors)
        torch.testing.assert_close(program.module()(*tensors), expected)
        out = net(*tensors)
        assert type(out) is torch.Tensor
        torch.testing.assert_close(out, expected)


class Subclass(torch.Tensor):
    """Data in its own memory, as a class of the user's."""


class Wrapper(torch.Tensor):
    """A tensor without memory, which answers for every operator with what it wraps."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def unwrap(value):
            return value.inner if isinstance(value, Wrapper) else value

        args, kwargs = torch.utils._pytree.tree_map(unwrap, (args, kwargs or {}))
        return function(*args, **kwargs)


@KERNEL
@NAME
def test_tensors_of_a_users_class(impl, name):
    function, tensors = positional(name, impl)
    expected = function(*tensors)
    torch.testing.assert_close(
        function(*(t.as_subclass(Subclass) for t in tensors)).as_subclass(torch.Tensor), expected
    )
    torch.testing.assert_close(function(*map(Wrapper, tensors)), expected)


@pytest.mark.parametrize(
    "kind",
    [
        lambda t: t.to_sparse(),
        lambda t: torch.nested.nested_tensor(list(t)),
        lambda t: torch.nested.nested_tensor(list(t), layout=torch.jagged),
        lambda t: t.to_mkldnn() if torch.backends.mkldnn.is_available() else t.to_sparse(),
    ],
    ids=["sparse", "nested", "jagged", "mkldnn"],
)
@NAME
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_that_are_not_dense_are_refused(name, kind):
    function, (first, *rest) = positional(name, None)
    with pytest.raises(ValueError, match="must be a dense tensor"):
        function(kind(first), *rest)


@pytest.mark.parametrize("name", NAMED_OPS)
def test_stock_operations_refuse_a_seed_that_a_tracer_would_forget(name):
    function, tensors = positional(name, "torch")
    if name.endswith("without_dropout"):
        assert make_fx(function)(*tensors)(*tensors).shape == function(*tensors).shape
    else:
        with pytest.raises(ValueError, match="no tracer records"):
            make_fx(function)(*tensors)


def test_a_seed_restarts_the_generator_of_its_own_device_alone(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    function, tensors = positional("dropout", "torch")
    state = torch.get_rng_state()
    assert torch.equal(function(*tensors), function(*tensors)) and not seeded
    assert torch.equal(torch.get_rng_state(), state)
