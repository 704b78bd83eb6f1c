"""Gaussians of good images: what is kept of them is enough, and they are as detailed as the images bear out."""

import numpy as np
import pytest
import torch

from uniad_fast.detect import fit_gaussians as fitting
from uniad_fast.detect.fit_gaussians import Mixture, Moments, fit_gaussians
from uniad_fast.detect.good_gaussians import GoodGaussians, fitted_gaussian
from uniad_fast.errors import UniadFastError


def brute_force(x, means, covariances):
    """[B, N] in float64, a solve for each vector."""
    out = np.zeros(x.shape[:2])
    for b in range(x.shape[0]):
        for n in range(x.shape[1]):
            away = (x[b, n] - means[n]).double().numpy()
            out[b, n] = np.sqrt(away @ np.linalg.solve(covariances[n].double().numpy(), away))
    return out


def covariances_of(rng, places, channels, spread):
    """Positive definite, alike up to `spread`."""
    common = rng.normal(size=(channels, channels))
    parts = []
    for _ in range(places):
        own = common + spread * rng.normal(size=(channels, channels))
        parts.append(own @ own.T / channels + 0.1 * np.eye(channels))
    return torch.from_numpy(np.stack(parts)).float()


def fitted(*gaussians):
    module = GoodGaussians(0, gaussians[0].means.shape[0], gaussians[0].means.shape[1])
    module.set(list(gaussians))
    return module


@pytest.mark.parametrize(("spread", "least", "most"), [(0.0, 0, 0), (0.3, 1, 8), (3.0, 3, 8)])
def test_distances_are_mahalanobis(spread, least, most):
    rng = np.random.default_rng(0)
    means, covariances = torch.from_numpy(rng.normal(size=(6, 8))).float(), covariances_of(rng, 6, 8, spread)
    one, other = fitted_gaussian(means, covariances), fitted_gaussian(means + 1, covariances_of(rng, 6, 8, 0.5))
    assert least <= one.directions.shape[1] <= most
    module = fitted(one, other)
    x = torch.from_numpy(rng.normal(size=(5, 6, 8)) * 2).float()
    found = module(x, torch.tensor([0, 0, 1, 0, 0]))
    truth = brute_force(x, means, covariances)
    lost = 1e-2 if one.directions.shape[1] in (0, 8) else 0.25
    np.testing.assert_allclose(found[[0, 1, 3, 4]].numpy(), truth[[0, 1, 3, 4]], rtol=lost)
    assert module.is_consistent
    module.ranks[0] += 1
    assert not module.is_consistent


def test_far_away_is_far_away():
    """Along a direction of large variance, a vector of a hundred deviations is a hundred away, half floats or not."""
    covariances = torch.eye(4).repeat(3, 1, 1)
    covariances[0, 0, 0] = 1e4
    module = fitted(fitted_gaussian(torch.zeros(3, 4), covariances))
    x = torch.zeros(1, 3, 4)
    x[..., 0] = 1e4
    found = module(x, torch.tensor([0]))[0]
    assert found[0].item() == pytest.approx(100, rel=0.1) and found[1].item() == pytest.approx(1e4, rel=0.01)


def field(rng, images, places, channels, by_place):
    """Vectors whose covariance differs from place to place, or not."""
    x = rng.normal(size=(images, places, channels))
    if by_place:
        x = np.einsum("bnc,ncd->bnd", x, rng.normal(size=(places, channels, channels)))
        x += 5 * rng.normal(size=(places, channels))
    return torch.from_numpy(x).float()


def test_places_count_where_they_differ_and_there_are_images_enough():
    rng = np.random.default_rng(0)

    def share_of_place(x):
        fit = fit_gaussians(lambda rows: x[rows], [0] * len(x), 1)
        return fit.mixtures[0].weights[0], fit.mixtures[0].place_means

    assert share_of_place(field(rng, 400, 9, 6, True))[0] >= 0.85
    weight, place_means = share_of_place(field(rng, 40, 9, 6, False))
    assert weight <= 0.1 and not place_means
    assert share_of_place(field(rng, 12, 9, 6, True))[1]


