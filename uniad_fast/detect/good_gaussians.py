"""What good looks like at each place of each class: a Gaussian, and the distance of a vector from it.

Class k has at location l the mean m_kl and the covariance S_kl (Defard et al., PaDiM, 2021, has one for each
location). The distance is Mahalanobis's, so it is on one scale for all places and classes: sqrt(C) for a good vector
of C channels.

A covariance for each place of each class would be large. What is kept of it is a whitening for the class, and for each
place the directions in which it differs from that: as many as it takes for the two Gaussians to be nearly the same
(`fitted_gaussian`).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

_LOST = 0.25  # nats of Kullback and Leibler's divergence that leaving out directions may cost, on average over places


class GoodGaussians(nn.Module):
    """x [B, N, C], classes [B] -> Mahalanobis distances [B, N] in float32.

    K Gaussian fields, one for each class and, where there is more than one class, a last one for all of them together.
    All are buffers: `means` [K, N, C], `whitening` [K, C, C], `scale` [K, N], and for the R directions of all classes
    one after the other, `ranks` [K] of them, `directions` [N, R, C] in float16 with `signs` [N, R].
    """

    means: Tensor
    whitening: Tensor
    scale: Tensor
    ranks: Tensor
    directions: Tensor
    signs: Tensor

    def __init__(self, fields: int, locations: int, channels: int, directions: int = 0) -> None:
        super().__init__()
        self.register_buffer("means", torch.zeros(fields, locations, channels))
        self.register_buffer("whitening", torch.zeros(fields, channels, channels))
        self.register_buffer("scale", torch.ones(fields, locations))
        self.register_buffer("ranks", torch.zeros(fields, dtype=torch.int64))
        self.register_buffer("directions", torch.zeros(locations, directions, channels, dtype=torch.float16))
        self.register_buffer("signs", torch.zeros(locations, directions))

    @property
    def fields(self) -> int:
        """K."""
        return self.means.shape[0]

    @property
    def is_consistent(self) -> bool:
        """Whether its ranks are those of its directions."""
        return bool((self.ranks >= 0).all()) and int(self.ranks.sum()) == self.directions.shape[1]

    def set(self, fitted: "list[FittedGaussian]") -> None:
        """Take these, one for each field."""
        device = self.means.device
        self.means = torch.stack([one.means for one in fitted]).to(device)
        self.whitening = torch.stack([one.whitening for one in fitted]).to(device)
        self.scale = torch.stack([one.scale for one in fitted]).to(device)
        self.ranks = torch.tensor([one.directions.shape[1] for one in fitted], device=device)
        self.directions = torch.cat([one.directions for one in fitted], dim=1).to(device)
        self.signs = torch.cat([one.signs for one in fitted], dim=1).to(device)

    def forward(self, x: Tensor, classes: Tensor) -> Tensor:
        distances = x.new_zeros(x.shape[:2], dtype=torch.float32)
        ends = self.ranks.cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        for k in classes.unique().tolist():
            rows = (classes == k).nonzero()[:, 0]
            directions = slice(starts[k], ends[k])
            white = (x[rows].float() - self.means[k]) @ self.whitening[k].T  # [b, N, C]
            along = torch.einsum("bnc,nrc->bnr", white, self.directions[:, directions].float())
            squares = white.square().sum(dim=2) * self.scale[k]
            squares += (along.square() * self.signs[:, directions]).sum(dim=2)
            distances[rows] = squares.clamp_min(0).sqrt()
        return distances


class FittedGaussian(NamedTuple):
    """One class's, as `GoodGaussians` keeps it, without the first dimension."""

    means: Tensor
    whitening: Tensor
    scale: Tensor
    directions: Tensor
    signs: Tensor


def fitted_gaussian(means: Tensor, covariances: Tensor) -> FittedGaussian:
    """One class's Gaussians: means [N, C], positive definite covariances [N, C, C].

    With W the whitening of the mean covariance, W S_l W^T has the eigenvectors v and eigenvalues e. Those whose e is
    furthest from their middle are kept; the others get one value t, their mean, which is the one that loses least.
    """
    middle = covariances.mean(dim=0).double()
    values, vectors = torch.linalg.eigh(middle)
    whitening = (vectors / values.sqrt() @ vectors.T).float()
    values, vectors = torch.linalg.eigh(whitening @ covariances @ whitening.T)  # [N, C], [N, C, C]
    values = values.clamp_min(1e-6)
    logs = values.log()
    order = (logs - logs.median(dim=1, keepdim=True).values).abs().argsort(dim=1, descending=True)
    values = values.gather(1, order)
    vectors = vectors.gather(2, order[:, None].expand_as(vectors))
    rank = _least_rank(values)
    rest = values[:, rank:].mean(dim=1) if rank < values.shape[1] else values.new_ones(len(values))
    gains = 1 / values[:, :rank] - 1 / rest[:, None]
    directions = (vectors[:, :, :rank] * gains.abs().sqrt()[:, None]).transpose(1, 2)
    return FittedGaussian(means.float(), whitening, 1 / rest, directions.half().contiguous(), gains.sign())


def _least_rank(values: Tensor) -> int:
    """How many eigenvalues [N, C], in this order, must be kept."""
    channels = values.shape[1]
    left = torch.arange(channels, 0, -1)  # how many are not kept, for each rank
    sums = values.flip(1).cumsum(1).flip(1)
    logs = values.log().flip(1).cumsum(1).flip(1)
    lost = 0.5 * (left * (sums / left).log() - logs).mean(dim=0)
    enough = (lost <= _LOST).nonzero()
    return int(enough[0, 0]) if len(enough) else channels
