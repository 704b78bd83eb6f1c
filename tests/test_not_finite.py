"""A number that is not finite is never a verdict: not in training, calibration, bundles, scores or options."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import QUICK, run_command

from uniad_fast import AnomalyDetector
from uniad_fast.detect.calibration import Calibration
from uniad_fast.detect.residual_score import ResidualScore, whitening_of
from uniad_fast.detect.scales import Scale
from uniad_fast.detect.tail import Threshold, threshold_for
from uniad_fast.errors import UniadFastError
from uniad_fast.models.architecture import Architecture
from uniad_fast.models.backbone import Backbone
from uniad_fast.state_dicts import WeightsError
from uniad_fast.training import optimization
from uniad_fast.training.loop import train
from uniad_fast.training.patience import Patience
from uniad_fast.training.recipes import FAST, Recipe
from uniad_fast.training.reconstruction_loss import ReconstructionLoss, channel_statistics
from uniad_fast.training.run_files import Diverged, RunFiles

NAN, INF = float("nan"), float("inf")


def test_weights_with_a_nan_are_refused(tmp_path, backbone_weights, made_up_classes):
    state = torch.load(backbone_weights, weights_only=True)
    name = next(n for n, t in state.items() if t.ndim == 4)
    state[name][0, 0, 0, 0] = NAN
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="is not finite"):
        Backbone.pretrained("resnet10t", 64, tmp_path / "w.pth")
    arguments = ["train", made_up_classes, "-o", tmp_path / "b", *QUICK, "--backbone-weights", tmp_path / "w.pth"]
    code, output = run_command(*arguments, "--cache", tmp_path)
    assert code == 2 and "is not finite" in output and not (tmp_path / "b").exists()


class Line(torch.nn.Module):
    """The smallest network that trains."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 3)

    def reconstruct(self, tokens):
        return self.linear(tokens)


def fit(tmp_path, tokens, **changes):
    recipe = replace(FAST, epochs=9, min_steps=0, batch_size=2, optimizer="adamw", precision="float32", **changes)
    model = Line()
    criterion = ReconstructionLoss(model, torch.zeros(3), torch.ones(3), optimization.loss(recipe))
    train(criterion, tokens, recipe, 0, RunFiles(tmp_path, {}, checkpoint_seconds=0, quiet=True))
    return model


def test_training_stops_at_the_first_loss_that_is_not_finite_and_names_the_images(tmp_path):
    tokens = np.random.default_rng(0).normal(size=(8, 4, 3)).astype(np.float32)
    tokens[5, 1, 1] = INF
    with pytest.raises(Diverged, match="training stopped at step") as caught:
        fit(tmp_path, tokens)
    assert 5 in caught.value.rows and len(caught.value.rows) == 2
    if (tmp_path / "checkpoint.pt").exists():
        state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
        assert all(t.isfinite().all() for t in state.values())


def test_diverged_training_leaves_no_detector_and_no_checkpoint_of_it(tmp_path, made_up_classes, backbone_weights):
    recipe = replace(FAST, epochs=3, min_steps=0, learning_rate=1e30, optimizer="adamw", standardize=True)
    detector = AnomalyDetector(
        "resnet10t", 64, backbone_weights=backbone_weights, recipe=recipe, cache_dir=tmp_path / "c"
    )
    with pytest.raises(UniadFastError, match="training stopped at step"):
        detector.fit(made_up_classes, work_dir=tmp_path / "work", quiet=True, checkpoint_seconds=0)
    with pytest.raises(RuntimeError, match="not trained"):
        detector.save(tmp_path / "b")


def test_held_out_losses_features_and_residuals():
    with pytest.raises(UniadFastError, match="held-out good images is nan"):
        Patience(3).see(NAN)
    tokens = np.ones((2, 3, 4), dtype=np.float32)
    tokens[1, 2, 3] = INF
    with pytest.raises(UniadFastError, match="not all finite"):
        channel_statistics(tokens)
    for residuals in (torch.zeros(2, 3, 2, 2), torch.full((2, 3, 2, 2), NAN)):
        with pytest.raises(UniadFastError, match="not finite, or all zero"):
            whitening_of(residuals)
    with pytest.raises(UniadFastError, match="1 of 3 scores of good images are not finite"):
        threshold_for([1.0, NAN, 2.0], 0.1)


SCALE = Scale((1.0, 2.0, 1.5), (0.1, 0.2, 0.3))
THRESHOLD = dict(value=1.0, rate=0.1, interval=(0.05, 0.2), extrapolated=False)
GOOD = dict(
    threshold=Threshold(**THRESHOLD), pixel_threshold=2.0, color_range=(0.0, 1.0), scores=SCALE, maps=SCALE,
    images=(3, 4, 7), good_scores=((0.0, 1.0, 2.0), (0.5,) * 4),
)  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [dict(pixel_threshold=NAN), dict(pixel_threshold="x"), dict(pixel_threshold=True), dict(pixel_threshold=None),
     dict(color_range=(0.0, NAN)), dict(color_range=(2.0, 1.0)), dict(color_range=("a", "b")),
     dict(images=(0, 0, 0)), dict(good_scores=((NAN,), ())),
     dict(images=(3, 4)), dict(images=(3, 4, -1)),
     dict(images=(3, 4, 7.0)), dict(scores=Scale((1.0, NAN, 1.0), (1.0, 1.0, 1.0))), dict(maps=Scale((1.0, 1.0, 1.0),
     (1.0, 0.0, 1.0)))],
    ids=str,
)  # fmt: skip
def test_figures_of_good_images_are_finite(change):
    assert Calibration(**GOOD)
    with pytest.raises(UniadFastError):
        Calibration(**(GOOD | change))


