"""From images to anomaly maps: the module that a bundle keeps."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UniadFastError
from ..models.backbone import Backbone
from ..models.precision import autocast
from ..models.reconstructor import Reconstructor
from .residual_score import ResidualScore


class Pipeline(nn.Module):
    """Backbone, features in the network's units, reconstruction, residual score, enlargement.

    B images, C channels, H x W feature map, N = H * W, S image_size. Its state dict is what a bundle keeps.

    Args:
        backbone, model: frozen features and the network that reconstructs them.
        image_size: S, of the images and of the maps.
        precision: of the network, see `uniad_fast.models.precision`; the backbone is float32.
        residual_score: one of `uniad_fast.detect.residual_score.RESIDUAL_SCORES`.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, backbone: Backbone, model: Reconstructor, image_size: int, precision: str, residual_score: str
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.model = model
        self.image_size = image_size
        self.precision = precision
        self.register_buffer("mean", torch.zeros(backbone.channels))
        self.register_buffer("std", torch.ones(backbone.channels))
        self.residual_score = ResidualScore(residual_score, backbone.deepest, model.feature_size)

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, S, S] in [0, 1] -> anomaly maps [B, S, S]."""
        return to_maps(self.score_maps(self.tokens(images)), self.image_size)

    def tokens(self, images: Tensor) -> Tensor:
        """images [B, 3, S, S] in [0, 1] -> features [B, N, C].

        Raises:
            UniadFastError: the backbone's feature map is not of the network's size.
        """
        features = self.backbone(images.to(self.device))
        if tuple(features.shape[-2:]) != self.model.feature_size:
            raise UniadFastError(
                f"images of {self.image_size} pixels give a feature map of {tuple(features.shape[-2:])}, "
                f"and the network reconstructs one of {self.model.feature_size}"
            )
        return features.flatten(2).transpose(1, 2)

    @torch.inference_mode()
    def score_maps(self, tokens: Tensor) -> Tensor:
        """tokens [B, N, C] -> scores per location [B, H, W] in float32."""
        return self.residual_score(self.residual(tokens))

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


def to_maps(score_maps: Tensor, image_size: int) -> Tensor:
    """[B, H, W] -> anomaly maps [B, S, S], bilinear with aligned corners."""
    size = (image_size, image_size)
    return F.interpolate(score_maps[:, None], size, mode="bilinear", align_corners=True)[:, 0]
