"""A whole detector as one module of plain PyTorch operators: what is exported.

B images, brought to h x w, H x W feature map.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..detect.class_recognizer import UNSURE
from ..detect.good_gaussians import GoodGaussians
from ..detect.pipeline import Pipeline
from ..detect.residual_score import image_scores
from ..detect.trained import Trained
from ..image_size import ImageSize, size_of

OUTPUTS = ("score", "defective", "class", "score_map", "anomaly_map")
"""What an exported detector gives: score [B], standard deviations above the median of good images; bool [B], whether
that is above the threshold; int64 [B], the class recognized, -1 where none is for sure; [B, H, W], scores of places on
the scale of the maps; [B, h, w], the same enlarged."""

INNER = ("resized", "residual")
"""Between those two lies what is quantized: images [B, 3, h, w], and what the network left of their features."""


class DetectorGraph(nn.Module):
    """images [B, 3, height, width], uint8 or float in [0, 1], of any size -> `OUTPUTS`.

    It shares the detector's tensors, and changes nothing in it. Its own choices are float32 and stock operators.

    Args:
        trained: a calibrated detector.
        threshold: of the image score; None is the detector's own.
        inner: give `INNER` too.
    """

    centers: Tensor
    spreads: Tensor
    owners: Tensor

    def __init__(self, trained: Trained, threshold: float | None = None, inner: bool = False) -> None:
        super().__init__()
        self.inner = inner
        assert trained.calibration is not None
        calibration = trained.calibration
        self.pipeline = _in_stock_operators(trained.pipeline)
        self.image_score = trained.settings.image_score
        self.threshold = calibration.threshold.value if threshold is None else threshold
        scales = (calibration.scores, calibration.maps)
        self.register_buffer("centers", torch.tensor([scale.centers for scale in scales]))
        self.register_buffer("spreads", torch.tensor([scale.spreads for scale in scales]))
        gaussians = self.pipeline.residual_score.gaussians
        self.register_buffer("owners", torch.zeros(0) if gaussians is None else owners_of(gaussians))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        pipeline = self.pipeline
        small = resized(images, pipeline.image_size)
        tokens, residual = _residual(pipeline, small)
        raw, fields = score_maps(pipeline, tokens, residual, self.owners)
        maps = pipeline.enlarge(raw)
        score = self._scaled(image_scores(maps, self.image_score), 0, fields)
        last = pipeline.fields - 1
        classes = torch.where(fields == last, UNSURE, fields) if last else fields
        return (
            score,
            score > self.threshold,
            classes,
            self._scaled(raw, 1, fields),
            self._scaled(maps, 1, fields),
            *((small, residual) if self.inner else ()),
        )

    def _scaled(self, raw: Tensor, which: int, fields: Tensor) -> Tensor:
        shape = (-1, *([1] * (raw.ndim - 1)))
        return (raw - self.centers[which][fields].view(shape)) / self.spreads[which][fields].view(shape)


class ResidualGraph(nn.Module):
    """images [B, 3, h, w], float in [0, 1] -> features [B, N, C] and their residual [B, N, C]: what takes time.

    It shares the detector's tensors, and changes nothing in it.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__()
        self.pipeline = _in_stock_operators(pipeline)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return _residual(self.pipeline, images)


def score_maps(pipeline: Pipeline, tokens: Tensor, residual: Tensor, owners: Tensor) -> tuple[Tensor, Tensor]:
    """Features and their residual [B, N, C] -> (raw scores per location [B, H, W], field of each image [B]).

    The numbers of `Pipeline.score_maps` and `Pipeline.fields_of` without a branch that depends on the data; owners are
    those of its Gaussians' directions.
    """
    scoring = pipeline.residual_score
    if pipeline.recognizer is None:
        fields = tokens.new_zeros(tokens.shape[0], dtype=torch.int64)
    else:
        found = pipeline.recognizer(tokens[..., scoring.deepest])
        fields = torch.where(found == UNSURE, pipeline.fields - 1, found)
    if scoring.gaussians is not None:
        scores = distances(scoring.gaussians, residual[..., scoring.deepest], fields, owners)
        return scores.unflatten(1, pipeline.model.feature_size), fields
    return scoring(residual.transpose(1, 2).unflatten(2, pipeline.model.feature_size)), fields


def _residual(pipeline: Pipeline, images: Tensor) -> tuple[Tensor, Tensor]:
    """images [B, 3, h, w] in [0, 1] -> features and their residual, [B, N, C] each."""
    tokens = pipeline.backbone(images).flatten(2).transpose(1, 2)
    target = (tokens - pipeline.mean) / pipeline.std
    return tokens, pipeline.model.reconstruct(target) - target


def distances(gaussians: GoodGaussians, x: Tensor, fields: Tensor, owners: Tensor) -> Tensor:
    """`GoodGaussians.forward` of x [B, N, C], fields [B] -> [B, N], every image in the same operators.

    owners: `owners_of` its directions, which an exporter could not work out.
    """
    white = (x - gaussians.means[fields]) @ gaussians.whitening[fields].transpose(1, 2)
    squares = white.square().sum(dim=2) * gaussians.scale[fields]
    if gaussians.directions.shape[1]:
        along = torch.einsum("bnc,nrc->bnr", white, gaussians.directions.float())
        own = (owners[None, :] == fields[:, None]).float()[:, None]  # [B, 1, R]
        squares = squares + (along.square() * gaussians.signs * own).sum(dim=2)
    return squares.clamp_min(0).sqrt()


def owners_of(gaussians: GoodGaussians) -> Tensor:
    """The field of each of its directions, [R]."""
    return torch.repeat_interleave(torch.arange(gaussians.fields), gaussians.ranks.cpu())


def resized(images: Tensor, image_size: ImageSize) -> Tensor:
    """images [B, 3, height, width], uint8 or float in [0, 1] -> float [B, 3, h, w] in [0, 1].

    Bilinear and antialiased as Pillow does it, columns first, rounded to 8 bits after each pass. Engines differ in how
    they resize, or have no antialiasing, so both passes are products with the filter's weights.
    """
    levels = images.float() if images.dtype == torch.uint8 else images * 255.0
    h, w = size_of(image_size)
    levels = _rounded(levels @ _filter(images.shape[3], w).T)
    return _rounded(_filter(images.shape[2], h) @ levels) / 255.0


def _filter(length: int, size: int) -> Tensor:
    """[size, length]: a triangle around each output's place, as wide as an output is, or an input if that is wider."""
    step = length / size
    place = (torch.arange(size) + 0.5) * step
    width = torch.clamp(torch.ones(()) * step, min=1.0)
    weight = F.relu(1 - (torch.arange(length) + 0.5 - place[:, None]).abs() / width)
    return weight / weight.sum(dim=1, keepdim=True)


def _rounded(levels: Tensor) -> Tensor:
    return (levels + 0.5).floor().clamp(0, 255)


def _in_stock_operators(pipeline: Pipeline) -> Pipeline:
    """The pipeline with its own modules and the same tensors, which computes in float32 with `impl="torch"`."""
    state = pipeline.state_dict(keep_vars=True)
    memo = {id(tensor): tensor for tensor in state.values()}
    memo |= {id(buffer): buffer for buffer in pipeline.buffers()}
    twin = copy.deepcopy(pipeline, memo)
    twin.precision = "float32"
    for module in twin.modules():
        if hasattr(module, "impl"):
            setattr(module, "impl", "torch")  # noqa: B010  a name that torch's Module says nothing of
    return twin.eval()
