"""UniAD: the public code's names, shapes and numbers; its options; what is computed once."""

import copy
import itertools
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from uniad_fast import UniAD
from uniad_fast.detect.reconstructions import save_reconstructions
from uniad_fast.testing import PublicUniAD

GRID = (5, 6)
DEFAULTS = dict(
    inplanes=[12],
    instrides=[4],
    feature_size=GRID,
    feature_jitter={"scale": 20.0, "prob": 1.0},
    neighbor_mask={"neighbor_size": (3, 3), "mask": [True, True, True]},
    hidden_dim=16,
    pos_embed_type="learned",
    save_recon=None,
    initializer={"method": "xavier_uniform"},
    nhead=4,
    num_encoder_layers=2,
    num_decoder_layers=2,
    dim_feedforward=32,
)


def build(**changes) -> UniAD:
    return UniAD(**{**DEFAULTS, **changes})


def feature(batch=3, channels=12):
    return torch.randn(batch, channels, *GRID)


def public_twin(model: UniAD, dropout: float) -> PublicUniAD:
    twin = PublicUniAD(12, 4, GRID, (3, 3), 0.0, hidden_dim=16, nhead=4, layers=2, dim_feedforward=32, dropout=dropout)
    twin.load_state_dict(model.state_dict())
    return twin


def test_numbers_and_gradients_are_the_public_ones():
    model = build(dropout=0.0, feature_jitter=None)
    twin = public_twin(model, 0.0)
    x = feature()
    gradients = []
    for network in (model, twin):
        out = network({"feature_align": x})
        loss = nn.functional.mse_loss(out["feature_rec"], x) + out["pred"].mean()
        names, parameters = zip(*sorted(network.named_parameters()), strict=True)
        gradients.append((names, out["feature_rec"], out["pred"], torch.autograd.grad(loss, parameters)))
    ours, theirs = gradients
    assert ours[0] == theirs[0]
    for mine, other in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
    assert ours[2].shape == (3, 1, 20, 24)


def test_state_dict_names_and_shapes():
    """Spelled out from the published checkpoint's layout, hidden 256 at 14 x 14."""
    model = UniAD([272], [16], (14, 14), None, None, 256, "learned", None, None, 8, 1, 1, 1024)
    mha = {"in_proj_weight": (768, 256), "in_proj_bias": (768,), "out_proj.weight": (256, 256), "out_proj.bias": (256,)}
    ffn = {
        "linear1.weight": (1024, 256),
        "linear1.bias": (1024,),
        "linear2.weight": (256, 1024),
        "linear2.bias": (256,),
    }
    expected = {
        "pos_embed.row_embed.weight": (14, 128),
        "pos_embed.col_embed.weight": (14, 128),
        "input_proj.weight": (256, 272),
        "input_proj.bias": (256,),
        "output_proj.weight": (272, 256),
        "output_proj.bias": (272,),
        "transformer.decoder.norm.weight": (256,),
        "transformer.decoder.norm.bias": (256,),
        "transformer.decoder.layers.0.learned_embed.weight": (196, 256),
    }
    for part, attentions, norms in (("encoder", ["self_attn"], 2), ("decoder", ["self_attn", "multihead_attn"], 3)):
        prefix = f"transformer.{part}.layers.0."
        expected |= {f"{prefix}{attention}.{k}": v for attention in attentions for k, v in mha.items()}
        expected |= {prefix + k: v for k, v in ffn.items()}
        expected |= {f"{prefix}norm{n}.{k}": (256,) for n in range(1, norms + 1) for k in ("weight", "bias")}
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == expected
    assert "transformer.encoder.norm.weight" in build(normalize_before=True).state_dict()


@pytest.mark.parametrize("normalize_before", [False, True], ids=["post_norm", "pre_norm"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "glu"])
@pytest.mark.parametrize("pos_embed_type", ["learned", "sine"])
def test_every_variant_trains(normalize_before, activation, pos_embed_type):
    model = build(normalize_before=normalize_before, activation=activation, pos_embed_type=pos_embed_type)
    model({"feature_align": feature()})["feature_rec"].square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=3)), ids=str)
def test_mask_flags_reach_their_attention(flags):
    model = build(neighbor_mask=SimpleNamespace(neighbor_size=[3, 3], mask=list(flags)))
    encoder, decoder = model.transformer.encoder.layers[0], model.transformer.decoder.layers[0]
    windows = [a.neighbor_size for a in (encoder.self_attn, decoder.self_attn, decoder.multihead_attn)]
    assert windows == [(3, 3) if flag else None for flag in flags]


def test_jitter_in_training_only_and_against_the_clean_feature():
    model = build(dropout=0.0)
    x = feature()
    first, second = (model({"feature_align": x}) for _ in range(2))
    assert not torch.equal(first["feature_rec"], second["feature_rec"])
    assert first["feature_align"] is x
    model.eval()
    assert torch.equal(model({"feature_align": x})["pred"], model({"feature_align": x})["pred"])
    calm = build(dropout=0.0, feature_jitter=SimpleNamespace(scale=20.0, prob=0.0))
    assert torch.equal(calm({"feature_align": x})["pred"], calm({"feature_align": x})["pred"])


def test_learned_queries_are_projected_once_in_evaluation_and_once_a_step_in_training():
    model = build()
    calls = []
    layer = model.transformer.decoder.layers[0]
    project = layer.self_attn.project
    layer.self_attn.project = lambda tokens, *which: calls.append(tokens.shape) or project(tokens, *which)
    handle = layer.linear1.register_forward_hook(lambda *_: None)  # layer by layer, then
    model({"feature_align": feature()})
    assert calls == [(1, 30, 16)]
    handle.remove()
    model.eval()
    calls.clear()
    with torch.inference_mode():
        outs = [model({"feature_align": feature()})["feature_rec"] for _ in range(3)]
    assert len(calls) == 1 and len(outs) == 3


