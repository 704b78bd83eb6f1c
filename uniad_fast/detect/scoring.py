"""From images to anomaly maps and image scores.

A residual is f_rec - f_org per location. How it becomes one number is the detector's `score`:

    "l2"        its L2 norm over the channels (paper, section 3.3)
    "whitened"  the Mahalanobis norm of its deepest stage: the L2 norm after whitening by the residuals of good
                images, so that what is always reconstructed badly counts for less, and what never fails for more
    "relative"  the same, divided by its mean over good images at that location: places differ, and those at the
                border, whose context lies on one side, are reconstructed worse
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UniadFastError
from ..models.backbone import Backbone
from ..models.precision import autocast
from ..models.reconstructor import Reconstructor

SCORES = ("l2", "whitened", "relative")
IMAGE_SCORES = ("max", "mean", "std")
_POOL = 16


class Scorer(nn.Module):
    """Images to anomaly maps: backbone, features in the model's units, reconstruction, residual norm.

    B images, C channels, H x W grid, N = H * W, S image_size.

    Args:
        backbone, model: frozen features and the network that reconstructs them.
        image_size: S, of the images and of the maps.
        precision: of the model, see `uniad_fast.models.precision`; the backbone is float32.
        score: one of `SCORES`. All but "l2" need `uniad_fast.calibration.fit_score`, which sets the buffers `whitening`
            (until then the identity) and `typical` (ones).

    Its state dict is what a bundle keeps.
    """

    mean: Tensor
    std: Tensor
    whitening: Tensor | None  # [C', C'] for the C' channels of the deepest stage
    typical: Tensor | None  # [H, W]

    def __init__(self, backbone: Backbone, model: Reconstructor, image_size: int, precision: str, score: str) -> None:
        super().__init__()
        if score not in SCORES:
            raise UniadFastError(f"score must be one of {', '.join(SCORES)}, got {score!r}")
        self.score = score
        self.backbone = backbone
        self.model = model
        self.image_size = image_size
        self.precision = precision
        self.register_buffer("mean", torch.zeros(backbone.channels))
        self.register_buffer("std", torch.ones(backbone.channels))
        deepest = backbone.deepest.stop - backbone.deepest.start
        self.register_buffer("whitening", None if score == "l2" else torch.eye(deepest))
        self.register_buffer("typical", torch.ones(model.feature_size) if score == "relative" else None)

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def tokens(self, images: Tensor) -> Tensor:
        """images [B, 3, S, S] in [0, 1] -> features [B, N, C]."""
        return self.backbone(images.to(self.device)).flatten(2).transpose(1, 2)

    @torch.inference_mode()
    def residual(self, tokens: Tensor) -> Tensor:
        """tokens [B, N, C] -> f_rec - f_org [B, C, H, W], in the units that the model was trained in."""
        target = (tokens.to(self.device) - self.mean) / self.std
        return self._on_grid(self._reconstruct(target) - target)

    @torch.inference_mode()
    def reconstruction(self, tokens: Tensor) -> Tensor:
        """tokens [B, N, C] -> f_rec [B, C, H, W], in the units of the backbone's features."""
        target = (tokens.to(self.device) - self.mean) / self.std
        return self._on_grid(self._reconstruct(target) * self.std + self.mean)

    @torch.inference_mode()
    def grids(self, tokens: Tensor) -> Tensor:
        """tokens [B, N, C] -> anomaly scores per location [B, H, W] in float32."""
        return self.norm(self.residual(tokens), self.score)

    def norm(self, residual: Tensor, score: str) -> Tensor:
        """residual [B, C, H, W] -> [B, H, W] by one of `SCORES`, of which this scorer needs the buffers."""
        if score == "l2":
            return torch.linalg.vector_norm(residual, dim=1)
        norm = self.whitened_norm(residual[:, self.backbone.deepest])
        if score == "whitened":
            return norm
        assert self.typical is not None, "a scorer made for 'relative' has it"
        return norm / self.typical

    def whitened_norm(self, residual: Tensor) -> Tensor:
        """residual [B, C', H, W] of the deepest stage -> [B, H, W]: its Mahalanobis norm."""
        return torch.linalg.vector_norm(torch.einsum("dc,bchw->bdhw", self.whitening, residual), dim=1)

    def maps(self, tokens: Tensor) -> Tensor:
        """tokens [B, N, C] -> anomaly maps [B, S, S]."""
        return to_maps(self.grids(tokens), self.image_size)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, S, S] in [0, 1] -> anomaly maps [B, S, S]."""
        return self.maps(self.tokens(images))

    def _reconstruct(self, target: Tensor) -> Tensor:
        with autocast(self.precision, self.device):
            return self.model.reconstruct(target).float()

    def _on_grid(self, tokens: Tensor) -> Tensor:
        return tokens.transpose(1, 2).unflatten(2, self.model.feature_size)


def to_maps(grids: Tensor, image_size: int) -> Tensor:
    """[B, H, W] -> anomaly maps [B, S, S], bilinear with aligned corners."""
    size = (image_size, image_size)
    return F.interpolate(grids[:, None], size, mode="bilinear", align_corners=True)[:, 0]


def image_scores(maps: Tensor, kind: str) -> Tensor:
    """maps [B, S, S] -> [B]: "max" of the average-pooled map (section 3.3), or the map's "mean" or "std"."""
    if kind == "max":
        side = min(_POOL, *maps.shape[1:])
        # A square's mean as the mean of its columns' means: 2 * 16 additions a pixel, not 16 * 16.
        columns = F.avg_pool2d(maps[:, None], (side, 1), stride=1)
        return F.avg_pool2d(columns, (1, side), stride=1).amax(dim=(1, 2, 3))
    if kind == "mean":
        return maps.mean(dim=(1, 2))
    if kind == "std":
        return maps.flatten(1).std(dim=1)
    raise UniadFastError(f"image_score must be one of {', '.join(IMAGE_SCORES)}, got {kind!r}")
