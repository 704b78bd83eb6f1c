"""Thresholds that hold their rate, whitening that whitens, colours that are one for all."""

import numpy as np
import pytest
import torch
from PIL import Image

from uniad_fast.detect.calibration import fit_score, threshold_for
from uniad_fast.detect.heatmap import heat_map
from uniad_fast.detect.scoring import Scorer, image_scores


def test_threshold_is_the_order_statistic():
    scores = list(range(1, 100))  # 99 scores: with the next image, 100 equally likely ranks
    assert threshold_for(scores, 0.05) == (95.0, 0.05)
    assert threshold_for(scores, 0.01) == (99.0, 0.01)
    assert threshold_for(range(1, 101), 0.05) == (96.0, 0.05)  # 95 would let 6 of 101 ranks through
    assert threshold_for(scores[:9], 0.01) == (9.0, 0.1)  # nine images can't promise one percent


def test_threshold_holds_its_rate_on_new_images():
    rng = np.random.default_rng(0)
    alarms = [rng.gamma(2) > threshold_for(rng.gamma(2, size=60), 0.1)[0] for _ in range(4000)]
    assert np.mean(alarms) <= 0.1 + 3 * (0.09 / 4000) ** 0.5
    assert np.mean(alarms) >= 0.07


@pytest.mark.parametrize(("scores", "rate", "message"), [([], 0.1, "at least one"), ([1.0], 1.0, "1.0")])
def test_bad_threshold_input(scores, rate, message):
    with pytest.raises(ValueError, match=message):
        threshold_for(scores, rate)


def make_scorer(feature_size, score):
    """Its residual is minus its input; the deepest stage has five of the seven channels."""
    model, backbone = torch.nn.Module(), torch.nn.Module()
    model.feature_size, model.reconstruct = feature_size, torch.zeros_like
    backbone.channels, backbone.deepest = 7, slice(2, 7)
    return Scorer(backbone, model, 32, "float32", score)


def test_whitening_makes_good_residuals_white():
    rng = np.random.default_rng(0)
    mixing = np.eye(5) + 0.2 * rng.normal(size=(5, 5))
    deepest = (rng.normal(size=(200, 30, 5)) @ mixing).astype(np.float32)
    tokens = np.concatenate([rng.normal(size=(200, 30, 2)).astype(np.float32), deepest], axis=-1)
    scorer = make_scorer((5, 6), "whitened")
    fit_score(scorer, tokens)
    white = deepest.reshape(-1, 5) @ scorer.whitening.numpy().T
    np.testing.assert_allclose(white.T @ white / len(white), np.eye(5), atol=0.1)


def test_relative_scores_of_good_images_are_one_on_average_everywhere():
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(300, 6, 7)).astype(np.float32) * np.arange(1, 7, dtype=np.float32)[:, None]
    scorer = make_scorer((2, 3), "relative")
    fit_score(scorer, tokens)
    grids = scorer.grids(torch.from_numpy(tokens))
    torch.testing.assert_close(grids.mean(0), torch.ones(2, 3))
    whitened = scorer.norm(scorer.residual(torch.from_numpy(tokens)), "whitened")
    assert whitened.mean(0).max() > 4 * whitened.mean(0).min()  # as they are, the last location drowns the first
    torch.testing.assert_close(grids * whitened.mean(0), whitened)
    with pytest.raises(ValueError, match="'cosine'"):
        make_scorer((2, 3), "cosine")


def test_image_scores():
    maps = torch.rand(3, 40, 40)
    pooled = torch.nn.functional.avg_pool2d(maps[:, None], 16, stride=1)
    torch.testing.assert_close(image_scores(maps, "max"), pooled.amax((1, 2, 3)))
    torch.testing.assert_close(image_scores(maps, "mean"), maps.mean((1, 2)))
    torch.testing.assert_close(image_scores(maps, "std"), maps.flatten(1).std(1))
    with pytest.raises(ValueError, match="'median'"):
        image_scores(maps, "median")


def test_heat_maps_have_one_scale():
    image = Image.new("RGB", (40, 20), (128, 128, 128))
    low, high = (np.asarray(heat_map(image, np.full((8, 8), value), (1.0, 3.0))) for value in (1.0, 3.0))
    assert low.shape == (20, 40, 3)
    assert np.abs(low.astype(int) - 128).max() < 12  # a good image keeps its look
    assert high[..., 0].min() > 170 and high[..., 2].max() < 80  # red
    beyond = np.asarray(heat_map(image, np.full((8, 8), 9.0), (1.0, 3.0)))
    np.testing.assert_array_equal(beyond, high)
    half = np.full((8, 8), 1.0)
    half[:, 4:] = 3.0
    sided = np.asarray(heat_map(image, half, (1.0, 3.0)))
    np.testing.assert_array_equal(sided[:, :10], low[:, :10])
