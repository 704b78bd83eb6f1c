"""Every argument of every op in every memory layout, and what the ops give back: memory of its own."""

import gc

import pytest
import torch
from op_cases import KERNELS, LINEAR, NAMED_OPS, device_of, layouts

from uniad_fast.ops.dispatch import IMPLS

# It is slow; dropout changes nothing about memory, and launchers take strides of one axis as they take another's.
_IN_THE_INTERPRETER = {
    "attention": ("negated",),
    "attention_without_dropout": ("every second along 3", "every second along 2", "expanded along 3", "transposed"),
}
ARGUMENTS = [(name, argument) for name, case in NAMED_OPS.items() for argument in case.shapes]


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_every_argument_in_every_layout(impl, name, argument):
    """Forward and gradients are those of the same values in a row. What lies between the values is NaN."""
    case = NAMED_OPS[name]
    plain = case.make(impl)
    for layout, tensor in layouts(plain[argument]):
        assert tensor.shape == plain[argument].shape
        if impl == "triton" and name.startswith("attention") and layout not in _IN_THE_INTERPRETER[name]:
            continue
        tensors = plain | {argument: tensor}
        for values in ({n: t.detach().requires_grad_(t._base is None) for n, t in tensors.items()}, tensors):
            expected = case.run(impl, {n: t.contiguous().clone().resolve_neg() for n, t in values.items()})[0]
            out, *gradients = case.run(impl, values)
            torch.testing.assert_close(out, expected, rtol=0, atol=0, msg=f"{argument} {layout}")
            leaves = {n: t.detach().clone().requires_grad_(t.requires_grad) for n, t in values.items()}
            torch.testing.assert_close(gradients, case.run(impl, leaves)[1:], rtol=0, atol=0)


@pytest.mark.parametrize("argument", LINEAR.shapes)
def test_every_argument_of_a_linear_layer_in_every_layout(argument):
    plain = LINEAR.make()
    for layout, tensor in layouts(plain[argument]):
        tensors = plain | {argument: tensor}
        out = LINEAR.call("cpu", **tensors)
        torch.testing.assert_close(out, torch.nn.functional.linear(*tensors.values()), msg=f"{argument} {layout}")


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("name", NAMED_OPS)
def test_the_gradient_that_comes_in_may_lie_anyhow(impl, name):
    case = NAMED_OPS[name]
    tensors = {n: t.requires_grad_() for n, t in case.make(impl).items()}
    out = case.call(impl, **tensors)
    gradient = torch.randn(out.shape).to(out)
    for layout, tensor in layouts(gradient):
        got = torch.autograd.grad(out, list(tensors.values()), tensor, retain_graph=True)
        plain = torch.autograd.grad(out, list(tensors.values()), tensor.clone().resolve_neg(), retain_graph=True)
        torch.testing.assert_close(got, plain, rtol=0, atol=0, msg=f"gradient {layout}")


@pytest.mark.parametrize(
    ("name", "argument", "make"),
    [
        ("norm", "weight", lambda: torch.randn(64, 2)[:, 0]),
        ("norm", "bias", lambda: torch.zeros(1).expand(64)),
        ("jitter", "bias", lambda: torch.randn(20, 2)[:, 0]),
        ("jitter", "weight", lambda: torch.randn(24, 20).T),
    ],
)
def test_a_copy_made_for_a_kernel_lives_until_it_returns(name, argument, make):
    """Copies were freed before the kernel read them; other tensors of their size then took their place."""
    case = NAMED_OPS[name]
    tensors = case.make() | {argument: make()}
    gc.collect()
    for _ in range(20):
        torch.testing.assert_close(case.call("cpu", **tensors), case.call("reference", **tensors), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", NAMED_OPS)
def test_no_two_gradients_share_memory(impl, name):
    """Whoever gets a gradient may add to it in place: autograd does, to a leaf's. Two may lie side by side."""
    case = NAMED_OPS[name]
    tensors = {n: t.requires_grad_() for n, t in case.make(impl).items()}
    once = case.run(impl, tensors)[1:]
    found = [g.clone() for g in once]
    for number, gradient in enumerate(once):
        gradient.fill_(number)
    assert all((gradient == number).all() for number, gradient in enumerate(once))
    for _ in range(2):
        out = case.call(impl, **tensors)
        out.backward(torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out))
    for tensor, gradient in zip(tensors.values(), found, strict=True):
        torch.testing.assert_close(tensor.grad, 2 * gradient)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", NAMED_OPS)
def test_inputs_are_left_as_they_are(impl, name):
    case = NAMED_OPS[name]
    tensors = {n: t.requires_grad_() for n, t in case.make(impl).items()}
    before = {n: t.detach().clone() for n, t in tensors.items()}
    case.run(impl, tensors)
    assert all(torch.equal(t, before[n]) for n, t in tensors.items())


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("name", NAMED_OPS)
def test_torchs_default_dtype_and_device_do_not_matter(impl, name):
    case = NAMED_OPS[name]
    tensors = {n: t.requires_grad_() for n, t in case.make(impl).items()}
    expected = case.run(impl, tensors)
    try:
        torch.set_default_dtype(torch.float64)
        wide = case.run(impl, tensors)
        torch.set_default_device("meta")
        elsewhere = case.call(impl, **tensors)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(wide, expected, strict=True))
    assert elsewhere.device.type == device_of(impl).type and torch.equal(elsewhere, expected[0])
