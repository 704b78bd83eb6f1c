"""What training minimises, as one module: for the loop, and for whatever wraps a module."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UniadFastError
from ..models.precision import autocast
from ..models.reconstructor import Reconstructor
from ..rows import TokenRows


class ReconstructionLoss(nn.Module):
    """tokens [B, N, C] -> the loss of reconstructing (tokens - mean) / std, a scalar in float32.

    Args:
        model: the network; its parameters are what is trained.
        mean, std: per channel, [C], of the backbone's features.
        loss: (reconstruction, target) -> scalar.
        precision: in which the network computes, see `uniad_fast.models.precision`.
        locations: bool [N], those whose reconstruction counts; None for all.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: Reconstructor,
        mean: Tensor,
        std: Tensor,
        loss: Callable[[Tensor, Tensor], Tensor],
        precision: str = "float32",
        locations: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.precision = precision
        device = next(model.parameters()).device
        # Numbers, since a mask has to be read back from a GPU to say how many they are.
        self._locations = None if locations is None else locations.nonzero()[:, 0].to(device)
        self.register_buffer("mean", mean.to(device))
        self.register_buffer("std", std.to(device))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, N, C] in the units of the backbone, on any device -> scalar."""
        device = self.mean.device
        target = (tokens.to(device) - self.mean) / self.std
        with autocast(self.precision, device):
            reconstruction = self.model.reconstruct(target)
        reconstruction = reconstruction.float()
        if self._locations is not None:
            reconstruction, target = (t.index_select(1, self._locations) for t in (reconstruction, target))
        return self.loss(reconstruction, target)


def channel_statistics(tokens: TokenRows) -> tuple[Tensor, Tensor]:
    """Mean and deviation per channel, [C] each, of tokens [images, N, C]; a constant channel has deviation 1."""
    channels = tokens.shape[-1]
    total, squares, count = np.zeros(channels), np.zeros(channels), 0
    for start in range(0, len(tokens), 256):
        chunk = tokens[start : start + 256].reshape(-1, channels).astype(np.float64)
        total += chunk.sum(axis=0)
        squares += np.square(chunk).sum(axis=0)
        count += len(chunk)
    mean = total / count
    if not (np.isfinite(mean).all() and np.isfinite(squares).all()):
        raise UniadFastError("the features of the training images are not all finite")
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    std[std < 1e-6 * (np.abs(mean) + 1e-6)] = 1
    return torch.from_numpy(mean).float(), torch.from_numpy(std).float()
