"""Features of EfficientNets, `tf_efficientnet_b0` to `b7` and `lite0` to `lite4`, by timm's names and to its bits.

They are the paper's backbone and the demo's. timm's import takes longer than torch's own, and its extractor computes
all stages, whatever is asked for: a detector that scores pictures needs neither. Every other model is timm's.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# name: factors of width and depth (EfficientNet, table 2 of the compound scaling; lite as TensorFlow publishes them).
_SCALES = {
    "b0": (1.0, 1.0), "b1": (1.0, 1.1), "b2": (1.1, 1.2), "b3": (1.2, 1.4), "b4": (1.4, 1.8), "b5": (1.6, 2.2),
    "b6": (1.8, 2.6), "b7": (2.0, 3.1), "lite0": (1.0, 1.0), "lite1": (1.0, 1.1), "lite2": (1.1, 1.2),
    "lite3": (1.2, 1.4), "lite4": (1.4, 1.8),
}  # fmt: skip
_PREFIX = "tf_efficientnet_"
_STEM = 32
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_HALVES = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
_EPSILON = 1e-3  # of the norms, as TensorFlow has it
# Blocks, kernel, stride of the first, expansion, channels, of each stage of b0.
_STAGES = (
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)  # fmt: skip
_LEVELS = (0, 1, 2, 4, 6)
"""The stage at whose end each feature level lies, one for each stride from 2 to 32."""


def default_levels() -> tuple[int, ...]:
    """All of stride 16 and finer, stages 1 to 4 of the paper."""
    return 0, 1, 2, 3


def is_native(name: str) -> bool:
    """Whether the features of this timm model are made here."""
    return name.removeprefix(_PREFIX) in _SCALES and name.startswith(_PREFIX)


@dataclass(frozen=True)
class FeatureInfo:
    """What a backbone asks of an extractor's levels, as timm's of that name answers it."""

    out_indices: tuple[int, ...]
    all_channels: tuple[int, ...]

    def channels(self) -> list[int]:
        """Of each level that is given."""
        return [self.all_channels[level] for level in self.out_indices]

    def reduction(self) -> list[int]:
        """Stride of each level that is given."""
        return [2 ** (level + 1) for level in self.out_indices]


class EfficientNetFeatures(nn.Module):
    """images [B, 3, h, w] -> feature maps of the levels `out_indices`, for evaluation.

    Args:
        name: see `is_native`.
        out_indices: levels from 0 (stride 2) to 4 (stride 32), rising.

    Raises:
        IndexError: there is no such level.
    """

    output_fmt = "NCHW"
    pretrained_cfg: Mapping[str, Any]
    """Mean and deviation of the images that it was trained on, "mean" and "std"."""

    def __init__(self, name: str, out_indices: Sequence[int]) -> None:
        super().__init__()
        size = name.removeprefix(_PREFIX)
        width, depth = _SCALES[size]
        lite = size.startswith("lite")
        stem = _STEM if lite else _rounded(_STEM * width)
        self.conv_stem = _SameConv(3, stem, 3, stride=2, bias=False)
        activation = F.relu6 if lite else F.silu
        self.bn1 = _Norm(stem, activation)
        channels, stages = stem, []
        for number, (count, kernel, stride, expansion, base) in enumerate(_STAGES):
            out = _rounded(base * width)
            fixed = lite and number in (0, len(_STAGES) - 1)
            blocks: list[nn.Module] = []
            for index in range(count if fixed else math.ceil(count * depth)):
                options = (channels, out, kernel, stride if index == 0 else 1, activation, not lite)
                blocks.append(_Separable(*options) if expansion == 1 else _Inverted(*options, expansion))
                channels = out
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*stages)
        if not all(0 <= level < len(_LEVELS) for level in out_indices):
            raise IndexError(f"levels are from 0 to {len(_LEVELS) - 1}")
        self.pretrained_cfg = _HALVES if lite else _IMAGENET
        widths = tuple(_rounded(_STAGES[stage][4] * width) for stage in _LEVELS)
        self.feature_info = FeatureInfo(tuple(out_indices), widths)

    @property
    def stages(self) -> int:
        """How many of `blocks` are computed: those behind the deepest level that is asked for are not."""
        return _LEVELS[max(self.feature_info.out_indices)] + 1

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.bn1(self.conv_stem(images))
        wanted = [_LEVELS[level] for level in self.feature_info.out_indices]
        features = []
        for number in range(self.stages):
            x = self.blocks[number](x)
            if number in wanted:
                features.append(x)
        return features


def with_folded_norms(features: EfficientNetFeatures) -> EfficientNetFeatures:
    """A copy in which each norm is part of the convolution before it: the same features to rounding, sooner."""
    folded = copy.deepcopy(features, {id(tensor): tensor for tensor in features.state_dict(keep_vars=True).values()})
    folded.blocks = folded.blocks[: folded.stages]
    blocks = [block for stage in folded.blocks.children() for block in stage.children()]
    with torch.no_grad():
        for owner in [folded, *blocks]:
            for conv, norm in _PAIRS[type(owner)]:
                setattr(owner, norm, _fold(getattr(owner, conv), getattr(owner, norm)))
    return folded.requires_grad_(False)


def _fold(conv: nn.Conv2d, norm: "_Norm") -> "_Activation":
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    conv.weight = nn.Parameter(conv.weight * scale[:, None, None, None])
    conv.bias = nn.Parameter(norm.bias - norm.running_mean * scale)
    return _Activation(norm.activation)


class _SameConv(nn.Conv2d):
    """Padded as TensorFlow does: for the image that comes, more at the end than at the beginning."""

    def forward(self, input: Tensor) -> Tensor:
        sides: list[int] = []
        for size, kernel, stride in zip(input.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            sides += [total // 2, total - total // 2]
        return super().forward(F.pad(input, sides))


def _conv(channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    if stride > 1:
        return _SameConv(channels, out, kernel, stride=stride, groups=groups, bias=False)
    return nn.Conv2d(channels, out, kernel, padding=kernel // 2, groups=groups, bias=False)


class _Norm(nn.BatchNorm2d):
    """BatchNorm, and the activation after it."""

    def __init__(self, channels: int, activation: object = None) -> None:
        super().__init__(channels, eps=_EPSILON)
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        x = super().forward(input)
        return self.activation(x, inplace=True) if callable(self.activation) else x


class _Activation(nn.Module):
    """What is left of a norm that has been folded."""

    def __init__(self, activation: object) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x, inplace=True) if callable(self.activation) else x


class _Squeeze(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int, reduced: int) -> None:
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, reduced, 1)
        self.conv_expand = nn.Conv2d(reduced, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.conv_reduce(x.mean((2, 3), keepdim=True))
        return x * self.conv_expand(F.silu(pooled, inplace=True)).sigmoid()


class _Separable(nn.Module):
    """Depthwise, squeeze, pointwise."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, activation: object, squeeze: bool) -> None:
        super().__init__()
        self.conv_dw = _conv(channels, channels, kernel, stride, channels)
        self.bn1 = _Norm(channels, activation)
        self.se = _Squeeze(channels, channels // 4) if squeeze else nn.Identity()
        self.conv_pw = _conv(channels, out, 1)
        self.bn2 = _Norm(out)
        self.has_skip = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv_pw(self.se(self.bn1(self.conv_dw(x)))))
        return out + x if self.has_skip else out


