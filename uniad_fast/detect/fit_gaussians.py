"""From vectors of good images to Gaussians for each class and place, with as much structure as the images bear out.

With few images the covariance of one place of one class is mostly chance; where places mean nothing, all places of a
class are one; and where classes have a handful of images each, what they have in common says more. So a class's
covariance is a mixture

    S_kl = a S'_kl + b mean_l S'_kl + c P_l + d mean_l P_l + ridge,    a + b + c + d = 1

of its own, at this place and over all, and that of the other classes together. Which mixture, its good images decide:
the one that gives images that had no part in it the highest likelihood. Defects are not looked at.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import UniadFastError
from .good_gaussians import FittedGaussian, fitted_gaussian

Vectors = Callable[[NDArray], Tensor]
"""Numbers of images -> their vectors [images, N, C]."""
_FOLDS = 20  # of 5, a Gaussian of what is left is so much worse than that of all that thresholds come out too high
LARGEST_CLASS = 2048
"""Images of a class that are looked at, evenly picked of more: they are all in memory at once."""
_PARTS, _PARTS_TO_CHOOSE = 5, 3  # a mixture is chosen on three of five parts
_PLACES_TO_CHOOSE = 16
_RIDGE = 1e-2  # of the mean variance: directions in which good images never differ would drown the rest
_OWN = tuple((a, 1 - a, 0.0, 0.0) for a in (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 1.0))
_SHARED = (
    (0.0, 0.0, 0.0, 1.0),
    (0.0, 0.0, 1.0, 0.0),
    (0.0, 0.5, 0.0, 0.5),
    (0.1, 0.8, 0.0, 0.1),
    (0.25, 0.5, 0.0, 0.25),
    (0.5, 0.0, 0.5, 0.0),
    (0.25, 0.25, 0.25, 0.25),
    (0.75, 0.0, 0.0, 0.25),
)


@dataclass(frozen=True)
class Moments:
    """Of some images of one class: how many, mean [N, C], covariance about it [N, C, C] (all zero for one image)."""

    images: int
    means: Tensor
    covariances: Tensor

    @classmethod
    def of(cls, x: Tensor) -> "Moments":
        """x: [images, N, C]."""
        means = x.mean(dim=0)
        centred = (x - means).transpose(0, 1)  # [N, images, C]
        return cls(len(x), means, centred.transpose(1, 2) @ centred / max(1, len(x) - 1))


@dataclass(frozen=True)
class Mixture:
    """How a class's Gaussians are put together.

    Attributes:
        weights: a, b, c and d of the module's formula.
        place_means: whether each place has its own mean, or the class one for all of its places.
    """

    weights: tuple[float, float, float, float]
    place_means: bool

    def of(self, own: Moments, pool: Tensor | None, places: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor]:
        """(means [N, C], covariances [N, C, C]) at some places, or all.

        pool: covariances of the other classes [N, C, C], None where there is none.
        """
        covariances = own.covariances
        means = own.means
        if not self.place_means:
            overall = means.mean(dim=0, keepdim=True)
            away = means - overall
            covariances = covariances + away[:, :, None] * away[:, None, :]
            means = overall.expand_as(means)
        a, b, c, d = self.weights
        mixed = a * covariances[places] + b * covariances.mean(dim=0)
        if pool is not None and c + d > 0:
            mixed = mixed + c * pool[places] + d * pool.mean(dim=0)
        variance = mixed.diagonal(dim1=1, dim2=2).mean()
        if not torch.isfinite(variance) or not variance > 0:
            raise UniadFastError(
                "the residuals of good images are not finite, or all alike: no score can be fitted to them"
            )
        return means[places], mixed + _RIDGE * variance * torch.eye(means.shape[1])


@dataclass(frozen=True)
class GaussianFit:
    """What `fit_gaussians` found.

    Attributes:
        gaussians: one a class, and a last one for all together where there is more than one class.
        mixtures: likewise, how each was put together.
        rows: for each of them the images that it was fitted to.
        distances: [len(rows), N] for each: of every image from Gaussians that it had no part in.
    """

    gaussians: list[FittedGaussian]
    mixtures: list[Mixture]
    rows: list[NDArray]
    distances: list[Tensor]


def fit_gaussians(
    vectors: Vectors,
    classes: Sequence[int] | NDArray,
    number_of_classes: int,
    seed: int = 0,
    pictures: NDArray | None = None,
) -> GaussianFit:
    """Gaussians of good images, and the distances that such images have.

    Args:
        vectors: gives the vectors of images by their numbers, from 0 to len(classes) - 1.
        classes: of each image, from 0 to number_of_classes - 1; every class has one at least.
        seed: of the folds.
        pictures: of each image, where it is a tile, the number of the picture that it is of. Tiles of one picture are
            in one fold, since they show the same places; None where each image is a picture of its own.

    Raises:
        UniadFastError: vectors are not finite or all alike, or there is one image alone.
    """
    own = np.arange(len(classes)) if pictures is None else pictures
    members = [_picked(np.flatnonzero(np.asarray(classes) == k), own) for k in range(number_of_classes)]
    total = sum(map(len, members))
    if total < 2:
        raise UniadFastError("a score is fitted to at least two good images")
    pool, shares = _pool(vectors, members)
    fit = GaussianFit([], [], members, [])
    for k, rows in enumerate(members):
        others = None
        if number_of_classes > 1 and total > len(rows):
            share = shares[k] * Moments.of(vectors(rows)).covariances
            others = (pool - share) / max(1e-12, 1 - shares[k])
            if not (others.diagonal(dim1=1, dim2=2) > 0).any():  # classes of one image each
                others = None
        _fit_one(fit, vectors(rows), others, _folds(own[rows], seed))
    if number_of_classes > 1:
        together = _picked(np.sort(np.concatenate(members)), own)
        fit.rows.append(together)
        _fit_one(fit, vectors(together), None, _folds(own[together], seed))
    return fit


def _folds(pictures: NDArray, seed: int) -> Tensor:
    """The fold of each image, by its picture."""
    names, own = np.unique(pictures, return_inverse=True)
    return torch.from_numpy((np.random.default_rng(seed).permutation(len(names)) % _FOLDS)[own])


def _fit_one(fit: GaussianFit, x: Tensor, others: Tensor | None, folds: Tensor) -> None:
    if not x.isfinite().all():
        raise UniadFastError("the residuals of good images are not finite: no score can be fitted to them")
    mixture = _choose(x, folds, others)
    fit.mixtures.append(mixture)
    fit.gaussians.append(fitted_gaussian(*mixture.of(Moments.of(x), others)))
    distances = torch.zeros(x.shape[:2])
    for fold in range(_FOLDS):
        inside, outside = folds == fold, folds != fold
        if inside.any():
            known = Moments.of(x[outside]) if outside.any() else Moments.of(x)
            distances[inside] = _mahalanobis(x[inside], *mixture.of(known, others))[0]
    fit.distances.append(distances)


def _choose(x: Tensor, folds: Tensor, others: Tensor | None) -> Mixture:
    """The mixture under which images outside of it are likeliest."""
    if len(x) == 1:
        return Mixture((0.0, 0.0, 0.5, 0.5), True)
    places = torch.linspace(0, x.shape[1] - 1, min(_PLACES_TO_CHOOSE, x.shape[1])).round().long()
    splits = []
    for fold in range(min(_PARTS_TO_CHOOSE, len(x))):
        outside = folds % _PARTS != fold
        splits.append((Moments.of(x[outside]), x[~outside][:, places]))

    def likelihood(mixture: Mixture) -> float:
        """Mean logarithm, without what all mixtures share."""
        total = 0.0
        for known, unseen in splits:
            try:
                distances, halves = _mahalanobis(unseen, *mixture.of(known, others, places))
            except UniadFastError:  # one image, and nothing to mix its covariance with
                return float("-inf")
            total += float((-0.5 * distances.square() - halves).mean())
        return total

    weights = _OWN + (_SHARED if others is not None else ())
    best = max((Mixture(weight, True) for weight in weights), key=likelihood)
    return max((best, Mixture(best.weights, False)), key=likelihood)


def _mahalanobis(x: Tensor, means: Tensor, covariances: Tensor) -> tuple[Tensor, Tensor]:
    """(distances [images, N], halves of the logarithms of the determinants [N])."""
    lower = torch.linalg.cholesky(covariances)
    centred = (x - means).permute(1, 2, 0)  # [N, C, images]
    white = torch.linalg.solve_triangular(lower, centred, upper=False)
    halves = lower.diagonal(dim1=1, dim2=2).log().sum(dim=1)
    return torch.linalg.vector_norm(white, dim=1).T, halves


def _pool(vectors: Vectors, members: list[NDArray]) -> tuple[Tensor, list[float]]:
    """(mean covariance within classes [N, C, C], each class's share of it)."""
    freedom = [max(0, len(rows) - 1) for rows in members]
    shares = [one / max(1, sum(freedom)) for one in freedom]
    pool = torch.zeros(())
    if len(members) > 1:
        for rows, share in zip(members, shares, strict=True):
            pool = pool + share * Moments.of(vectors(rows)).covariances
    return pool, shares


def _picked(rows: NDArray, pictures: NDArray) -> NDArray:
    """At most `LARGEST_CLASS` of them, evenly, of whole pictures; two pictures at least."""
    if len(rows) <= LARGEST_CLASS:
        return rows
    names, own = np.unique(pictures[rows], return_inverse=True)
    most = min(max(2, LARGEST_CLASS * len(names) // len(rows)), len(names))
    kept = np.linspace(0, len(names) - 1, most).round().astype(int)
    return rows[np.isin(own, kept)]
