"""From features to a trained and fitted pipeline: for `AnomalyDetector.fit`, and for the studies."""

import os
from collections.abc import Callable

import torch
from numpy.typing import NDArray

from ..models.backbone import Backbone
from ..models.uniad import UniAD
from ..training import optimization
from ..training.build import build_model
from ..training.loop import train
from ..training.recipes import Recipe
from ..training.reconstruction_loss import ReconstructionLoss, channel_statistics
from ..training.run_files import RunFiles
from .calibration import batches
from .pipeline import Pipeline
from .settings import DetectorSettings

_SCORE_IMAGES = 512


def new_backbone(settings: DetectorSettings, weights: str | os.PathLike | None) -> Backbone:
    """The backbone with trained weights; raises as `Backbone.pretrained` does."""
    backbone = Backbone.pretrained(
        settings.backbone, settings.image_size, weights, settings.out_indices, settings.stride
    )
    return backbone.normalize_by(*settings.normalization) if settings.normalization else backbone


def new_model(settings: DetectorSettings, backbone: Backbone, feature_size: tuple[int, int], impl: str | None) -> UniAD:
    """The untrained network for the backbone's feature map of (height, width)."""
    recipe, architecture = settings.recipe, settings.architecture
    return build_model(backbone.channels, backbone.stride, feature_size, recipe, impl, architecture)


def new_pipeline(settings: DetectorSettings, backbone: Backbone, model: UniAD) -> Pipeline:
    """Both of them, with a residual score that is not fitted yet."""
    return Pipeline(backbone, model, settings.image_size, settings.recipe.precision, settings.residual_score)


def train_pipeline(
    pipeline: Pipeline,
    tokens: NDArray,
    recipe: Recipe,
    seed: int,
    files: RunFiles,
    *,
    validation: NDArray | None = None,
    after_epoch: Callable[[int], None] | None = None,
    quiet: bool = False,
) -> int:
    """Train the pipeline's network on tokens [images, N, C], in units that the recipe asks for.

    Args: as of `uniad_fast.training.loop.train`.

    Returns:
        The number of epochs done.

    Raises:
        As `uniad_fast.training.loop.train` does; and UniadFastError, where features are not finite.
    """
    if recipe.standardize:
        mean, std = channel_statistics(tokens)
        pipeline.mean, pipeline.std = mean.to(pipeline.device), std.to(pipeline.device)
    loss = optimization.loss(recipe)
    criterion = ReconstructionLoss(pipeline.model, pipeline.mean, pipeline.std, loss, recipe.precision)
    return train(criterion, tokens, recipe, seed, files, validation=validation, after_epoch=after_epoch, quiet=quiet)


def fit_residual_score(pipeline: Pipeline, tokens: NDArray) -> None:
    """Fit the pipeline's residual score to features [images, N, C] of good images.

    Some hundred images, evenly picked, stand for all.

    Raises:
        UniadFastError: their residuals are not finite, or all zero.
    """
    score = pipeline.residual_score
    if not score.is_fitted:
        return
    picked = tokens[:: max(1, len(tokens) // _SCORE_IMAGES)]
    score.fit(torch.cat([pipeline.residual(batch)[:, score.deepest] for batch in batches(picked)]))
