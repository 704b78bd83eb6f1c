"""Choices that no other test would miss: each of these was broken once without one failing."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import BACKBONE
from PIL import Image
from torch import nn

from uniad_fast import AnomalyDetector
from uniad_fast.data.images import to_tensor
from uniad_fast.detect import fit_scores, learning
from uniad_fast.detect.fitting import UnseenMaps
from uniad_fast.detect.pipeline import to_maps
from uniad_fast.models.backbone import Backbone
from uniad_fast.models.layers import Layer, LayerOptions
from uniad_fast.training.build import build_model
from uniad_fast.training.loop import optimization, train
from uniad_fast.training.recipes import FAST
from uniad_fast.training.reconstruction_loss import ReconstructionLoss, channel_statistics
from uniad_fast.training.run_files import RunFiles


@pytest.mark.parametrize("normalize_before", [False, True])
def test_what_a_residual_connection_adds(normalize_before):
    layer = Layer(6, LayerOptions(8, 0.0, "relu", normalize_before), "reference").eval()
    norm, tokens, block = nn.LayerNorm(6), 3 + 5 * torch.randn(2, 4, 6), nn.Linear(6, 6)
    nn.init.normal_(norm.weight)
    expected = tokens + block(norm(tokens)) if normalize_before else norm(tokens + block(tokens))
    torch.testing.assert_close(layer.residual(norm, tokens, block), expected)


@pytest.mark.parametrize(("name", "function"), [("relu", F.relu), ("gelu", F.gelu), ("glu", F.glu)])
def test_activations(name, function):
    layer = Layer(6, LayerOptions(8, 0.0, name, False), "reference").eval()
    x = torch.randn(2, 4, 6)
    torch.testing.assert_close(layer.feed_forward(x), layer.linear2(function(layer.linear1(x))))


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def reconstruct(self, tokens):
        return self.linear(tokens)


def step(tmp_path, **changes):
    """How far one epoch moves the parameters."""
    torch.manual_seed(0)
    model, recipe = (
        Line(),
        replace(FAST, epochs=1, min_steps=0, batch_size=2, optimizer="adamw", precision="float32", **changes),
    )
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    tokens = np.random.default_rng(0).normal(size=(4, 2, 3)).astype(np.float32)
    train(
        ReconstructionLoss(model, torch.zeros(3), torch.ones(3), optimization.loss(recipe)),
        tokens,
        recipe,
        0,
        RunFiles(tmp_path, {}, quiet=True),
    )
    return (torch.cat([p.detach().flatten() for p in model.parameters()]) - before).abs().max().item()


def test_gradients_are_clipped(tmp_path):
    """AdamW knows no size of a gradient but by its epsilon: clipped far below that, hardly anything moves."""
    assert step(tmp_path, clip=1e-12) < 0.01 * step(tmp_path, clip=1.0)


def test_weights_decay(tmp_path):
    assert step(tmp_path, clip=1e-15, weight_decay=100.0) > 100 * step(tmp_path, clip=1e-15, weight_decay=0.0)
    for name in ("adamw", "muon"):
        if name == "muon" and not hasattr(torch.optim, "Muon"):
            continue
        recipe = replace(FAST, optimizer=name, weight_decay=0.125)
        model = build_model(6, 16, (4, 4), recipe)
        groups = [group for optimizer in optimization.optimizers(model, recipe) for group in optimizer.param_groups]
        assert all(group["weight_decay"] == 0.125 for group in groups)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_muon_takes_the_matrices_between_hidden_layers_alone():
    recipe = replace(FAST, optimizer="muon")
    model = build_model(6, 16, (4, 4), recipe)
    name_of = {id(p): name for name, p in model.named_parameters()}
    muon, adamw = optimization.optimizers(model, recipe)
    taken = {name_of[id(p)] for group in muon.param_groups for p in group["params"]}
    rest = {name_of[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert taken | rest == set(name_of.values()) and not taken & rest
    assert all(
        name.endswith(("in_proj_weight", "out_proj.weight", "linear1.weight", "linear2.weight")) for name in taken
    )
    assert {n for n in rest if "embed" in n or n.startswith(("input_proj", "output_proj"))} and len(taken) == 40


def test_queries_start_as_wide_as_the_recipe_says():
    for std in (0.02, 0.5):
        model = build_model(6, 16, (8, 8), replace(FAST, query_std=std))
        embed = model.transformer.decoder.layers[0].learned_embed.weight
        assert embed.std().item() == pytest.approx(std, rel=0.05)


@pytest.fixture(scope="module")
def fitted(made_up_classes, backbone_weights, tmp_path_factory):
    """(detector that cross-fits nothing, tokens trained on, tokens that set the threshold)."""
    seen = {}
    patch = pytest.MonkeyPatch()
    for module, name in ((learning, "train_pipeline"), (fit_scores, "calibrated_by")):
        function = getattr(module, name)

        def note(*args, _name=name, _function=function, **options):
            seen[_name] = np.array(args[1])
            return _function(*args, **options)

        patch.setattr(module, name, note)
    recipe = replace(FAST, epochs=1, min_steps=0)
    cache = tmp_path_factory.mktemp("c")
    options = dict(backbone_weights=backbone_weights, recipe=recipe, residual_score="whitened", cache_dir=cache)
    detector = AnomalyDetector(BACKBONE, 64, **options).fit(made_up_classes, quiet=True)
    patch.undo()
    return detector, seen["train_pipeline"], seen["calibrated_by"]


def test_features_are_standardised(fitted):
    detector, tokens, _ = fitted
    mean, std = channel_statistics(tokens)
    torch.testing.assert_close(detector.pipeline.mean.cpu(), mean)
    torch.testing.assert_close(detector.pipeline.std.cpu(), std)
    assert (mean.abs() > 1e-3).any() and ((std - 1).abs() > 1e-3).any()


def test_no_image_is_trained_on_and_sets_the_threshold(fitted):
    _, tokens, held_out = fitted
    assert len(tokens) + len(held_out) == 40 and len(held_out) == 5
    assert not {row.tobytes() for row in tokens} & {row.tobytes() for row in held_out}


def test_colours_go_twice_as_far_as_good_pixels_do(fitted):
    detector, _, held_out = fitted
    calibration = detector.calibration
    assert calibration.images == (1, 1, 1, 1, 1, 5)
    raw = to_maps(detector.pipeline.score_maps(torch.from_numpy(held_out)), 64).numpy()
    typical, high = np.quantile([calibration.of_map(one, k) for k, one in enumerate(raw)], (0.5, 0.999))
    assert calibration.color_range == pytest.approx((typical, typical + 2 * (high - typical)), rel=1e-3)


def test_images_that_a_network_knows_by_heart_set_no_threshold():
    """Held-out images that score higher than those trained on, class by class, alone tell what new images will have."""
    rng = np.random.default_rng(0)

    def maps(shift):
        rows = np.arange(60)
        scores = rng.normal(10, 1, (60, 2, 2)) + shift * (rows >= 48)[:, None, None]
        return [UnseenMaps(rows, torch.from_numpy(scores))]

    assert not any(fit_scores._learnt_by_heart(maps(0.0), 48) for _ in range(50))
    assert fit_scores._learnt_by_heart(maps(3.0), 48)
    assert not fit_scores._learnt_by_heart(maps(-3.0), 48)
    assert not fit_scores._learnt_by_heart(maps(3.0), 60)  # nothing is held out


def test_a_cache_key_holds_everything_that_changes_features(backbone_weights):
    def fingerprint(name=BACKBONE, **options):
        frozen = Backbone.pretrained(name, 64, backbone_weights, **options)
        return frozen, frozen.fingerprint()

    plain, first = fingerprint()
    state = plain.features.state_dict()
    others = [
        Backbone.from_state(BACKBONE, 64, plain.out_indices, state, padded_for=96).fingerprint(),
        Backbone.from_state(BACKBONE, 64, plain.out_indices, state, stride=8).fingerprint(),
        fingerprint(out_indices=(1, 2))[1],
        plain.normalize_by((0.1, 0.2, 0.3), (1, 1, 1)).fingerprint(),
    ]
    assert len({first, *others}) == 5


def test_images_are_resized_smoothly():
    """Bilinear and antialiased: in between, values lie in between, and a fine grid becomes grey."""
    step = Image.fromarray(np.array([[0, 255]], dtype=np.uint8).repeat(3).reshape(1, 2, 3))
    enlarged = to_tensor(step, 8)[0, 0]
    assert (enlarged.diff() >= 0).all() and ((enlarged > 0.05) & (enlarged < 0.95)).sum() >= 2
    grid = np.indices((64, 64)).sum(0) % 2 * np.uint8(255)
    assert (to_tensor(Image.fromarray(grid.astype(np.uint8)).convert("RGB"), 16) - 0.5).abs().max() < 0.05