def test_classes_of_few_images_borrow():
    rng = np.random.default_rng(0)
    classes = np.repeat(np.arange(10), 3)
    x = field(rng, 30, 9, 12, False)
    fit = fit_gaussians(lambda rows: x[rows], classes, 10)
    borrowed = [sum(mixture.weights[2:]) for mixture in fit.mixtures[:-1]]
    assert np.mean(borrowed) > 0.4 and len(fit.gaussians) == 11


def test_distances_are_of_images_that_had_no_part():
    """With few images for its channels a Gaussian calls near what it was fitted to; unseen ones are as far as new."""
    rng = np.random.default_rng(0)
    x = field(rng, 260, 9, 16, True)
    x, new = x[:60], x[60:]
    fit = fit_gaussians(lambda rows: x[rows], [0] * 60, 1)
    module = fitted(*fit.gaussians)
    zeros = torch.zeros(200, dtype=torch.int64)
    unseen, own, others = fit.distances[0].mean(), module(x, zeros[:60]).mean(), module(new, zeros).mean()
    assert abs(unseen / others - 1) < 0.04 and own < 0.9 * others


def test_mixtures_by_the_formula():
    rng = np.random.default_rng(0)
    x, pool = field(rng, 20, 4, 3, True), covariances_of(rng, 4, 3, 1.0)
    own = Moments.of(x)
    for n in range(4):
        np.testing.assert_allclose(own.covariances[n], np.cov(x[:, n].numpy().T), rtol=1e-4, atol=1e-4)
    means, mixed = Mixture((0.1, 0.2, 0.3, 0.4), True).of(own, pool)
    by_hand = 0.1 * own.covariances + 0.2 * own.covariances.mean(0) + 0.3 * pool + 0.4 * pool.mean(0)
    ridge = fitting._RIDGE * by_hand.diagonal(dim1=1, dim2=2).mean() * torch.eye(3)
    torch.testing.assert_close(mixed, by_hand + ridge)
    torch.testing.assert_close(means, x.mean(0))
    means, mixed = Mixture((0.0, 1.0, 0.0, 0.0), False).of(own, None)
    torch.testing.assert_close(means, x.mean((0, 1)).expand(4, 3))
    away = (x - x.mean((0, 1))).flatten(0, 1)
    np.testing.assert_allclose(mixed[2], away.T @ away / 80, rtol=0.15, atol=0.3)


def test_what_can_not_be_fitted():
    x = torch.zeros(3, 4, 5)
    for bad in (x, torch.full_like(x, float("nan"))):
        with pytest.raises(UniadFastError, match="no score can be fitted"):
            fit_gaussians(lambda rows, bad=bad: bad[rows], [0, 0, 0], 1)
    with pytest.raises(UniadFastError, match="at least two good images"):
        fit_gaussians(lambda rows: x[rows], [0], 1)


def test_one_image_of_a_class_is_measured_by_what_the_others_have():
    rng = np.random.default_rng(0)
    x = field(rng, 41, 4, 5, False)
    fit = fit_gaussians(lambda rows: x[rows], [0] * 40 + [1], 2)
    assert fit.mixtures[1].weights[:2] == (0.0, 0.0) and len(fit.rows[1]) == 1
    found = fitted(*fit.gaussians)(x[40:], torch.tensor([1]))
    assert found.isfinite().all()


def test_tiles_of_one_picture_are_held_out_together(monkeypatch):
    """They show the same places: seen apart, a picture would be measured by itself, and thresholds come out too low."""
    torch.manual_seed(0)
    pictures = np.repeat(np.arange(12), 6)
    x = torch.randn(12, 3, 8)[torch.from_numpy(pictures)] + 0.05 * torch.randn(72, 3, 8)
    apart, together = (fit_gaussians(lambda rows: x[rows], [0] * 72, 1, pictures=of) for of in (None, pictures))
    assert together.distances[0].mean() > 1.1 * apart.distances[0].mean()
    monkeypatch.setattr(fitting, "LARGEST_CLASS", 20)
    (rows,) = fit_gaussians(lambda rows: x[rows], [0] * 72, 1, pictures=pictures).rows
    assert set(np.bincount(pictures[rows])) <= {0, 6} and 12 <= len(rows) <= 20  # whole pictures
