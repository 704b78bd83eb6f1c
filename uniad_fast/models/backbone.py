"""Frozen features: a timm backbone's stages, resized to the coarsest grid and concatenated (paper, section 3.3)."""

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UniadFastError
from ..image_size import ImageSize, size_of
from ..ops.geometry import Size
from ..state_dicts import (
    StateDict,
    assign,
    check_state_dict,
    hash_of_state_dict,
    packaged_backbone_weights,
    read_state_dict,
    without_values,
)
from .backbone_weights import downloaded, in_timm_names
from .efficientnet import pad_as_for
from .efficientnet_features import EfficientNetFeatures, default_levels, is_native
from .timm_features import create, create_without_values, default_out_indices, tensors_of_whole

_COUNTER = "num_batches_tracked"


class Backbone(nn.Module):
    """A frozen timm feature extractor, always in evaluation mode. Make one with `pretrained` or `from_state`.

    Attributes:
        name: timm model name.
        out_indices: feature levels used, timm's numbering.
        channels: of the concatenated feature map.
        deepest: those of them that are the last stage's.
        stride: of its grid in the image: that of the coarsest level, or another that the levels are resized to.
        padded_for: side of the square images whose padding its strided convolutions have, see
            `efficientnet.pad_as_for`; None for that of the image that comes.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        features: Any,
        out_indices: tuple[int, ...],
        padded_for: int | None = None,
        stride: int | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.out_indices = out_indices
        self.padded_for = padded_for
        if padded_for is not None:
            pad_as_for(features, padded_for)
        # Depthwise convolutions run about five times faster on a CPU in this memory format.
        self.features = features.eval().requires_grad_(False)
        kernels = [p for p in features.parameters() if p.ndim == 4]
        if not all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels):
            self.features = features.to(memory_format=torch.channels_last)
        info = features.feature_info
        self.channels = sum(info.channels())
        self.deepest = slice(self.channels - info.channels()[-1], self.channels)
        self.strides = tuple(info.reduction())
        self.stride = max(self.strides) if stride is None else stride
        self.channels_last_output = str(getattr(features, "output_fmt", "NCHW")).endswith("NHWC")
        # What the backbone was trained with: ImageNet's figures for the paper's b4, 0.5 for the lite ones.
        config = features.pretrained_cfg
        self.register_buffer("mean", torch.tensor(config["mean"]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(config["std"]).view(3, 1, 1))

    @classmethod
    def pretrained(
        cls,
        name: str,
        image_size: ImageSize,
        weights: str | os.PathLike | None = None,
        out_indices: tuple[int, ...] | None = None,
        stride: int | None = None,
    ) -> "Backbone":
        """The backbone `name` with trained weights.

        Args:
            name: any timm model that gives features, e.g. "tf_efficientnet_b4", the paper's.
            image_size: (height, width) of the images in pixels, or the side of a square.
            weights: a .pth or .safetensors file with timm's names, or EfficientNet-PyTorch's. None takes what an
                installed package ships, and else what timm downloads from its hub.
            out_indices: feature levels; None takes all of stride 16 and finer, stages 1 to 4 of the paper.
            stride: of the grid that all levels are resized to; None is the coarsest level's.

        Raises:
            UniadFastError: unknown name, or feature levels that it does not have.
            WeightsError: a weight file that does not fit, or there is none and timm could not download one.
        """
        out_indices = out_indices or default_out_indices(name, image_size)
        weights = weights or packaged_backbone_weights(name)
        if weights is None:
            features = downloaded(name, image_size, out_indices)
            return cls(name, _native(name, features), out_indices, stride=stride)
        whole = tensors_of_whole(name, image_size)
        state = in_timm_names(read_state_dict(weights), whole)
        check_state_dict(state, whole, f"{name} weights")
        features = create(name, image_size, out_indices, pretrained=True, pretrained_cfg_overlay={"state_dict": state})
        return cls(name, _native(name, features), out_indices, stride=stride)

    @classmethod
    def from_state(
        cls,
        name: str,
        image_size: ImageSize,
        out_indices: tuple[int, ...] | None,
        state: StateDict,
        padded_for: int | None = None,
        stride: int | None = None,
    ) -> "Backbone":
        """The backbone `name` from the state dict of another one's `features`, or of the whole classifier.

        Every tensor that the features need must be there; what is there beyond must be the classifier's.

        Raises:
            WeightsError: a tensor is missing, unknown or of another shape; all are listed.
        """
        features = _without_values(name, image_size, out_indices)
        own = features.state_dict()
        if own.keys() != state.keys():
            whole = tensors_of_whole(name, image_size)
            state = in_timm_names(state, whole)
            # Of training only, and left out by some files.
            counters = {n: torch.zeros_like(t, device="cpu") for n, t in own.items() if n.endswith(_COUNTER)}
            state = counters | state
            beyond = {n: t for n, t in whole.items() if n in state}
            check_state_dict(state, beyond | own, f"{name} weights")
        check_state_dict({n: t for n, t in state.items() if n in own}, own, f"{name} weights")
        assign(features, {n: state[n] for n in own})
        return cls(name, features, tuple(features.feature_info.out_indices), padded_for, stride)

    def normalize_by(self, mean: Sequence[float], std: Sequence[float]) -> "Backbone":
        """Take these for the three channels of images in [0, 1] instead of what timm says; returns self."""
        self.mean.copy_(torch.tensor(mean).view(3, 1, 1))
        self.std.copy_(torch.tensor(std).view(3, 1, 1))
        return self

    def feature_size(self, image_size: ImageSize) -> Size:
        """(height, width) of the feature map of an image of this size."""
        probe = torch.zeros(1, 3, *size_of(image_size), device=self.mean.device)
        height, width = self(probe).shape[-2:]
        return height, width

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, h, w] in [0, 1] -> feature map [B, channels, H, W], float32.

        Every stage is resized bilinearly with aligned corners, as the public code does.
        """
        normalized = ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        stages = self.features(normalized)
        if self.channels_last_output:
            stages = [stage.permute(0, 3, 1, 2) for stage in stages]
        size = self._size_of(images, stages)
        aligned = [
            stage
            if tuple(stage.shape[-2:]) == size
            else F.interpolate(stage, size, mode="bilinear", align_corners=True)
            for stage in stages
        ]
        return torch.cat(aligned, dim=1).float()

    def _size_of(self, images: Tensor, stages: Sequence[Tensor]) -> Size:
        for stage, stride in zip(stages, self.strides, strict=True):
            if stride == self.stride:
                return stage.shape[-2], stage.shape[-1]
        height, width = images.shape[-2:]
        return math.ceil(height / self.stride), math.ceil(width / self.stride)

    def train(self, mode: bool = True) -> "Backbone":
        """Frozen: batch statistics never change, whatever the mode of the module around it."""
        return super().train(False)

    def fingerprint(self) -> str:
        """Identifies the features it gives: name, levels, weights, normalisation of the input."""
        padding = f" padded for {self.padded_for}" if self.padded_for else ""
        padding += f" at stride {self.stride}" if self.stride != max(self.strides) else ""
        return f"{self.name} {self.out_indices}{padding} {hash_of_state_dict(self.state_dict())}"


def _native(name: str, features: Any) -> Any:
    """timm's extractor, or our own of its tensors, which computes no more than is asked for."""
    if not is_native(name):
        return features
    with without_values():
        own = EfficientNetFeatures(name, features.feature_info.out_indices)
    assign(own, features.state_dict())
    own.pretrained_cfg = features.pretrained_cfg
    return own


def _without_values(name: str, image_size: ImageSize, out_indices: tuple[int, ...] | None) -> Any:
    """The extractor, as far as can be without memory; of the native ones without timm."""
    if is_native(name):
        try:
            with without_values():
                return EfficientNetFeatures(name, out_indices or default_levels())
        except IndexError as error:
            raise UniadFastError(f"{name} has no feature levels {out_indices}: {error}") from None
    levels = out_indices or default_out_indices(name, image_size)
    features = create_without_values(name, image_size, levels)
    return create(name, image_size, levels) if features is None else features
