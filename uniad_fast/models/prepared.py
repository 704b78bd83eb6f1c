"""A backbone made ready for many images in eager PyTorch."""

import copy

import torch
from torch import Tensor, nn

from .backbone import Backbone
from .efficientnet_features import EfficientNetFeatures, with_folded_norms


def prepared(backbone: Backbone, precision: str = "float32") -> Backbone:
    """A copy for inference that shares what it can: norms folded where they are this package's, in that precision."""
    own = copy.copy(backbone)
    own._modules = dict(backbone._modules)
    features = backbone.features
    if isinstance(features, EfficientNetFeatures) and backbone.padded_for is None:
        features = with_folded_norms(features)
    if precision != "float32":
        features = _InBfloat16(features)
    own.features = features
    return own


class _InBfloat16(nn.Module):
    """Feature maps as float32, computed in bfloat16."""

    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        self.features = copy.deepcopy(features).to(torch.bfloat16)  # tensors that it shares stay as they are

    def forward(self, images: Tensor) -> list[Tensor]:
        return [stage.float() for stage in self.features(images.to(torch.bfloat16))]
