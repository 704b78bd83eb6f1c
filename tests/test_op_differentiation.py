"""Ways of differentiating that torch has: the right value, or an error that names the reason."""

import warnings

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from op_cases import KERNELS, NAMED_OPS, positional
from torch.utils._python_dispatch import TorchDispatchMode

from uniad_fast.ops.dispatch import IMPLS

NAME = pytest.mark.parametrize("name", NAMED_OPS)
KERNEL = pytest.mark.parametrize("impl", KERNELS)


@KERNEL
@NAME
def test_forward_mode_is_refused_by_name_and_served_by_stock_operations(impl, name):
    """The tangent was dropped without a word."""
    function, tensors = positional(name, impl)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, torch.ones_like(t)) for t in tensors]
        with pytest.raises(ValueError, match="no forward-mode derivative"):
            function(*duals)
    tangents = tuple(torch.ones_like(t) for t in tensors)
    with pytest.raises(ValueError, match="torch.func"):
        torch.func.jvp(function, tuple(tensors), tangents)


@pytest.mark.parametrize("name", [n for n in NAMED_OPS if not n.startswith("attention")])
def test_forward_mode_by_default(name):
    """Within stock operations' own dropout: where nothing is drawn, the definition's tangent."""
    function, tensors = positional(name, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out, tangent = torch.func.jvp(function, tuple(tensors), tuple(torch.ones_like(t) for t in tensors))
    assert out.shape == tangent.shape and tangent.abs().sum() > 0
    if name.endswith("without_dropout"):
        reference, _ = positional(name, "reference")
        _, expected = torch.func.jvp(reference, tuple(tensors), tuple(torch.ones_like(t) for t in tensors))
        torch.testing.assert_close(tangent, expected, rtol=1e-4, atol=1e-4)


@KERNEL
@NAME
def test_transforms_of_torch_func_are_refused_by_name(impl, name):
    function, tensors = positional(name, impl)
    with pytest.raises(ValueError, match="torch.func"):
        torch.vmap(function, randomness="same")(*(t[None] for t in tensors))
    with pytest.raises(ValueError, match="torch.func"):
        torch.func.grad(lambda *values: function(*values).sum())(*tensors)


@pytest.mark.parametrize("name", [n for n in NAMED_OPS if n.endswith("without_dropout")])
def test_transforms_of_torch_func_by_default(name):
    function, tensors = positional(name, None)
    definition, _ = positional(name, "reference")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = torch.func.grad(lambda *values: function(*values).square().sum())(*tensors)
        mapped = torch.vmap(function)(*(torch.stack([t, t + 1]) for t in tensors))
    expected = torch.func.grad(lambda *values: definition(*values).square().sum())(*tensors)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mapped[1], definition(*(t + 1 for t in tensors)), rtol=1e-4, atol=1e-4)


@KERNEL
@NAME
@pytest.mark.parametrize("traced", [False, True], ids=["eager", "under a mode"])
def test_a_second_derivative_is_refused(impl, name, traced):
    class Nothing(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    function, tensors = positional(name, impl)
    first = tensors[0].requires_grad_()
    if traced:
        with Nothing():
            out = function(first, *tensors[1:])
    else:
        out = function(first, *tensors[1:])
    (gradient,) = torch.autograd.grad(out.square().sum(), first, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|no autograd formula|twice"):
        gradient.square().sum().backward()


@KERNEL
@NAME
def test_gradients_through_the_operators_are_the_eager_ones(impl, name):
    """What torch.compile uses, by a mode that does nothing."""

    class Nothing(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    case = NAMED_OPS[name]
    tensors = {n: t.requires_grad_() for n, t in case.make(impl).items()}
    expected = case.run(impl, tensors)
    with Nothing():
        got = case.run(impl, tensors)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@NAME
def test_checkpointing_and_inference_mode(impl, name):
    from torch.utils.checkpoint import checkpoint

    case = NAMED_OPS[name]
    tensors = {n: t.requires_grad_() for n, t in case.make(impl).items()}
    expected = case.run(impl, tensors)
    out = checkpoint(lambda *values: case.call(impl, **dict(zip(tensors, values, strict=True))), *tensors.values(),
                     use_reentrant=False)  # fmt: skip
    weight = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
    got = [out, *torch.autograd.grad(out, list(tensors.values()), weight)]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    with torch.inference_mode():
        torch.testing.assert_close(case.call(impl, **tensors), expected[0])


@KERNEL
@NAME
def test_a_tangent_is_not_dropped_in_compiled_code(impl, name):
    function, tensors = positional(name, impl)

    def tangent(*values):
        return torch.func.jvp(function, values, tuple(torch.ones_like(t) for t in values))[1]

    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"forward-mode|torch\.func"):
        torch.compile(tangent, backend="eager")(*tensors)
