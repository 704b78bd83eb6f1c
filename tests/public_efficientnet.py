"""EfficientNet-b4 as EfficientNet-PyTorch names, pads and computes it, on tensors alone: no timm, no modules."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

NATIVE = 380
STAGES = [  # repeats, kernel, stride, expansion, channels in, channels out
    (2, 3, 1, 1, 48, 24),
    (4, 3, 2, 6, 24, 32),
    (4, 5, 2, 6, 32, 56),
    (6, 3, 2, 6, 56, 112),
    (6, 5, 1, 6, 112, 160),
    (8, 5, 2, 6, 160, 272),
    (2, 3, 1, 6, 272, 448),
]
TAKEN = (0, 1, 2, 4)  # stages after which the grid gets coarser: strides 2, 4, 8, 16
BLOCKS = [
    (kernel, stride if first == 0 else 1, expansion, inner if first == 0 else out, out, stage, first == repeats - 1)
    for stage, (repeats, kernel, stride, expansion, inner, out) in enumerate(STAGES)
    for first in range(repeats)
]


def random_tensors() -> dict[str, Tensor]:
    """A state dict whose activations neither vanish nor explode."""
    state: dict[str, Tensor] = {}

    def conv(name: str, out: int, inner: int, kernel: int, bias: bool = False) -> None:
        state[f"{name}.weight"] = torch.randn(out, inner, kernel, kernel) / math.sqrt(inner * kernel**2 / 2)
        if bias:
            state[f"{name}.bias"] = torch.randn(out) / 10

    def norm(name: str, channels: int) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = 0.8 + torch.rand(channels) / 5, torch.randn(channels) / 10
        state[f"{name}.running_mean"] = torch.randn(channels) / 10
        state[f"{name}.running_var"] = 0.5 + torch.rand(channels)
        state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    conv("_conv_stem", 48, 3, 3)
    norm("_bn0", 48)
    for number, (kernel, _, expansion, inner, out, _, _) in enumerate(BLOCKS):
        block, wide = f"_blocks.{number}", inner * expansion
        if expansion > 1:
            conv(f"{block}._expand_conv", wide, inner, 1)
            norm(f"{block}._bn0", wide)
        conv(f"{block}._depthwise_conv", wide, 1, kernel)
        norm(f"{block}._bn1", wide)
        conv(f"{block}._se_reduce", inner // 4, wide, 1, bias=True)
        conv(f"{block}._se_expand", wide, inner // 4, 1, bias=True)
        conv(f"{block}._project_conv", out, wide, 1)
        norm(f"{block}._bn2", out)
    conv("_conv_head", 1792, 448, 1)
    norm("_bn1", 1792)
    state["_fc.weight"], state["_fc.bias"] = torch.randn(1000, 1792) / 40, torch.zeros(1000)
    return state


@torch.no_grad()
def features(state: dict[str, Tensor], images: Tensor, padded_for: int = NATIVE) -> Tensor:
    """Normalised images -> the four stages, resized to the last one's grid and concatenated."""

    def norm(name: str, x: Tensor) -> Tensor:
        values = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *values, eps=1e-3)

    side = padded_for

    def strided(name: str, x: Tensor, kernel: int, stride: int, groups: int) -> Tensor:
        nonlocal side
        total = max((math.ceil(side / stride) - 1) * stride + kernel - side, 0)
        side = math.ceil(side / stride)
        x = F.pad(x, [total // 2, total - total // 2] * 2)
        return F.conv2d(x, state[f"{name}.weight"], stride=stride, groups=groups)

    x = F.silu(norm("_bn0", strided("_conv_stem", images, 3, 2, 1)))
    stages = []
    for number, (kernel, stride, expansion, inner, out, stage, last) in enumerate(BLOCKS):
        block, before = f"_blocks.{number}", x
        if expansion > 1:
            x = F.silu(norm(f"{block}._bn0", F.conv2d(x, state[f"{block}._expand_conv.weight"])))
        x = F.silu(norm(f"{block}._bn1", strided(f"{block}._depthwise_conv", x, kernel, stride, x.shape[1])))
        squeezed = x.mean(dim=(2, 3), keepdim=True)
        squeezed = F.silu(F.conv2d(squeezed, state[f"{block}._se_reduce.weight"], state[f"{block}._se_reduce.bias"]))
        squeezed = F.conv2d(squeezed, state[f"{block}._se_expand.weight"], state[f"{block}._se_expand.bias"])
        x = norm(f"{block}._bn2", F.conv2d(x * squeezed.sigmoid(), state[f"{block}._project_conv.weight"]))
        if stride == 1 and inner == out:
            x = x + before
        if last and stage in TAKEN:
            stages.append(x)
    size = stages[-1].shape[-2:]
    return torch.cat([F.interpolate(s, size, mode="bilinear", align_corners=True) for s in stages], dim=1)
