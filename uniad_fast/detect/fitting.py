"""From features to a trained and fitted pipeline: for `AnomalyDetector.fit`, and for the studies."""

import os
import tempfile
from collections.abc import Callable, Sequence
from itertools import chain
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..models.backbone import Backbone
from ..models.uniad import UniAD
from ..rows import TokenRows
from ..training import optimization
from ..training.build import build_model
from ..training.loop import train
from ..training.recipes import Recipe
from ..training.reconstruction_loss import ReconstructionLoss, channel_statistics
from ..training.run_files import RunFiles
from .calibration import batches
from .class_recognizer import pooled
from .fit_gaussians import fit_gaussians
from .pipeline import Pipeline
from .residual_score import ResidualScore
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


def new_pipeline(settings: DetectorSettings, backbone: Backbone, model: UniAD, classes: int = 1) -> Pipeline:
    """Both of them, with a residual score and a recognizer of so many classes that are not fitted yet."""
    return Pipeline(backbone, model, settings.image_size, settings.recipe.precision, settings.residual_score, classes)


def train_pipeline(
    pipeline: Pipeline,
    tokens: TokenRows,
    recipe: Recipe,
    seed: int,
    files: RunFiles,
    *,
    validation: TokenRows | None = None,
    classes: NDArray | None = None,
    after_epoch: Callable[[int], None] | None = None,
) -> int:
    """Train the pipeline's network on tokens [images, N, C], in units that the recipe asks for.

    Args: as of `uniad_fast.training.loop.train`.

    Returns:
        The number of epochs done.

    Raises:
        As `uniad_fast.training.loop.train` does; and UniadFastError, where features are not finite.
    """
    if recipe.standardize:
        mean, std = files.together.from_first(lambda: channel_statistics(tokens))
        pipeline.mean, pipeline.std = mean.to(pipeline.device), std.to(pipeline.device)
    loss = optimization.loss(recipe)
    criterion = ReconstructionLoss(
        pipeline.model, pipeline.mean, pipeline.std, loss, recipe.precision, pipeline.looked_at()
    )
    options: dict[str, Any] = {"validation": validation, "classes": classes, "after_epoch": after_epoch}
    return train(criterion, tokens, recipe, seed, files, **options)


class UnseenMaps(NamedTuple):
    """Raw score maps [images, H, W] of one field, of images that had no part in what measures them, and which they
    are.
    """

    rows: NDArray
    score_maps: Tensor


def fit_residual_score(
    score: ResidualScore,
    pipeline: Pipeline,
    parts: Sequence[TokenRows],
    classes: NDArray,
    seed: int = 0,
    pictures: NDArray | None = None,
) -> list[UnseenMaps] | None:
    """Fit a residual score to features of good images, as the pipeline's network reconstructs them.

    Args:
        parts: arrays [images, N, C], the one that was trained on first. "gaussian" is fitted to all of them, the
            others to some hundred of the first, evenly picked.
        classes: numbers of the classes of all of their images, one part's after the other's.
        pictures: of which each is a tile, see `fit_gaussians`.

    Returns:
        For "gaussian", maps for each field.

    Raises:
        UniadFastError: their residuals are not finite, or all alike.
    """
    if score.kind == "l2":
        return None
    if score.gaussians is None:
        picked = parts[0][:: max(1, len(parts[0]) // _SCORE_IMAGES)]
        score.fit(torch.cat([pipeline.residual(batch)[:, score.deepest].cpu() for batch in batches(picked)]))
        return None
    with tempfile.TemporaryFile() as file:  # of any size, and gone whatever happens
        residuals = _residuals(pipeline, score, parts, file)
        count = score.gaussians.fields - 1 if score.gaussians.fields > 1 else 1
        fit = fit_gaussians(lambda rows: torch.from_numpy(residuals[rows]), classes, count, seed, pictures)
    score.gaussians.set(fit.gaussians)
    size = pipeline.model.feature_size
    return [
        UnseenMaps(rows, distances.unflatten(1, size)) for rows, distances in zip(fit.rows, fit.distances, strict=True)
    ]


def _residuals(pipeline: Pipeline, score: ResidualScore, parts: Sequence[TokenRows], file: IO[bytes]) -> NDArray:
    """[images, N, C'] of the deepest stage, in the file."""
    channels = score.deepest.stop - score.deepest.start
    shape = (sum(map(len, parts)), parts[0].shape[1], channels)
    residuals = np.memmap(file, np.float32, "w+", shape=shape)
    start = 0
    for batch in chain.from_iterable(map(batches, parts)):
        found = pipeline.residual(batch)[:, score.deepest].flatten(2).transpose(1, 2)
        residuals[start : start + len(batch)] = found.cpu().numpy()
        start += len(batch)
    return residuals


def score_maps_of(pipeline: Pipeline, tokens: TokenRows, fields: NDArray) -> Tensor:
    """Raw score maps [images, H, W] of features [images, N, C], each by its field [images]."""
    parts, start = [torch.zeros(0, *pipeline.model.feature_size)], 0
    for batch in batches(tokens):
        own = torch.from_numpy(fields[start : start + len(batch)]).to(pipeline.device)
        parts.append(pipeline.score_maps(batch, own).cpu())
        start += len(batch)
    return torch.cat(parts)


def pooled_features(pipeline: Pipeline, parts: Sequence[TokenRows]) -> Tensor:
    """What classes are recognized by, [images, 2C'], of features [images, N, C], one part's after the other's."""
    deepest = pipeline.residual_score.deepest
    return torch.cat([pooled(batch[..., deepest]) for batch in chain.from_iterable(map(batches, parts))])