@pytest.mark.parametrize(
    "change",
    [dict(value=NAN), dict(value=INF), dict(value="x"), dict(value=True), dict(value=None), dict(rate=2.0),
     dict(rate=0.0), dict(interval=(0.3, 0.1)), dict(interval=(0.0, NAN)), dict(extrapolated=1)],
    ids=str,
)  # fmt: skip
def test_figures_of_thresholds_are_finite(change):
    with pytest.raises(UniadFastError):
        Threshold(**(THRESHOLD | change))


@pytest.mark.parametrize("threshold", ["nan", "inf", "-inf", "1e999"])
def test_thresholds_that_are_not_finite_are_refused_before_anything_is_done(bundle, tmp_path, threshold):
    code, output = run_command("score", bundle, tmp_path, "-o", tmp_path / "o", "--threshold", threshold)
    assert code == 2 and "--threshold must be a finite number" in output and not (tmp_path / "o").exists()


def test_a_score_that_is_not_finite_is_an_error_and_no_label(bundle, made_up_classes, tmp_path, monkeypatch):
    forward = ResidualScore.forward

    def spoilt(self, residual, fields=None):
        score_maps = forward(self, residual, fields)
        score_maps[0] = NAN
        return score_maps

    monkeypatch.setattr(ResidualScore, "forward", spoilt)
    folder = made_up_classes / "class0/test/good"
    code, output = run_command("score", bundle, folder, "-o", tmp_path, "--threshold", 1e9, "-q")
    assert code == 2 and "not finite: " in output and "0 of 3 images are defective" in output
    assert output.rstrip().endswith("1 have no finite score")
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and all(math.isfinite(line["score"]) for line in lines)
    with pytest.raises(UniadFastError, match="the score of image 0 is nan"):
        AnomalyDetector.load(bundle).predict(sorted(folder.iterdir()))


def test_an_evaluation_leaves_such_scores_out_by_name(bundle, made_up_classes, tmp_path, monkeypatch):
    from uniad_fast.detect import prediction

    scores, seen = prediction.image_scores, []

    def first_is_nan(maps, kind, step):
        seen.append(len(maps))
        return scores(maps, kind, step).index_fill(
            0, torch.tensor([0] if len(seen) == 1 else [], dtype=torch.long), NAN
        )

    monkeypatch.setattr(prediction, "image_scores", first_is_nan)
    code, output = run_command("eval", bundle, made_up_classes, "-o", tmp_path, "-q")
    assert code == 2 and "not finite: " in output and "class0/test/good/000.png: its score is nan" in output
    assert json.loads((tmp_path / "metrics.json").read_text())["images"] == 39


def test_a_detector_that_is_not_finite_is_not_saved(bundle, tmp_path):
    detector = AnomalyDetector.load(bundle)
    detector.pipeline.residual_score.gaussians.whitening[0, 0, 0] = NAN
    with pytest.raises(UniadFastError, match="whitening is not finite"):
        detector.save(tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "change",
    [dict(clip=NAN), dict(warmup=NAN), dict(query_std=INF), dict(epochs=0, min_steps=0), dict(batch_size=0),
     dict(patience=-1), dict(jitter_prob=NAN), dict(learning_rate=-1.0), dict(epochs=2.5), dict(dropout=1.0),
     dict(schedule="cosine"), dict(precision=None), dict(standardize=1), dict(batch_size=True), dict(clip="1")],
    ids=str,
)  # fmt: skip
def test_recipes_are_checked(change):
    with pytest.raises(UniadFastError, match="recipe: "):
        replace(FAST, **change)
    assert isinstance(replace(FAST, patience=3), Recipe)


@pytest.mark.parametrize(
    "change",
    [dict(hidden_dim=20_000), dict(num_encoder_layers=10**6), dict(nhead=0), dict(mask=()), dict(mask=(1, 1, 1)),
     dict(activation="selu"), dict(neighbor_size=(0, 1)), dict(normalize_before="x"), dict(hidden_dim=8.0)],
    ids=str,
)  # fmt: skip
def test_architectures_are_checked_before_anything_is_built(change):
    with pytest.raises(UniadFastError, match="architecture: "):
        Architecture(**change)


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--held-out", "nan"], "held_out must be in"), (["--false-alarm-rate", "nan"], "false_alarm_rate must be in"),
     (["--seed", "-1"], "seed"), (["--seed", str(2**64)], "seed"), (["--image-size", "100000"], "image_size")],
)  # fmt: skip
def test_options_that_are_no_numbers(tmp_path, made_up_classes, options, message):
    code, output = run_command("train", made_up_classes, "-o", tmp_path / "b", *QUICK, *options)
    assert code == 2 and message in output and "Traceback" not in output
