"""Whitening that whitens, scores that are one everywhere, maps that become numbers."""

import numpy as np
import pytest
import torch

from uniad_fast.detect.fitting import fit_residual_score
from uniad_fast.detect.pipeline import Pipeline
from uniad_fast.detect.residual_score import image_scores


def make_pipeline(feature_size, residual_score):
    """Its residual is minus its input; the deepest stage has five of the seven channels."""
    model, backbone = torch.nn.Module(), torch.nn.Module()
    model.feature_size, model.reconstruct = feature_size, torch.zeros_like
    backbone.channels, backbone.deepest = 7, slice(2, 7)
    return Pipeline(backbone, model, 32, "float32", residual_score)


def test_whitening_makes_good_residuals_white():
    rng = np.random.default_rng(0)
    mixing = np.eye(5) + 0.2 * rng.normal(size=(5, 5))
    deepest = (rng.normal(size=(200, 30, 5)) @ mixing).astype(np.float32)
    tokens = np.concatenate([rng.normal(size=(200, 30, 2)).astype(np.float32), deepest], axis=-1)
    pipeline = make_pipeline((5, 6), "whitened")
    fit_residual_score(pipeline, tokens)
    white = deepest.reshape(-1, 5) @ pipeline.residual_score.whitening.numpy().T
    np.testing.assert_allclose(white.T @ white / len(white), np.eye(5), atol=0.1)


def test_relative_scores_of_good_images_are_one_on_average_everywhere():
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(300, 6, 7)).astype(np.float32) * np.arange(1, 7, dtype=np.float32)[:, None]
    pipeline = make_pipeline((2, 3), "relative")
    fit_residual_score(pipeline, tokens)
    score_maps = pipeline.score_maps(torch.from_numpy(tokens))
    torch.testing.assert_close(score_maps.mean(0), torch.ones(2, 3))
    whitened = pipeline.residual_score.norm(pipeline.residual(torch.from_numpy(tokens)), "whitened")
    assert whitened.mean(0).max() > 4 * whitened.mean(0).min()  # as they are, the last location drowns the first
    torch.testing.assert_close(score_maps * whitened.mean(0), whitened)
    with pytest.raises(ValueError, match="'cosine'"):
        make_pipeline((2, 3), "cosine")


def test_image_scores():
    maps = torch.rand(3, 40, 40)
    pooled = torch.nn.functional.avg_pool2d(maps[:, None], 16, stride=1)
    torch.testing.assert_close(image_scores(maps, "max"), pooled.amax((1, 2, 3)))
    torch.testing.assert_close(image_scores(maps, "mean"), maps.mean((1, 2)))
    torch.testing.assert_close(image_scores(maps, "std"), maps.flatten(1).std(1))
    with pytest.raises(ValueError, match="'median'"):
        image_scores(maps, "median")