def change_by_optimizer(model):
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(model.parameters(), lr=0.1).step()


@pytest.mark.parametrize(
    "change",
    [
        change_by_optimizer,
        lambda model: model.load_state_dict(build(initializer=None).state_dict()),
        lambda model: model.double().float(),
        lambda model: (model.pos_embed.row_embed.weight.data.add_(1), model.eval()),
    ],
    ids=["optimizer", "load_state_dict", "to_and_back", "data_then_eval"],
)
def test_what_is_kept_in_evaluation_follows_the_parameters(change):
    model = build().eval()
    x = feature()
    with torch.no_grad():
        before = model({"feature_align": x})["feature_rec"]
        change(model)
        after = model({"feature_align": x})["feature_rec"]
    fresh = build().eval()
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(after, fresh({"feature_align": x})["feature_rec"])
    if "double" not in str(change.__code__.co_names):
        assert not torch.allclose(before, after)


def test_kept_values_do_not_stop_later_training_or_copying():
    model = build(dropout=0.0).eval()
    with torch.inference_mode():
        model({"feature_align": feature()})
    model({"feature_align": feature()})["pred"].sum().backward()  # gradients in evaluation mode
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    x = feature()
    with torch.no_grad():
        torch.testing.assert_close(twin({"feature_align": x}), model({"feature_align": x}))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert model({"feature_align": x})["feature_rec"].dtype == torch.bfloat16


def test_sine_position_is_detrs():
    """Row half first, positions from 1, normalised to 2 pi."""
    import math

    position = build(pos_embed_type="sine").pos_embed()
    assert position.shape == (30, 16)
    row, col = 3, 4
    for channel in range(8):
        for half, (index, count) in enumerate(((row, 5), (col, 6))):
            angle = (index + 1) / (count + 1e-6) * 2 * math.pi / 10_000 ** (2 * (channel // 2) / 8)
            expected = math.cos(angle) if channel % 2 else math.sin(angle)
            assert position[row * 6 + col, half * 8 + channel].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("method", "spread"),
    [
        ("normal", 0.01),
        ("xavier_normal", (2 / (16 + 32)) ** 0.5),
        ("xavier_uniform", (2 / (16 + 32)) ** 0.5),
        ("msra_normal", (1 / 16) ** 0.5),
        ("kaiming_uniform", (1 / 16) ** 0.5),
    ],
)
def test_initializers(method, spread):
    layer = build(initializer={"method": method})
    encoder = layer.transformer.encoder.layers[0]
    assert encoder.linear1.weight.std().item() == pytest.approx(spread, rel=0.2)
    assert (encoder.linear1.bias == 0).all() and (encoder.self_attn.out_proj.bias == 0).all()
    queries = layer.transformer.decoder.layers[0].learned_embed.weight
    assert queries.std().item() == pytest.approx(1, rel=0.15)  # untouched: N(0, 1)
    rows = layer.pos_embed.row_embed.weight
    assert rows.min() >= 0 and rows.max() <= 1 and rows.mean().item() == pytest.approx(0.5, abs=0.15)


def test_save_reconstructions_lays_files_out_as_the_public_code(tmp_path):
    recs = torch.randn(2, 12, *GRID)
    save_reconstructions(recs, ["cup", "pen"], ["cup/test/good/001.png", "a/b/crack/7.x.jpg"], tmp_path)
    np.testing.assert_array_equal(np.load(tmp_path / "cup/good/001.npy"), recs[0].numpy())
    np.testing.assert_array_equal(np.load(tmp_path / "pen/crack/7.x.npy"), recs[1].numpy())
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["001.npy", "7.x.npy"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(neighbor_mask={"neighbor_size": (5, 7), "mask": [True] * 3}), r"\(5, 7\) covers the whole grid \(5, 6\)"),
        (dict(neighbor_mask={"neighbor_size": (3, 3), "mask": [True]}), "3 flags"),
        (dict(inplanes=[12, 24]), r"\[12, 24\]"),
        (dict(pos_embed_type="rotary"), "'rotary'"),
        (dict(initializer={"method": "orthogonal"}), "'orthogonal'"),
        (dict(activation="silu"), "'silu'"),
        (dict(hidden_dim=15), "15"),
        (dict(impl="fastest"), "'fastest'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_construction_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


@pytest.mark.parametrize("shape", [(3, 13, 5, 6), (3, 12, 6, 5), (12, 5, 6)], ids=str)
def test_bad_feature_is_named(shape):
    with pytest.raises(ValueError, match=r"feature_align must be \[B, 12, 5, 6\]"):
        build()({"feature_align": torch.zeros(shape)})


@pytest.mark.parametrize("query_embedding", ["every", "first", "none"])
def test_query_embedding_is_where_it_says(query_embedding):
    """The other options hold with each of them: masks act, and the learned queries move what comes out."""
    model = build(query_embedding=query_embedding, dropout=0.0, feature_jitter=None)
    names = [name for name, _ in model.named_parameters() if "learned_embed" in name]
    assert len(names) == {"every": 2, "first": 1, "none": 0}[query_embedding]
    x = feature()
    out = model({"feature_align": x})["feature_rec"]
    full = build(query_embedding=query_embedding, dropout=0.0, feature_jitter=None, neighbor_mask=None)
    full.load_state_dict(model.state_dict())
    assert not torch.allclose(full({"feature_align": x})["feature_rec"], out)
    nn.functional.mse_loss(out, x).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_query_embedding_of_another_kind_is_named():
    with pytest.raises(ValueError, match="query_embedding must be one of every, first, none, got 'last'"):
        build(query_embedding="last")
