"""Whitening that whitens, scores that are one everywhere, maps that become numbers."""

import numpy as np
import pytest
import torch

from uniad_fast.detect.fitting import fit_residual_score
from uniad_fast.detect.pipeline import Pipeline
from uniad_fast.detect.residual_score import ResidualScore, image_scores


def make_pipeline(feature_size, residual_score, classes=1):
    """Its residual is minus its input; the deepest stage has five of the seven channels."""
    model, backbone = torch.nn.Module(), torch.nn.Module()
    model.feature_size, model.reconstruct = feature_size, torch.zeros_like
    backbone.channels, backbone.deepest = 7, slice(2, 7)
    return Pipeline(backbone, model, 32, "float32", residual_score, classes)


def test_whitening_makes_good_residuals_white():
    rng = np.random.default_rng(0)
    mixing = np.eye(5) + 0.2 * rng.normal(size=(5, 5))
    deepest = (rng.normal(size=(200, 30, 5)) @ mixing).astype(np.float32)
    tokens = np.concatenate([rng.normal(size=(200, 30, 2)).astype(np.float32), deepest], axis=-1)
    pipeline = make_pipeline((5, 6), "whitened")
    fit_residual_score(pipeline.residual_score, pipeline, [tokens], np.zeros(200, int))
    white = deepest.reshape(-1, 5) @ pipeline.residual_score.whitening.numpy().T
    np.testing.assert_allclose(white.T @ white / len(white), np.eye(5), atol=0.1)


def test_relative_scores_of_good_images_are_one_on_average_everywhere():
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(300, 6, 7)).astype(np.float32) * np.arange(1, 7, dtype=np.float32)[:, None]
    pipeline = make_pipeline((2, 3), "relative")
    fit_residual_score(pipeline.residual_score, pipeline, [tokens], np.zeros(300, int))
    score_maps = pipeline.score_maps(torch.from_numpy(tokens))
    torch.testing.assert_close(score_maps.mean(0), torch.ones(2, 3))
    score = ResidualScore("whitened", slice(2, 7), (2, 3))
    fit_residual_score(score, pipeline, [tokens], np.zeros(300, int))
    whitened = score(pipeline.residual(torch.from_numpy(tokens)))
    assert whitened.mean(0).max() > 4 * whitened.mean(0).min()  # as they are, the last location drowns the first
    torch.testing.assert_close(score_maps * whitened.mean(0), whitened)
    with pytest.raises(ValueError, match="'cosine'"):
        make_pipeline((2, 3), "cosine")


def test_gaussian_scores_are_of_the_field_that_is_told():
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(90, 6, 7)).astype(np.float32)
    tokens[60:] *= 3
    pipeline = make_pipeline((2, 3), "gaussian", classes=2)
    classes = np.repeat([0, 1], [60, 30])
    maps = fit_residual_score(pipeline.residual_score, pipeline, [tokens[:50], tokens[50:]], classes)
    assert [len(one.rows) for one in maps] == [60, 30, 90] and maps[2].score_maps.shape == (90, 2, 3)
    own = pipeline.score_maps(torch.from_numpy(tokens), torch.from_numpy(classes))
    assert own.shape == (90, 2, 3) and abs(own[60:].mean() / own[:60].mean() - 1) < 0.1
    as_other = pipeline.score_maps(torch.from_numpy(tokens), torch.from_numpy(1 - classes))
    assert as_other[60:].mean() > 2 * own[60:].mean() and as_other[:60].mean() < 0.5 * own[:60].mean()
    together = pipeline.score_maps(torch.from_numpy(tokens))
    assert torch.equal(together, pipeline.score_maps(torch.from_numpy(tokens), torch.full((90,), 2)))
    # The five deepest channels of seven, each unit normal: distances are about sqrt(5).
    assert own.mean().item() == pytest.approx(5**0.5, rel=0.1)


def test_image_scores():
    maps = torch.rand(3, 40, 40)
    pooled = torch.nn.functional.avg_pool2d(maps[:, None], 16, stride=1)
    torch.testing.assert_close(image_scores(maps, "max"), pooled.amax((1, 2, 3)))
    torch.testing.assert_close(image_scores(maps, "mean"), maps.mean((1, 2)))
    torch.testing.assert_close(image_scores(maps, "std"), maps.flatten(1).std(1))
    with pytest.raises(ValueError, match="'median'"):
        image_scores(maps, "median")
