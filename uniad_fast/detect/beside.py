"""What the network is worth: the same images by simpler means, on the same features and with the same calibration.

"without network" measures the features themselves, per class and place, as the network's residuals are measured (Defard
et al., PaDiM, 2021, with the mixtures of `fit_gaussians`). "memory" is the distance to the nearest of some remembered
tokens of good images (Roth et al., PatchCore, 2022, without its choice of tokens).
"""

import dataclasses

import numpy as np
import torch
from torch import Tensor, nn

from ..data.samples import DataError, Sample
from ..models.reconstructor import Reconstructor
from ..rows import TokenRows
from .detector import AnomalyDetector
from .fit_scores import calibrated_by, fit_scores
from .learning import Surroundings
from .mosaic import pictures_of
from .pipeline import Pipeline
from .trained import Trained

_REMEMBERED = 20_000
_IMAGES_AT_A_TIME = 16
_FEWEST = 10
_HELD_OUT = 10  # every tenth image sets the memory's threshold


class Nothing(Reconstructor):
    """Reconstructs zeros, so that the residual is the feature itself."""

    def reconstruct(self, tokens: Tensor) -> Tensor:
        return torch.zeros_like(tokens)


class Memory(nn.Module):
    """residual [B, C, H, W] -> L2 distance [B, H, W] of its deepest stage to the nearest remembered token."""

    kind = "memory"
    gaussians = None
    tokens: Tensor

    def __init__(self, deepest: slice, tokens: Tensor) -> None:
        super().__init__()
        self.deepest = deepest
        self.register_buffer("tokens", tokens)

    def forward(self, residual: Tensor, fields: Tensor | None = None) -> Tensor:
        squares = self.tokens.square().sum(dim=1)
        parts = []
        for batch in residual[:, self.deepest].split(_IMAGES_AT_A_TIME):
            flat = batch.permute(0, 2, 3, 1).flatten(0, 2)
            nearest = torch.addmm(squares, flat, self.tokens.T, alpha=-2).amin(dim=1) + flat.square().sum(dim=1)
            parts.append(nearest.clamp_min(0).sqrt().view(len(batch), *batch.shape[2:]))
        return torch.cat(parts)


def beside(detector: AnomalyDetector, samples: list[Sample], quiet: bool = False) -> dict[str, AnomalyDetector]:
    """{"without network": ..., "memory": ...}: detectors on the same backbone, learnt from these good samples.

    Raises:
        DataError: fewer than ten of them can be read.
    """
    settings, pipeline = dataclasses.replace(detector.settings, residual_score="gaussian"), detector.pipeline
    where = Surroundings(detector.device, cache_dir=detector.cache_dir, quiet=quiet)
    found = where.features(pipeline.backbone, settings, samples, "features of good images")
    names = [samples[row].class_name for row in found.used]
    if len(names) < _FEWEST:
        raise DataError(f"{len(names)} readable good images to learn from: there is nothing to compare with")
    classes = tuple(sorted(set(names)))
    numbers = np.array([classes.index(name) for name in names])
    own = without_network(pipeline, len(classes), where.device)
    pictures = pictures_of([found])
    calibration, recognition = fit_scores(own, [found.tokens], numbers, settings, pictures)
    other = without_network(pipeline, 1, where.device)
    _, images = np.unique(found.used, return_inverse=True)  # whose tiles are held out together
    kept = (np.random.default_rng(settings.seed).permutation(images.max() + 1) % _HELD_OUT != 0)[images]
    other.residual_score = _memory(other, found.tokens[kept], settings.seed)  # type: ignore[assignment]
    unseen = found.tokens[~kept]
    of = None if pictures is None else pictures.part(np.flatnonzero(~kept))
    measured = calibrated_by(other, unseen, np.zeros(len(unseen), np.int64), settings, of)
    return {
        "without network": AnomalyDetector.of(
            Trained(settings, own, calibration, classes, recognition), device=where.device
        ),
        "memory": AnomalyDetector.of(Trained(settings, other, measured), device=where.device),
    }


def without_network(like: Pipeline, classes: int, device: torch.device) -> Pipeline:
    """A pipeline that measures the features of another one's backbone themselves, of so many classes, not fitted."""
    backbone = like.backbone
    model = Nothing(backbone.channels, backbone.stride, like.model.feature_size)
    pipeline = Pipeline(backbone, model, like.image_size, "float32", "gaussian", classes).to(device)
    pipeline.mean, pipeline.std, pipeline.roi = like.mean, like.std, like.roi
    return pipeline


def _memory(pipeline: Pipeline, tokens: TokenRows, seed: int) -> Memory:
    """Of some tokens of [images, N, C], drawn at random."""
    deepest = pipeline.residual_score.deepest
    images, places = tokens.shape[:2]
    count = min(_REMEMBERED, images * places)
    drawn = np.sort(np.random.default_rng(seed).choice(images * places, count, replace=False))
    features = torch.from_numpy(tokens[drawn // places, drawn % places]).to(pipeline.device)
    residual = (pipeline.mean - features) / pipeline.std
    return Memory(deepest, residual[:, deepest].contiguous())
