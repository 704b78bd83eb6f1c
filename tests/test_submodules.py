"""What people do to the modules inside of a network counts: hooks, pruning, parametrisations, other layers in place."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from uniad_fast import UniAD

GRID = (3, 4)


def build(**options):
    defaults = dict(
        inplanes=[6], instrides=[2], feature_size=GRID, feature_jitter={"scale": 2.0, "prob": 1.0},
        neighbor_mask={"neighbor_size": (1, 1), "mask": [True] * 3}, hidden_dim=16, pos_embed_type="learned",
        save_recon=None, initializer={"method": "xavier_uniform"}, nhead=2, num_encoder_layers=2,
        num_decoder_layers=2, dim_feedforward=32, dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    return UniAD(**(defaults | options))


def run(model, seed=3, batch=2):
    torch.manual_seed(1)
    x = torch.randn(batch, 6, *GRID)
    torch.manual_seed(seed)
    return model({"feature_align": x})["feature_rec"]


def leaves(model):
    """Modules without children that hold parameters or draw, by name; the tables of queries are never called."""
    return {
        name: module for name, module in model.named_modules()
        if not list(module.children()) and "embed" not in name
    }  # fmt: skip


ALL = sorted(leaves(build()))
ATTENTIONS = [name for name, m in build().named_modules() if name.endswith("attn")]


@pytest.mark.parametrize("normalize_before", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu", "glu"])
@pytest.mark.parametrize("training", [False, True])
def test_forward_hooks_fire_and_change_nothing_by_being_there(normalize_before, activation, training):
    model = build(normalize_before=normalize_before, activation=activation).train(training)
    expected, seen = run(model), []
    for name in [*ALL, *ATTENTIONS]:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)
    assert set(seen) == {*ALL, *ATTENTIONS}, {*ALL, *ATTENTIONS} - set(seen)


@pytest.mark.parametrize("name", [*ALL, *ATTENTIONS])
def test_what_a_hook_returns_is_used(name):
    model = build().eval()
    expected = run(model)

    def change(module, args, out):
        slope = torch.linspace(0, 1, (out[0] if isinstance(out, tuple) else out).shape[-1])
        return (out[0] + slope, out[1]) if isinstance(out, tuple) else out + slope

    model.get_submodule(name).register_forward_hook(change)
    assert not torch.allclose(run(model), expected)


@pytest.mark.parametrize(
    "name", ["transformer.decoder.layers.0.linear1", "input_proj", "transformer.encoder.layers.1.norm2"]
)
def test_a_forward_of_the_users_own_and_global_hooks(name):
    model = build().eval()
    module, expected = model.get_submodule(name), run(model)
    forward = module.forward
    module.forward = lambda x: forward(x) * 2  # as accelerate and others do
    assert not torch.allclose(run(model), expected)
    del module.forward
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    torch.testing.assert_close(run(model), expected)
    handle.remove()
    assert {*map(id, map(model.get_submodule, [*ALL, *ATTENTIONS]))} <= {*map(id, seen)}


@pytest.mark.parametrize("name", [n for n in ALL if "norm" not in n and "dropout" not in n])
def test_pruning_trains_more_than_a_step(name):
    model = build()
    module = model.get_submodule(name)
    prune.random_unstructured(module, "weight", 0.5)
    zeros = module.weight == 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in range(3):
        optimizer.zero_grad()
        run(model, seed).square().mean().backward()
        optimizer.step()
    run(model)
    assert zeros.any() and (module.weight[zeros] == 0).all() and (module.weight != 0).any()


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("name", [n for n in ALL if "dropout" not in n])
def test_parametrised_weights_are_used(name):
    model, doubled = build().eval(), build().eval()
    parametrize.register_parametrization(model.get_submodule(name), "weight", Doubled())
    doubled.get_submodule(name).weight.data *= 2
    torch.testing.assert_close(run(model), run(doubled))


@pytest.mark.parametrize("name", ATTENTIONS)
def test_a_parametrised_projection_of_an_attention(name):
    model, doubled = build().eval(), build().eval()
    parametrize.register_parametrization(model.get_submodule(name), "in_proj_weight", Doubled())
    doubled.get_submodule(name).in_proj_weight.data *= 2
    for _ in range(2):
        torch.testing.assert_close(run(model), run(doubled))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:must run observer")
@pytest.mark.skipif(not torch.backends.quantized.supported_engines, reason="this torch can't quantise")
def test_dynamic_quantisation():
    model = build().eval()
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert "quantized" in type(quantized.input_proj).__module__
    difference = (run(quantized) - run(model)).abs().max()
    assert 0 < difference < 0.1 * run(model).abs().max()


class LowRank(nn.Module):
    """A linear layer with a trainable addition, as adapters put in a linear layer's place."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("training", [False, True])
def test_layers_put_in_place_of_others(training):
    model = build().train(training)
    for name in [n for n in ALL if isinstance(model.get_submodule(n), nn.Linear)]:
        model.set_submodule(name, LowRank(model.get_submodule(name)))
    run(model).sum().backward()
    assert all(m.up.weight.grad.abs().sum() > 0 for m in model.modules() if isinstance(m, LowRank))


