"""Which class an image is of, told by linear discriminants of its pooled features (Fisher, 1936).

Pooled are the mean and the deviation over places of each channel of the backbone's deepest stage, which the detector
computes anyway.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

SURE = 0.99
"""Probability of a class below which an image is not taken to be of it."""
UNSURE = -1
_FOLDS = 5
_RIDGE = 1e-2  # of the mean variance


class ClassRecognizer(nn.Module):
    """features [B, N, C] -> class of each image, from 0, or `UNSURE`.

    Classes are taken to be equally frequent, whatever their shares in training were. Buffers: `weight` [K, 2C], `bias`
    [K].
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(classes, 2 * channels))
        self.register_buffer("bias", torch.zeros(classes))

    def forward(self, features: Tensor) -> Tensor:
        return self.decide(pooled(features))

    def decide(self, vectors: Tensor) -> Tensor:
        """Pooled features [B, 2C] -> classes [B]."""
        probability, found = (vectors @ self.weight.T + self.bias).softmax(dim=1).max(dim=1)
        return torch.where(probability >= SURE, found, UNSURE)

    def fit(self, vectors: Tensor, classes: Sequence[int] | NDArray) -> None:
        """Set the buffers from pooled features [images, 2C] of good images and their classes, each with one at
        least.
        """
        device = self.weight.device
        labels = torch.as_tensor(np.asarray(classes))
        x = vectors.double().cpu()
        count = len(self.bias)
        means = torch.stack([x[labels == k].mean(dim=0) for k in range(count)])
        within = x - means[labels]
        scale = within.square().mean(dim=0).sqrt()
        scale[scale == 0] = 1  # a channel that never changes says nothing
        within = within / scale
        covariance = within.T @ within / max(1, len(x) - count)
        covariance += (_RIDGE * covariance.diagonal().mean() + 1e-12) * torch.eye(len(covariance), dtype=torch.float64)
        weight = torch.linalg.solve(covariance, (means / scale).T).T
        bias = -0.5 * (weight * means / scale).sum(dim=1)
        self.weight = (weight / scale).float().to(device)
        self.bias = bias.float().to(device)


def pooled(features: Tensor) -> Tensor:
    """[B, N, C] -> [B, 2C], mean and deviation over places."""
    return torch.cat([features.mean(dim=1), features.std(dim=1, unbiased=False)], dim=1)


def fit_recognizer(
    recognizer: ClassRecognizer,
    vectors: Tensor,
    classes: Sequence[int] | NDArray,
    seed: int = 0,
    pictures: NDArray | None = None,
) -> tuple[int, int, int]:
    """Fit it to pooled features [images, 2C], and tell how it does on images that it was not fitted to.

    pictures: number of each image's picture, where it is a tile: those of one picture are held out together.

    Returns:
        Of the images, each seen by a recognizer of four fifths of the others: (taken for another class, not sure of,
        all).
    """
    labels = np.asarray(classes)
    wrong = unsure = seen = 0
    names, own = np.unique(np.arange(len(labels)) if pictures is None else pictures, return_inverse=True)
    order = (np.random.default_rng(seed).permutation(len(names)) % _FOLDS)[own]
    for fold in range(_FOLDS):
        inside = order == fold
        known = np.isin(labels[inside], labels[~inside])
        if len(np.unique(labels[~inside])) < len(recognizer.bias) or not known.any():
            continue  # a class of one image is not there to be recognized
        recognizer.fit(vectors[~inside], labels[~inside])
        found = recognizer.decide(vectors[inside].to(recognizer.weight.device)).cpu().numpy()
        unsure += int((found == UNSURE).sum())
        wrong += int(((found != labels[inside]) & (found != UNSURE)).sum())
        seen += len(found)
    recognizer.fit(vectors, labels)
    return wrong, unsure, seen
