"""Names and padding of EfficientNet-PyTorch, the public code's backbone, for timm's `tf_efficientnet_*`."""

import math
import re
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..state_dicts import StateDict, WeightsError

# timm name: (blocks, side in pixels of the images it was made for)
_MODELS = {
    "tf_efficientnet_b0": (16, 224),
    "tf_efficientnet_b1": (23, 240),
    "tf_efficientnet_b2": (23, 260),
    "tf_efficientnet_b3": (26, 300),
    "tf_efficientnet_b4": (32, 380),
    "tf_efficientnet_b5": (39, 456),
    "tf_efficientnet_b6": (45, 528),
    "tf_efficientnet_b7": (55, 600),
    "tf_efficientnet_lite0": (16, 224),
    "tf_efficientnet_lite1": (21, 240),
    "tf_efficientnet_lite2": (21, 260),
    "tf_efficientnet_lite3": (24, 280),
    "tf_efficientnet_lite4": (30, 300),
}
_OUTER = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
_EXPANDING = {
    "conv_pw": "_expand_conv",
    "bn1": "_bn0",
    "conv_dw": "_depthwise_conv",
    "bn2": "_bn1",
    "conv_pwl": "_project_conv",
    "bn3": "_bn2",
}
_FIRST_STAGE = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
_SQUEEZE = {"se.conv_reduce": "_se_reduce", "se.conv_expand": "_se_expand"}


def has_public_names(state: StateDict) -> bool:
    """Whether a backbone's tensors have EfficientNet-PyTorch's names."""
    return "_conv_stem.weight" in state


def public_names(timm_names: Iterable[str]) -> dict[str, str]:
    """{timm's name of a tensor: EfficientNet-PyTorch's} for the tensors of a `tf_efficientnet_*`, all of them."""
    timm_names = list(timm_names)
    blocks = sorted({(int(m[1]), int(m[2])) for m in (re.match(r"blocks\.(\d+)\.(\d+)\.", n) for n in timm_names) if m})
    number = {block: i for i, block in enumerate(blocks)}
    names = {}
    for name in timm_names:
        module, tensor = name.rsplit(".", 1)
        if match := re.match(r"blocks\.(\d+)\.(\d+)\.(.+)", module):
            stage, index = int(match[1]), int(match[2])
            inner = _SQUEEZE | (_EXPANDING if stage else _FIRST_STAGE)
            names[name] = f"_blocks.{number[stage, index]}.{inner[match[3]]}.{tensor}"
        else:
            names[name] = f"{_OUTER[module]}.{tensor}"
    return names


def recognize(state: StateDict) -> str:
    """The timm name of the EfficientNet that these tensors, under either's names, fit best.

    Raises:
        WeightsError: they are no EfficientNet's, or of one that is not known here.
    """
    import timm

    blocks = len({m[0] for m in (re.match(r"(_blocks\.\d+|blocks\.\d+\.\d+)\.", name) for name in state) if m})
    candidates = [name for name, (count, _) in _MODELS.items() if count == blocks]
    if not candidates or not ("conv_stem.weight" in state or has_public_names(state)):
        raise WeightsError(f"no known EfficientNet (b0 to b7, lite0 to lite4) has {blocks} blocks: say which backbone")

    def misfits(name: str) -> int:
        with torch.device("meta"):
            shapes = {n: t.shape for n, t in timm.create_model(name).state_dict().items()}
        if has_public_names(state):
            shapes = {public: shapes[own] for own, public in public_names(shapes).items()}
        given = {n: t.shape for n, t in state.items()}
        return sum(given.get(n) != shapes.get(n) for n in given.keys() | shapes.keys())

    return min(candidates, key=misfits)


def native_size(name: str) -> int | None:
    """Side in pixels of the images that this timm model was made for, if EfficientNet-PyTorch has it."""
    return _MODELS[name][1] if name in _MODELS else None


def pad_as_for(features: nn.Module, side: int) -> None:
    """Let a timm EfficientNet pad its strided convolutions as TensorFlow does for square images of this side in
    pixels.

    timm pads for the image that comes; EfficientNet-PyTorch for the one that the network was made for, whatever
    comes. The parameters stay the objects they are.
    """
    for name, conv in list(features.named_modules()):
        if isinstance(conv, nn.Conv2d) and conv.stride[0] > 1:
            features.set_submodule(name, _FixedPadding(conv, side))
            side = math.ceil(side / conv.stride[0])


class _FixedPadding(nn.Conv2d):
    """`conv` with the "same" padding of an input of one side, before its own parameters' names."""

    def __init__(self, conv: nn.Conv2d, side: int) -> None:
        options: dict[str, Any] = {"groups": conv.groups, "bias": conv.bias is not None, "device": "meta"}
        kernel, stride = (conv.kernel_size[0], conv.kernel_size[1]), (conv.stride[0], conv.stride[1])
        super().__init__(conv.in_channels, conv.out_channels, kernel, stride, **options)
        self.weight, self.bias = conv.weight, conv.bias
        total = [max((math.ceil(side / s) - 1) * s + k - side, 0) for k, s in zip(kernel, stride, strict=True)]
        (top, bottom), (left, right) = ((t // 2, t - t // 2) for t in total)
        self.sides = (left, right, top, bottom)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, self.sides))
