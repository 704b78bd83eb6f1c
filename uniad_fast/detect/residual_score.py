"""How a residual becomes a score for every location, and a map a score for the image.

A residual is f_rec - f_org per location. A detector's `residual_score` makes one number of it:

    "l2"        its L2 norm over the channels (paper, section 3.3)
    "whitened"  the Mahalanobis norm of its deepest stage: the L2 norm after whitening by the residuals of good
                images, so that what is always reconstructed badly counts for less, and what never fails for more
    "relative"  the same, divided by its mean over good images at that location: places differ, and those at the
                border, whose context lies on one side, are reconstructed worse
    "gaussian"  the Mahalanobis distance of its deepest stage from what good images of the same class have at that
                place, see `uniad_fast.detect.good_gaussians`

Its `image_score` makes one number of the map: "max" of the average-pooled map (section 3.3), or its "mean" or "std".
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UniadFastError
from .good_gaussians import GoodGaussians

RESIDUAL_SCORES = ("l2", "whitened", "relative", "gaussian")
IMAGE_SCORES = ("max", "mean", "std")
_BATCH = 32
_POOL = 16
_SHRINKAGE = 1e-2


class ResidualScore(nn.Module):
    """residual [B, C, H, W], fields [B] -> score map [B, H, W] in float32.

    All but "l2" have to be fitted to good images (`fit`, or for "gaussian" `GoodGaussians.set`).

    Args:
        kind: one of `RESIDUAL_SCORES`.
        deepest: the channels of the backbone's deepest stage.
        feature_size: (H, W).
        fields: of "gaussian", how many Gaussian fields there are; the others know no classes.

    Raises:
        UniadFastError: there is no such kind.
    """

    whitening: Tensor | None  # [C', C'] for the C' channels of the deepest stage
    typical: Tensor | None  # [H, W]

    def __init__(self, kind: str, deepest: slice, feature_size: tuple[int, int], fields: int = 1) -> None:
        super().__init__()
        if kind not in RESIDUAL_SCORES:
            raise UniadFastError(f"residual_score must be one of {', '.join(RESIDUAL_SCORES)}, got {kind!r}")
        self.kind = kind
        self.deepest = deepest
        channels = deepest.stop - deepest.start
        self.register_buffer("whitening", torch.eye(channels) if kind in ("whitened", "relative") else None)
        self.register_buffer("typical", torch.ones(feature_size) if kind == "relative" else None)
        places = feature_size[0] * feature_size[1]
        self.gaussians = GoodGaussians(fields, places, channels) if kind == "gaussian" else None

    def forward(self, residual: Tensor, fields: Tensor | None = None) -> Tensor:
        """fields: for "gaussian", which of its Gaussian fields each image is measured by; None for the last."""
        if self.kind == "l2":
            return torch.linalg.vector_norm(residual, dim=1)
        deepest = residual[:, self.deepest]
        if self.gaussians is not None:
            if fields is None:
                fields = torch.full((len(residual),), self.gaussians.fields - 1, device=residual.device)
            distances = self.gaussians(deepest.flatten(2).transpose(1, 2), fields)
            return distances.unflatten(1, tuple(residual.shape[2:]))
        norm = self._whitened(deepest)
        return norm if self.typical is None else norm / self.typical

    def fit(self, residuals: Tensor) -> None:
        """Set `whitening` and `typical` from residuals [images, C', H, W] of good images, of the deepest stage alone.

        Raises:
            UniadFastError: they are not finite, or all zero.
        """
        assert self.whitening is not None
        device = self.whitening.device
        self.whitening = whitening_of(residuals).to(device)
        if self.typical is not None:
            norms = torch.cat([self._whitened(batch) for batch in residuals.split(_BATCH)])
            self.typical = norms.mean(dim=0)  # never 0: whitened residuals do not vanish

    def _whitened(self, residual: Tensor) -> Tensor:
        """residual [B, C', H, W] of the deepest stage -> [B, H, W]: its Mahalanobis norm."""
        return torch.linalg.vector_norm(torch.einsum("dc,bchw->bdhw", self.whitening, residual), dim=1)


def whitening_of(residuals: Tensor) -> Tensor:
    """[C, C] float32 that makes these residuals [B, C, H, W] white.

    A share of the mean variance is added to every direction, so that those in which good images never fail do not
    drown the rest.

    Raises:
        UniadFastError: the residuals are not finite, or all zero.
    """
    channels = residuals.shape[1]
    covariance, count = torch.zeros(channels, channels, dtype=torch.float64), 0
    for batch in residuals.split(_BATCH):
        rows = batch.transpose(0, 1).flatten(1).double().cpu()  # [C, B * N]
        covariance += rows @ rows.T
        count += rows.shape[1]
    covariance /= count
    if not covariance.isfinite().all() or not covariance.diagonal().mean() > 0:
        raise UniadFastError("the residuals of good images are not finite, or all zero: no score can be fitted to them")
    covariance += _SHRINKAGE * covariance.diagonal().mean() * torch.eye(channels, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors / values.sqrt() @ vectors.T).float()


def image_scores(maps: Tensor, kind: str, step: int = 1) -> Tensor:
    """maps [B, height, width] -> [B], by one of `IMAGE_SCORES`; a value stands for `step` x `step` pixels.

    Raises:
        UniadFastError: there is no such kind.
    """
    if kind == "max":
        side = min(_POOL // step, *maps.shape[1:])
        # A square's mean as the mean of its columns' means: 2 * 16 additions a pixel, not 16 * 16.
        columns = F.avg_pool2d(maps[:, None], (side, 1), stride=1)
        return F.avg_pool2d(columns, (1, side), stride=1).amax(dim=(1, 2, 3))
    if kind == "mean":
        return maps.mean(dim=(1, 2))
    if kind == "std":
        return maps.flatten(1).std(dim=1)
    raise UniadFastError(f"image_score must be one of {', '.join(IMAGE_SCORES)}, got {kind!r}")