@pytest.mark.parametrize("batch_first", [False, True])
def test_stock_attention_put_in_place_of_ours(batch_first):
    """Without a mask both compute the same, whichever order the stock one takes its tokens in."""
    model, stock = (build(neighbor_mask=None).eval() for _ in range(2))
    for name in ATTENTIONS:
        ours = stock.get_submodule(name)
        other = nn.MultiheadAttention(16, 2, batch_first=batch_first).eval()
        other.load_state_dict(ours.state_dict())
        stock.set_submodule(name, other)
    torch.testing.assert_close(run(stock), run(model))


def test_dropout_modules_have_modes_and_classes_of_their_own():
    """Monte Carlo dropout switches the dropout modules alone to training."""
    model = build(dropout=0.5).eval()
    first, second = run(model, 1), run(model, 2)
    assert torch.equal(first, second)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    assert not torch.allclose(run(model, 1), run(model, 2))
    model = build(dropout=0.5).train()
    for name in [n for n in ALL if n.endswith("dropout")]:
        model.set_submodule(name, nn.Identity())
    for name in ATTENTIONS:
        model.get_submodule(name).dropout = 0.0
    model.jitter_prob = 0.0
    torch.testing.assert_close(run(model, 1), run(model, 2))


def test_noise_comes_before_an_input_projection_that_has_to_be_called():
    """The very noise that the fused op draws."""
    model = build(feature_jitter={"scale": 20.0, "prob": 0.5}).train()
    expected = run(model)
    model.input_proj.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-4)


# --- parameters written to behind torch's back ----------------------------------------------------------------------


def through_data(p):
    p.data.mul_(1.5)


def through_numpy(p):
    p.detach().numpy()[...] *= 1.5


def by_new_data(p):
    for _ in range(2):  # twice: the second may lie where the first did
        p.data = p.data * 1.5**0.5


def in_place(p):
    with torch.no_grad():
        p.mul_(1.5)


@pytest.mark.parametrize("write", [through_data, through_numpy, by_new_data, in_place], ids=lambda f: f.__name__)
@pytest.mark.parametrize("normalize_before", [False, True])
def test_parameters_that_change_in_any_way_are_seen(write, normalize_before):
    model = build(normalize_before=normalize_before).eval()
    with torch.no_grad():
        run(model)
        for parameter in model.parameters():
            write(parameter)
        fresh = build(normalize_before=normalize_before).eval()
        fresh.load_state_dict(copy.deepcopy(model.state_dict()))
        assert torch.equal(run(model), run(fresh))


def test_the_learned_query_is_projected_once(monkeypatch):
    """In evaluation, that is; it is what the keeping is for."""
    model = build().eval()
    layer = model.transformer.decoder.layers[0]
    calls, project = [], type(layer.self_attn).project
    monkeypatch.setattr(type(layer.self_attn), "project", lambda self, *a: (calls.append(self), project(self, *a))[1])
    with torch.no_grad():
        run(model)
        first = calls.count(layer.self_attn)
        run(model)
    assert first == 1 and calls.count(layer.self_attn) == 1


def test_what_a_layer_does_before_its_attention_is_read_counts():
    """As sharding does, which gathers a layer's parameters just before it is called."""
    model, plain = build().eval(), build().eval()
    layer = model.transformer.decoder.layers[1]
    with torch.no_grad():
        layer.self_attn.in_proj_weight /= 3
        layer.register_forward_pre_hook(lambda *_: None if layer.self_attn.in_proj_weight.mul_(3) is not None else 0)
        layer.register_forward_hook(lambda *_: None if layer.self_attn.in_proj_weight.div_(3) is not None else 0)
        torch.testing.assert_close(run(model), run(plain))


@pytest.mark.parametrize("other", [dict(bias=False), dict(num_heads=4)])
def test_attentions_that_differ_within_a_decoder(other):
    from uniad_fast import NeighborMaskedAttention

    model = build().eval()
    options = dict(embed_dim=16, num_heads=2, feature_size=GRID, neighbor_size=(1, 1), batch_first=True) | other
    model.transformer.decoder.layers[1].self_attn = NeighborMaskedAttention(**options).eval()
    expected = copy.deepcopy(model)
    expected.transformer.decoder.layers[1].self_attn.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(run(model), run(expected))


def test_a_strided_bias():
    model, plain = build().eval(), build().eval()
    for m, make in ((model, lambda b: torch.stack([b, b + 9], 1)[:, 0]), (plain, torch.clone)):
        m.input_proj.bias = nn.Parameter(make(torch.linspace(0, 1, 16)))
    assert model.input_proj.bias.stride() == (2,)
    torch.testing.assert_close(run(model), run(plain))


def test_an_encoder_projects_query_and_key_in_one_product(monkeypatch):
    from uniad_fast.models import attention

    calls = []
    linear = attention.linear
    monkeypatch.setattr(attention, "linear", lambda *a: calls.append(a[1].shape) or linear(*a))
    run(build(num_decoder_layers=1).eval())  # with gradients, so layer by layer
    assert calls[:2] == [(32, 16), (16, 16)]  # query and key, value
