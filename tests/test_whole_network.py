"""The whole network in one call: its numbers, every way of changing it, and when it must not be taken."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from uniad_fast.kernels.cpu import build, launch_reconstruct

from uniad_fast import UniAD
from uniad_fast.models import whole_network
from uniad_fast.testing import assert_within_budget

pytestmark = pytest.mark.skipif(build.problem() is not None, reason=f"no C++ kernels here: {build.problem()}")
GRID = (5, 7)
SMALL = dict(
    inplanes=[13],
    instrides=[4],
    feature_size=GRID,
    feature_jitter={"scale": 20.0, "prob": 1.0},
    neighbor_mask={"neighbor_size": (3, 3), "mask": [True, False, True]},
    hidden_dim=24,
    pos_embed_type="learned",
    save_recon=None,
    initializer={"method": "xavier_uniform"},
    nhead=3,
    num_encoder_layers=2,
    num_decoder_layers=2,
    dim_feedforward=31,
    impl="cpu",
)


def make(**changes):
    torch.manual_seed(0)
    model = UniAD(**{**SMALL, **changes}).eval()
    with torch.no_grad():  # biases and norms start at constants, which would hide a mistake
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tokens_for(model, batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    height, width = model.feature_size
    return torch.randn(batch, height * width, model.inplanes, generator=generator)


@torch.no_grad()
def whole(model, tokens):
    out = whole_network.reconstruct(model, tokens)
    assert out is not None, "the network went layer by layer"
    return out


@torch.no_grad()
def by_layers(model, tokens, dtype=torch.float32, impl="reference"):
    twin = copy.deepcopy(model).to(dtype)
    for module in twin.modules():
        if hasattr(module, "impl"):
            module.impl = impl
    return twin.reconstruct(tokens.to(dtype))


CASES = {
    "small": {},
    "no window": {"neighbor_mask": None},
    "one head": {"nhead": 1, "hidden_dim": 10},
    "two tokens": {"feature_size": (1, 2), "neighbor_mask": {"neighbor_size": (1, 1), "mask": [True] * 3}},
    "whole panels": {"feature_size": (8, 8), "inplanes": [32], "hidden_dim": 32, "nhead": 4, "dim_feedforward": 64},
    "half a panel more": {"feature_size": (8, 13)},
    "sine": {"pos_embed_type": "sine"},
    "encoder alone": {"num_decoder_layers": 0},
    "decoder alone": {"num_encoder_layers": 0},
    "paper": {
        "feature_size": (14, 14), "inplanes": [272], "hidden_dim": 256, "nhead": 8, "dim_feedforward": 1024,
        "neighbor_mask": {"neighbor_size": (7, 7), "mask": [True] * 3},
    },
}  # fmt: skip


@pytest.mark.parametrize("path", build.paths())
@pytest.mark.parametrize("case", CASES)
def test_every_instruction_set_within_budget(case, path, monkeypatch):
    monkeypatch.setattr(launch_reconstruct, "load", lambda: build.load(path))
    model = make(**CASES[case])
    tokens = tokens_for(model, 3)
    plain, truth = by_layers(model, tokens), by_layers(model, tokens, torch.float64)
    assert_within_budget(whole(model, tokens), truth, plain, f"{case} {path}")


@pytest.mark.parametrize("path", [path for path in build.paths() if path in ("amx", "avx512_bf16", "neon_bf16")])
@pytest.mark.parametrize("case", CASES)
def test_bfloat16_within_budget(case, path, monkeypatch):
    """Under autocast, by oneDNN's products and by the kernel's, against float64 of the same tokens and parameters."""
    monkeypatch.setattr(launch_reconstruct, "load", lambda: build.load(path))
    assert launch_reconstruct.has_pairs()
    model = make(**CASES[case])
    tokens = tokens_for(model, 2)
    truth = by_layers(model, tokens, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        ours, plain = whole(model, tokens), by_layers(model, tokens, impl="torch")
    assert ours.dtype == plain.dtype == torch.bfloat16
    assert_within_budget(ours, truth, plain, case)
    float32 = whole(model, tokens)
    assert not torch.equal(ours.float(), float32)  # it is another computation, not the same rounded


@pytest.mark.parametrize(("tiles", "pairs"), [(True, True), (False, True), (False, False)])
def test_bfloat16_by_pairs_of_vectors_is_whole_for_small_batches_alone(tiles, pairs, monkeypatch):
    monkeypatch.setattr(whole_network, "has_tiles", lambda: tiles)
    monkeypatch.setattr(whole_network, "has_pairs", lambda: pairs)
    model = make()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert whole_network.reconstruct(model, tokens_for(model, 1024 // 35)) is not None
        is_whole = whole_network.reconstruct(model, tokens_for(model, 1024 // 35 + 1)) is not None
    assert is_whole == (tiles or not pairs)


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("threads", [1, 2, 3, 16])
def test_an_image_is_what_it_is_alone_on_any_number_of_threads(batch, threads, bfloat16):
    if bfloat16 and not launch_reconstruct.has_tiles():
        pytest.skip("this processor has no tiles")
    model, before = make(), torch.get_num_threads()
    tokens = tokens_for(model, batch)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        alone = torch.cat([whole(model, tokens[i : i + 1]) for i in range(batch)])
        torch.set_num_threads(threads)
        try:
            assert torch.equal(whole(model, tokens), alone)
        finally:
            torch.set_num_threads(before)


def test_more_images_than_the_cache_holds_go_in_groups():
    model = make(feature_size=(20, 20), dim_feedforward=1024, hidden_dim=96, num_encoder_layers=1, num_decoder_layers=1)
    tokens = tokens_for(model, 9)
    for i in (0, 5, 8):
        assert torch.equal(whole(model, tokens)[i], whole(model, tokens[i : i + 1])[0])


def test_any_layout_of_the_tokens():
    model = make()
    tokens = tokens_for(model, 3)
    truth = whole(model, tokens)
    by_channel = tokens.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.full((3, GRID[0] * GRID[1], 40), torch.nan)
    wide[..., 3 : 3 + 13] = tokens
    reversed_batch = tokens.flip(0).contiguous().flip(0)
    for layout in (by_channel, wide[..., 3 : 3 + 13], reversed_batch):
        assert torch.equal(whole(model, layout), truth)
    assert torch.equal(whole(model, tokens[:1].expand(3, -1, -1)), truth[:1].expand(3, -1, -1))


def test_feature_maps_go_through_it():
    model = make()
    feature = torch.randn(2, 13, *GRID)
    with torch.no_grad():
        ours = model({"feature_align": feature})
    tokens = feature.flatten(2).transpose(1, 2)
    assert torch.equal(ours["feature_rec"].flatten(2).transpose(1, 2), whole(model, tokens))
    with torch.inference_mode():
        assert torch.equal(model({"feature_align": feature})["pred"], ours["pred"])


def test_every_parameter_counts_however_it_is_changed():
    model = make()
    tokens = tokens_for(model)
    whole(model, tokens)
    for name, parameter in model.named_parameters():
        before = whole(model, tokens)
        with torch.no_grad():
            parameter.data.numpy().ravel()[::3] += 0.3  # which torch does not count
        after = whole(model, tokens)
        assert not torch.equal(before, after), name
        torch.testing.assert_close(after, by_layers(model, tokens), rtol=1e-4, atol=1e-4, msg=name)
    other = make(initializer={"method": "normal", "std": 0.2})
    model.load_state_dict(other.state_dict())
    assert torch.equal(whole(model, tokens), whole(other, tokens))
    model.input_proj.weight = nn.Parameter(model.input_proj.weight.detach().t().contiguous().t() * 2)
    torch.testing.assert_close(whole(model, tokens), by_layers(model, tokens), rtol=1e-4, atol=1e-4)


def change_nothing(module, *_):
    return None


class Loud(torch.Tensor):
    """A class of tensors that may answer for its own operators."""


def with_a_tensor_of_another_class(model):
    norm = model.transformer.encoder.layers[0].norm1
    weight = norm.weight.detach().as_subclass(Loud)
    del norm.weight
    norm.weight = weight  # an attribute now, no parameter


DIFFERENT = {
    "a tensor of another class": with_a_tensor_of_another_class,
    "training": lambda m: m.train(),
    "dropout kept on": lambda m: m.transformer.encoder.layers[1].dropout.train(),
    "attention's dropout kept on": lambda m: m.transformer.decoder.layers[0].multihead_attn.train(),
    "hook": lambda m: m.transformer.decoder.layers[1].linear2.register_forward_hook(change_nothing),
    "hook on the norm": lambda m: m.transformer.decoder.norm.register_forward_pre_hook(change_nothing),
    "hook on the encoder": lambda m: m.transformer.encoder.register_forward_hook(change_nothing),
    "pruning": lambda m: prune.l1_unstructured(m.transformer.encoder.layers[0].self_attn.out_proj, "weight", 0.5),
    "another attention": lambda m: setattr(
        m.transformer.encoder.layers[0], "self_attn", nn.MultiheadAttention(24, 3, batch_first=True).eval()
    ),
    "another norm": lambda m: setattr(m.transformer.encoder.layers[0], "norm1", nn.Identity()),
    "a norm without weights": lambda m: setattr(
        m.transformer.encoder.layers[0], "norm1", nn.LayerNorm(24, elementwise_affine=False)
    ),
    "another activation": lambda m: setattr(m.transformer.encoder.layers[0], "activation", "gelu"),
    "another window's grid": lambda m: setattr(m.transformer.encoder.layers[0].self_attn, "feature_size", (7, 5)),
    "another width between": lambda m: setattr(m.transformer.encoder.layers[0], "linear1", nn.Linear(24, 30)),
    "a part of another impl": lambda m: setattr(m.transformer.encoder.layers[0].self_attn, "impl", "torch"),
    "another impl": lambda m: setattr(m, "impl", "torch"),
    "half precision": lambda m: m.bfloat16(),
    "one layer in double": lambda m: m.transformer.encoder.layers[0].norm1.double(),
    "a whole other decoder": lambda m: setattr(m.transformer, "decoder", nn.Identity()),
    "a capped table": lambda m: setattr(m.transformer.decoder.layers[0].learned_embed, "max_norm", 1.0),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_is_not_just_ours_goes_layer_by_layer(name):
    model = make()
    DIFFERENT[name](model)
    with torch.no_grad():
        assert whole_network.reconstruct(model, tokens_for(model)) is None


@pytest.mark.parametrize("changes", [{"normalize_before": True}, {"query_embedding": "first"}, {"activation": "gelu"}])
def test_other_architectures_go_layer_by_layer(changes):
    model = make(**changes)
    tokens = tokens_for(model)
    with torch.no_grad():
        assert whole_network.reconstruct(model, tokens) is None
        torch.testing.assert_close(model.reconstruct(tokens), by_layers(model, tokens), rtol=1e-4, atol=1e-4)


def test_gradients_autocast_tracers_and_other_tensors_go_layer_by_layer():
    model = make()
    tokens = tokens_for(model)
    assert whole_network.reconstruct(model, tokens) is None and model.reconstruct(tokens).requires_grad
    with torch.no_grad():
        for other in (tokens.double(), tokens.bfloat16(), tokens.to("meta"), tokens[:0], nn.Parameter(tokens)):
            assert whole_network.reconstruct(model, other) is None
        assert model.reconstruct(tokens[:0]).shape == (0, 35, 13)
        with torch.autocast("cpu", torch.float16):
            assert whole_network.reconstruct(model, tokens) is None
        exported = torch.export.export(model, ({"feature_align": torch.randn(2, 13, *GRID)},))
    assert not any("reconstruct" in str(node.target) for node in exported.graph.nodes)


def test_what_is_not_a_number_stays_in_its_image():
    model = make()
    tokens = tokens_for(model, 3)
    truth = whole(model, tokens)
    tokens[1, 4, 2] = torch.nan
    ours = whole(model, tokens)
    assert ours[1].isnan().any() and torch.equal(ours[[0, 2]], truth[[0, 2]])


def test_calls_from_several_threads_do_not_meet():
    model = make()
    inputs = [tokens_for(model, 2, seed) for seed in range(4)]
    expected = [whole(model, tokens) for tokens in inputs]
    wrong = []

    def work(which):
        for _ in range(20):
            if not torch.equal(whole(model, inputs[which]), expected[which]):
                wrong.append(which)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_wrong_shape_is_refused_as_layer_by_layer():
    model = make()
    with torch.no_grad(), pytest.raises((ValueError, RuntimeError)):
        model.reconstruct(torch.randn(2, 34, 13))
    with torch.no_grad(), pytest.raises((ValueError, RuntimeError)):
        model.reconstruct(torch.randn(2, 35, 12))