class _Inverted(nn.Module):
    """Expand, depthwise, squeeze, project."""

    def __init__(
        self,
        channels: int,
        out: int,
        kernel: int,
        stride: int,
        activation: object,
        squeeze: bool,
        expansion: int,
    ) -> None:
        super().__init__()
        inner = channels * expansion
        self.conv_pw = _conv(channels, inner, 1)
        self.bn1 = _Norm(inner, activation)
        self.conv_dw = _conv(inner, inner, kernel, stride, inner)
        self.bn2 = _Norm(inner, activation)
        self.se = _Squeeze(inner, channels // 4) if squeeze else nn.Identity()
        self.conv_pwl = _conv(inner, out, 1)
        self.bn3 = _Norm(out)
        self.has_skip = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv_dw(self.bn1(self.conv_pw(x))))
        out = self.bn3(self.conv_pwl(self.se(out)))
        return out + x if self.has_skip else out


# Of convolutions and the norms that follow them.
_PAIRS: dict[type[nn.Module], tuple[tuple[str, str], ...]] = {
    EfficientNetFeatures: (("conv_stem", "bn1"),),
    _Separable: (("conv_dw", "bn1"), ("conv_pw", "bn2")),
    _Inverted: (("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3")),
}


def _rounded(channels: float) -> int:
    """To a multiple of 8, not more than a tenth below."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded
