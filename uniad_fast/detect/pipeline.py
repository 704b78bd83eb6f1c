"""From images to anomaly maps: the module that a bundle keeps."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UniadFastError
from ..image_size import ImageSize, in_words, size_of
from ..models.backbone import Backbone
from ..models.precision import autocast
from ..models.reconstructor import Reconstructor
from .class_recognizer import UNSURE, ClassRecognizer
from .residual_score import ResidualScore


class Measured(NamedTuple):
    """B images, measured: features [B, N, C] (none where an engine keeps them), raw scores per location [B, H, W] in
    float32, and by which field each was measured, [B].
    """

    tokens: Tensor
    score_maps: Tensor
    fields: Tensor


class Pipeline(nn.Module):
    """Backbone, features in the network's units, reconstruction, class, residual score, enlargement.

    B images of h x w, C channels, H x W feature map, N = H * W. Its state dict is what a bundle keeps.

    With K > 1 classes there are K + 1 *fields*, ways of measuring an image: one for each class, and the last for an
    image of which the class is not known. With one class there is one field.

    Args:
        backbone, model: frozen features and the network that reconstructs them.
        image_size: (h, w), of the images and of the maps, or the side of a square.
        precision: of the network, see `uniad_fast.models.precision`; the backbone is float32.
        residual_score: one of `uniad_fast.detect.residual_score.RESIDUAL_SCORES`.
        classes: K.
    """

    mean: Tensor
    std: Tensor
    places: Tensor | None  # [fields, rows, cols]: of aligned pictures, what good ones have there over its mean
    roi: Tensor | None  # [h, w], True where the image is looked at; None looks everywhere

    def __init__(
        self,
        backbone: Backbone,
        model: Reconstructor,
        image_size: ImageSize,
        precision: str,
        residual_score: str,
        classes: int = 1,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.model = model
        self.image_size = size_of(image_size)
        self.precision = precision
        self.register_buffer("mean", torch.zeros(backbone.channels))
        self.register_buffer("std", torch.ones(backbone.channels))
        self.register_buffer("roi", None)
        self.register_buffer("places", None)
        deepest = backbone.deepest
        self.fields = classes + 1 if classes > 1 else 1
        self.residual_score = ResidualScore(residual_score, deepest, model.feature_size, self.fields)
        self.recognizer = ClassRecognizer(classes, deepest.stop - deepest.start) if classes > 1 else None

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, h, w] in [0, 1] -> anomaly maps [B, h, w], each by the field of the class that is
        recognized.
        """
        return self.enlarge(self.measure(images).score_maps)

    def measure(self, images: Tensor, told: Sequence[int | None] | None = None) -> Measured:
        """images [B, 3, h, w] in [0, 1], told as `fields_of` takes it."""
        tokens = self.tokens(images)
        return self.measure_residual(tokens, self.residual(tokens), told)

    def measure_residual(self, tokens: Tensor, residual: Tensor, told: Sequence[int | None] | None = None) -> Measured:
        """tokens [B, N, C], their residual [B, C, H, W] and told as `fields_of` takes it."""
        fields = self.fields_of(tokens, told)
        with torch.inference_mode():
            return Measured(tokens, self.residual_score(residual, fields), fields)

    def tokens(self, images: Tensor) -> Tensor:
        """images [B, 3, h, w] in [0, 1] -> features [B, N, C].

        Raises:
            UniadFastError: the backbone's feature map is not of the network's size.
        """
        features = self.backbone(images.to(self.device))
        if tuple(features.shape[-2:]) != self.model.feature_size:
            raise UniadFastError(
                f"images of {in_words(self.image_size)} pixels give a feature map of {tuple(features.shape[-2:])}, "
                f"and the network reconstructs one of {self.model.feature_size}"
            )
        return features.flatten(2).transpose(1, 2)

    @torch.inference_mode()
    def fields_of(self, tokens: Tensor, told: Sequence[int | None] | None = None) -> Tensor:
        """tokens [B, N, C] -> the field [B] that each image is measured by.

        told: the number of each image's class, None where it is to be recognized; None for all of them.
        """
        if self.recognizer is None:
            return torch.zeros(len(tokens), dtype=torch.int64, device=self.device)
        found = self.recognizer(tokens.to(self.device)[..., self.residual_score.deepest])
        fields = torch.where(found == UNSURE, self.fields - 1, found)
        for row, number in enumerate(told or ()):
            if number is not None:
                fields[row] = number
        return fields

    @torch.inference_mode()
    def score_maps(self, tokens: Tensor, fields: Tensor | None = None) -> Tensor:
        """tokens [B, N, C], fields [B] -> scores per location [B, H, W] in float32; None takes the last field for
        all.
        """
        return self.residual_score(self.residual(tokens), fields)

    def enlarge(self, score_maps: Tensor) -> Tensor:
        """Scores per location [B, H, W] -> anomaly maps [B, h, w]; 0, the best there is, where nobody looks."""
        maps = to_maps(score_maps, self.image_size)
        return maps if self.roi is None else maps * self.roi.to(maps.device)

    def by_place(self, raw: Tensor, field: int) -> Tensor:
        """Raw anomaly map [height, width] of a picture in tiles, relative to what good pictures have at each place, if
        they are aligned.
        """
        if self.places is None:
            return raw
        typical = F.interpolate(self.places[field][None, None].to(raw.device), raw.shape, mode="bilinear")
        return raw / typical[0, 0]

    def masked(self, maps: Tensor) -> Tensor:
        """Raw anomaly maps [B, height, width] of whole pictures, of any size: 0 where nobody looks."""
        if self.roi is None:
            return maps
        seen = F.interpolate(self.roi[None, None].float().to(maps.device), maps.shape[1:], mode="nearest-exact")
        return maps * (seen[0] > 0.5)

    def looked_at(self) -> Tensor | None:
        """[N], True for the locations that a place that is looked at belongs to; None where that is all."""
        if self.roi is None:
            return None
        return F.adaptive_max_pool2d(self.roi[None].float(), self.model.feature_size).flatten() > 0

    @torch.inference_mode()
    def residual(self, tokens: Tensor) -> Tensor:
        """tokens [B, N, C] -> f_rec - f_org [B, C, H, W], in the units that the network was trained in."""
        target = (tokens.to(self.device) - self.mean) / self.std
        return self._as_map(self._reconstruct(target) - target)

    @torch.inference_mode()
    def reconstruction(self, tokens: Tensor) -> Tensor:
        """tokens [B, N, C] -> f_rec [B, C, H, W], in the units of the backbone's features."""
        target = (tokens.to(self.device) - self.mean) / self.std
        return self._as_map(self._reconstruct(target) * self.std + self.mean)

    def _reconstruct(self, target: Tensor) -> Tensor:
        with autocast(self.precision, self.device):
            return self.model.reconstruct(target).float()

    def _as_map(self, tokens: Tensor) -> Tensor:
        return tokens.transpose(1, 2).unflatten(2, self.model.feature_size)


def to_maps(score_maps: Tensor, image_size: ImageSize) -> Tensor:
    """[B, H, W] -> anomaly maps [B, h, w], bilinear with aligned corners."""
    return F.interpolate(score_maps[:, None], size_of(image_size), mode="bilinear", align_corners=True)[:, 0]
