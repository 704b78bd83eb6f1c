"""What every network that reconstructs feature maps has in common: the public code's forward."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.geometry import Size, size_pair


class Reconstructor(nn.Module):
    """Reconstructs a feature map; the anomaly map is where it fails (paper, section 3.3).

    B batch, C_org channels of the feature map, H x W its grid. Subclasses define `reconstruct`.

    Args:
        inplanes: channels of the feature map, [C_org] or C_org.
        instrides: stride of the feature map in the image, [stride] or stride; `pred` is enlarged by it.
        feature_size: (H, W).

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, inplanes: Sequence[int] | int, instrides: Sequence[int] | int, feature_size: Size) -> None:
        super().__init__()
        self.inplanes = _single("inplanes", inplanes)
        self.stride = _single("instrides", instrides)
        self.feature_size = size_pair("feature_size", feature_size)

    def reconstruct(self, tokens: Tensor) -> Tensor:
        """tokens [B, N, C_org] -> their reconstruction, same shape."""
        raise NotImplementedError

    def forward(self, input: Mapping[str, Any]) -> dict[str, Tensor]:
        """Reconstruct `input["feature_align"]` [B, C_org, H, W].

        Returns:
            "feature_rec" [B, C_org, H, W]; "feature_align", the input; "pred" [B, 1, H * stride, W * stride], the
            L2 norm over channels of their difference (section 3.3), bilinear with aligned corners.

        Raises:
            ValueError: the feature map has other channels or another grid.
        """
        feature = input["feature_align"]
        if feature.ndim != 4 or feature.shape[1:] != (self.inplanes, *self.feature_size):
            raise ValueError(
                f"feature_align must be [B, {self.inplanes}, {self.feature_size[0]}, {self.feature_size[1]}], "
                f"got {tuple(feature.shape)}"
            )
        tokens = feature.flatten(2).transpose(1, 2)  # [B, N, C_org]
        reconstruction = self.reconstruct(tokens).transpose(1, 2).unflatten(2, self.feature_size)
        return {
            "feature_rec": reconstruction,
            "feature_align": feature,
            "pred": enlarge(anomaly_grid(feature, reconstruction), self.stride),
        }


def anomaly_grid(feature: Tensor, reconstruction: Tensor) -> Tensor:
    """s = ||f_org - f_rec||_2 per location (section 3.3): two [B, C_org, H, W] -> [B, 1, H, W] in float32."""
    return torch.linalg.vector_norm(reconstruction.float() - feature.float(), dim=1, keepdim=True)


def enlarge(grid: Tensor, stride: int) -> Tensor:
    """[B, 1, H, W] -> [B, 1, H * stride, W * stride], bilinear with aligned corners."""
    return F.interpolate(grid, scale_factor=stride, mode="bilinear", align_corners=True)


def _single(name: str, value: Sequence[int] | int) -> int:
    values = [value] if isinstance(value, int) else list(value)
    if len(values) != 1 or values[0] < 1:
        raise ValueError(f"{name} must be one integer >= 1, or a list of one, got {value!r}")
    return values[0]
