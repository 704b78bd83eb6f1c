"""The transformer in training as one function: its numbers, what it follows, and when it must not be taken."""

import copy

import pytest
import torch
import torch.nn.functional as F
from op_cases import device_of
from torch import nn
from torch.nn.utils import parametrize

from bench.tools.seeds import drawn_singly
from uniad_fast import UniAD
from uniad_fast.models import training_function, training_pass, uniad
from uniad_fast.ops import noise
from uniad_fast.testing import assert_within_budget

GRID = (5, 6)


def build(**changes) -> UniAD:
    torch.manual_seed(0)
    options = dict(
        inplanes=[12], instrides=[4], feature_size=GRID, feature_jitter={"scale": 20.0, "prob": 1.0},
        neighbor_mask={"neighbor_size": (3, 3), "mask": [True, False, True]}, hidden_dim=32,
        pos_embed_type="learned", save_recon=None, initializer={"method": "xavier_uniform"}, nhead=2,
        num_encoder_layers=2, num_decoder_layers=3, dim_feedforward=48, dropout=0.1,
    )  # fmt: skip
    model = UniAD(**(options | changes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # biases too
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def tokens(batch=3) -> torch.Tensor:
    return torch.randn(batch, GRID[0] * GRID[1], 12, generator=torch.Generator().manual_seed(2))


def step(model, x, bfloat16=False, seed=4) -> list[torch.Tensor]:
    """The reconstruction, and every parameter's gradient."""
    torch.manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        out = model.reconstruct(x)
    return [out, *torch.autograd.grad(F.mse_loss(out.to(x.dtype), x), list(model.parameters()))]


@pytest.fixture(autouse=True)
def with_the_kernels_of_the_cpu(monkeypatch):
    """They compute the same, sooner than an interpreter."""
    monkeypatch.setattr(training_pass, "IMPLS", ("cpu", "triton"))


@pytest.fixture
def taken(monkeypatch) -> list:
    """Grows whenever the function is taken."""
    calls, apply = [], training_function.TransformerFunction.apply
    monkeypatch.setattr(training_function.TransformerFunction, "apply", lambda *a: (calls.append(len(a)), apply(*a))[1])
    return calls


@pytest.fixture
def by_layers(monkeypatch):
    """A step layer by layer."""

    def run(*arguments, **options):
        with monkeypatch.context() as patch:
            patch.setattr(uniad, "in_few_launches", lambda *_: None)
            return step(*arguments, **options)

    return run


SHAPES = [
    dict(), dict(dropout=0.0), dict(num_encoder_layers=0, num_decoder_layers=1), dict(pos_embed_type="sine"),
    dict(num_encoder_layers=1, num_decoder_layers=2, feature_jitter=None, neighbor_mask=None),
]  # fmt: skip


@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_numbers_are_the_definitions(options, taken, by_layers):
    """The noise too: seeds are those of layer by layer, and the generator ends where it does."""
    model, x = build(**options, impl="cpu"), tokens()
    ours, state = step(model, x), torch.get_rng_state()
    plain = by_layers(model, x)
    assert len(taken) == 1 and torch.equal(torch.get_rng_state(), state)
    truth = step(build(**options, impl="reference").double(), x.double())
    names = ["out", *(name for name, _ in model.named_parameters())]
    for name, mine, true, theirs in zip(names, ours, truth, plain, strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        assert_within_budget(mine, true, theirs, name)


@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_numbers_in_bfloat16_are_as_near_as_layer_by_layer(options, taken, by_layers):
    """In the median of draws: layers round as often, elsewhere, and one ReLU on the other side of 0 is a jump."""
    model, x, seeds = build(**options, impl="cpu"), tokens(), range(4, 9)
    truths = [step(build(**options, impl="reference").double(), x.double(), seed=seed) for seed in seeds]
    sides: list[list[torch.Tensor]] = []
    for run in (step, by_layers):
        found = [run(model, x, True, seed=seed) for seed in seeds]
        assert all(t.isfinite().all() for one in found for t in one)
        off = [[(a - b).abs().max() for a, b in zip(*pair, strict=True)] for pair in zip(found, truths, strict=True)]
        sides.append([torch.stack(each).median() for each in zip(*off, strict=True)])
    assert len(taken) == len(seeds)
    names = ["out", *(name for name, _ in model.named_parameters())]
    for name, true, mine, theirs in zip(names, truths[0], *sides, strict=True):
        assert mine <= 2 * theirs + 2.0**-6 * true.abs().max(), name


def test_a_step_of_the_triton_kernels(taken):
    pytest.importorskip("triton")
    small, device = dict(num_encoder_layers=1, num_decoder_layers=2), device_of("triton")
    ours, truth = (build(**small, impl=impl).to(device) for impl in ("triton", "reference"))
    x = tokens(2).to(device)
    with drawn_singly():
        ours = step(ours, x)
    truth = step(truth.double(), x.double())
    assert taken
    for mine, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine, true.float(), rtol=1e-3, atol=1e-4 * true.abs().max().item())


def change_nothing(_):
    pass


def hook(name):
    return lambda model: model.get_submodule(name).register_forward_hook(lambda *_: None)


def other(name, value):
    def change(model):
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, value)

    return change


class Same(nn.Module):
    def forward(self, weight):
        return weight


NOT_PLAIN = {
    **{f"hook on {name}": hook(name) for name, _ in build().transformer.named_modules(prefix="transformer")
       if not name.endswith("layers") and name != "transformer.decoder.norm"},
    "a parametrisation": lambda model: parametrize.register_parametrization(
        model.transformer.encoder.layers[0].self_attn, "in_proj_weight", Same()),
    "without a bias": other("transformer.encoder.layers.1.linear2.bias", None),
    "another layer": other("transformer.encoder.layers.1.linear2", nn.Sequential(nn.Linear(48, 32))),
    "a strided weight": lambda model: other(
        "transformer.encoder.layers.0.linear1.weight", nn.Parameter(torch.randn(32, 48).t()))(model),
    "stock PyTorch in one": other("transformer.decoder.layers.1.impl", "torch"),
    "evaluation": lambda model: model.eval(),
    "a layer in evaluation": lambda model: model.transformer.encoder.layers[0].eval(),
}  # fmt: skip


@pytest.mark.parametrize("change", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_what_is_not_plain_goes_layer_by_layer(change, taken):
    model = build(impl="cpu")
    change(model)
    model.reconstruct(tokens()).sum().backward()
    assert not taken


@pytest.mark.parametrize(
    "options", [dict(normalize_before=True), dict(activation="gelu"), dict(query_embedding="first"), dict(impl="torch")]
)
def test_other_networks_go_layer_by_layer(options, taken):
    build(**options).reconstruct(tokens()).sum().backward()
    assert not taken


def test_on_a_cpu_it_goes_layer_by_layer(taken, monkeypatch):
    monkeypatch.undo()
    out = build(impl="cpu").reconstruct(tokens())
    assert not isinstance(out.grad_fn, training_function.TransformerFunction)
    assert training_pass.IMPLS == ("triton",)


def test_under_a_mode_or_a_transform_it_goes_layer_by_layer(taken):
    from torch.utils.flop_counter import FlopCounterMode

    model = build(impl="cpu")
    with FlopCounterMode(display=False) as counted:
        model.reconstruct(tokens()).sum().backward()
    assert not taken and counted.get_total_flops() > 0
    with torch.no_grad():
        model.reconstruct(tokens())
    assert not taken


@pytest.mark.parametrize("bfloat16", [False, True])
def test_parameters_that_change_in_any_way_are_seen(bfloat16, taken):
    model, x = build(impl="cpu"), tokens()
    step(model, x, bfloat16)
    for write in (lambda p: p.data.mul_(1.5), lambda p: setattr(p, "data", p.data * 0.5), lambda p: p.detach().add_(1)):
        for parameter in model.parameters():
            write(parameter)
        fresh = build(impl="cpu")
        fresh.load_state_dict(copy.deepcopy(model.state_dict()))
        for mine, its in zip(step(model, x, bfloat16), step(fresh, x, bfloat16), strict=True):
            assert torch.equal(mine, its)
    assert len(taken) == 7


def test_a_parameter_written_to_before_the_backward_pass_is_noticed():
    model = build(impl="cpu")
    loss = model.reconstruct(tokens()).sum()
    with torch.no_grad():
        model.transformer.encoder.layers[0].linear1.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_second_way_back_gives_the_same_and_a_second_derivative_is_refused():
    model = build(impl="cpu")
    loss, parameters = model.reconstruct(tokens()).square().mean(), list(model.parameters())
    first, second = (torch.autograd.grad(loss, parameters, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    (gradient, *_) = torch.autograd.grad(loss, parameters, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_frozen_and_tied_parameters(taken, by_layers):
    model, x = build(impl="cpu"), tokens()
    first, second = model.transformer.encoder.layers
    second.linear1.weight = first.linear1.weight
    ours, plain = step(model, x), by_layers(model, x)
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())
    first.linear1.weight.requires_grad_(False)
    model.pos_embed.requires_grad_(False)
    model.reconstruct(x).sum().backward()
    assert first.linear1.weight.grad is None and model.pos_embed.row_embed.weight.grad is None
    assert second.linear2.weight.grad is not None and len(taken) == 2


def test_gradients_are_tensors_of_their_own():
    """Whoever writes to one, as clipping does, writes to no other."""
    model = build(impl="cpu")
    model.reconstruct(tokens()).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    before = [gradient.clone() for gradient in gradients]
    for i, gradient in enumerate(gradients):
        gradient.fill_(float(i))
        assert torch.equal(gradient, torch.full_like(gradient, float(i)))
    assert all((gradient == i).all() for i, gradient in enumerate(gradients))
    model.reconstruct(tokens()).sum().backward()  # added to what is there
    assert all(g.isfinite().all() for g in gradients) and all(b.isfinite().all() for b in before)


def test_one_image(taken, by_layers):
    """Whose shared queries are shared with nobody."""
    model, x = build(impl="cpu"), tokens(1)
    for mine, theirs in zip(step(model, x), by_layers(model, x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())
    assert len(taken) == 1


def test_a_part_of_a_batch_has_the_noise_of_the_whole(taken, monkeypatch):
    model, x = build(impl="cpu"), tokens(5)
    whole = step(model, x)[0]
    monkeypatch.setattr(noise, "_first_image", 2)
    part = step(model, x[2:])[0]
    torch.testing.assert_close(part, whole[2:], rtol=1e-5, atol=1e-5)
    assert len(taken) == 2
