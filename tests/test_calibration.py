"""Thresholds that hold their rate, with many good images and with few; scales on which all classes mean the same."""

import json

import numpy as np
import pytest
import torch

from uniad_fast.detect.calibration import RawMaps, calibrate
from uniad_fast.detect.pipeline import to_maps
from uniad_fast.detect.residual_score import image_scores
from uniad_fast.detect.scales import fit_scale, scores_unseen
from uniad_fast.detect.tail import threshold_for


def test_threshold_is_the_order_statistic():
    scores = list(range(1, 100))  # 99 scores: with the next image, 100 equally likely ranks
    for rate, value in ((0.05, 95.0), (0.01, 99.0)):
        found = threshold_for(scores, rate)
        assert (found.value, found.rate, found.extrapolated) == (value, rate, False)
    assert threshold_for(range(1, 101), 0.05).value == 96.0  # 95 would let 6 of 101 ranks through


def test_threshold_holds_its_rate_on_new_images():
    rng = np.random.default_rng(0)
    alarms = [rng.gamma(2) > threshold_for(rng.gamma(2, size=60), 0.1).value for _ in range(4000)]
    assert np.mean(alarms) <= 0.1 + 3 * (0.09 / 4000) ** 0.5
    assert np.mean(alarms) >= 0.07


@pytest.mark.parametrize("draw", ["gamma", "normal", "gumbel"])
def test_a_rate_below_what_the_images_can_show_is_extrapolated(draw):
    """20 images show no rate below 1 in 21. Their highest alone has that one, far from the 1% asked for."""
    rng = np.random.default_rng(0)

    def sample(n):
        return rng.gamma(4, size=n) if draw == "gamma" else getattr(rng, draw)(size=n)

    new, rates, inside, of_highest = sample(20000), [], [], []
    for _ in range(400):
        scores = sample(20)
        found = threshold_for(scores, 0.01)
        assert found.extrapolated and found.rate == 0.01 and found.interval[0] < 0.01 < found.interval[1]
        rates.append(np.mean(new > found.value))
        of_highest.append(np.mean(new > scores.max()))
        inside.append(found.interval[0] <= rates[-1] <= found.interval[1])
    assert np.mean(rates) < 0.03 < 0.04 < np.mean(of_highest)
    assert np.mean(inside) > 0.75


def test_the_interval_covers_the_rate():
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(1000):
        found = threshold_for(rng.random(99), 0.05)
        covered.append(found.interval[0] <= 1 - found.value <= found.interval[1])
    assert 0.93 < np.mean(covered) < 0.97


def test_one_or_two_images_have_their_highest_score_as_the_threshold():
    for scores in ([3.0], [1.0, 3.0]):
        found = threshold_for(scores, 0.01)
        assert found.value == 3.0 and found.extrapolated and found.rate == pytest.approx(1 / (len(scores) + 1))


@pytest.mark.parametrize(("scores", "rate", "message"), [([], 0.1, "at least one"), ([1.0], 1.0, "1.0")])
def test_bad_threshold_input(scores, rate, message):
    with pytest.raises(ValueError, match=message):
        threshold_for(scores, rate)


def test_classes_of_many_images_have_scales_of_their_own():
    rng = np.random.default_rng(0)
    groups = [rng.normal(10, 1, 500), rng.normal(20, 4, 500), rng.normal(14, 2, 500)]
    scale = fit_scale(groups)
    np.testing.assert_allclose(scale.centers, [10, 20, 14], rtol=0.02)
    np.testing.assert_allclose(scale.spreads, [1, 4, 2], rtol=0.1)
    alone = fit_scale([groups[1]])
    quartiles = np.quantile(groups[1], (0.25, 0.75))
    assert alone.centers[0] == pytest.approx(np.median(groups[1]))
    assert alone.spreads[0] == pytest.approx((quartiles[1] - quartiles[0]) / 1.349)


def test_an_odd_image_among_the_good_ones_blinds_no_class():
    rng = np.random.default_rng(0)
    groups = [rng.normal(10, 1, 12), rng.normal(14, 2, 12)]
    before, groups[1][3] = fit_scale(groups), 500.0
    after = fit_scale(groups)
    np.testing.assert_allclose(after.centers, before.centers, rtol=0.1)
    np.testing.assert_allclose(after.spreads, before.spreads, rtol=0.5)


def test_classes_of_few_images_lean_on_the_others():
    """Means of three images each are off by more than the classes differ: what all have in common is nearer."""
    rng = np.random.default_rng(0)
    errors = {"own": 0.0, "drawn": 0.0}
    for _ in range(100):
        means = rng.normal(10, 0.3, 12)
        groups = [rng.normal(mean, 1, 3) for mean in means]
        errors["own"] += np.square([np.median(g) for g in groups] - means).mean()
        errors["drawn"] += np.square(fit_scale(groups).centers - means).mean()
    assert errors["drawn"] < 0.5 * errors["own"]
    lonely = fit_scale([np.array([5.0, 6.0, 7.0]), np.array([9.0]), np.zeros(0)])
    assert all(spread > 0 for spread in lonely.spreads) and 6 < lonely.centers[2] < 9


def test_no_score_is_measured_by_a_scale_that_it_had_a_part_in():
    rng = np.random.default_rng(0)
    group = rng.normal(size=6)
    for row, found in enumerate(scores_unseen([group])[0]):
        others = np.delete(group, row)
        low, middle, high = np.quantile(others, (0.25, 0.5, 0.75))
        assert found == pytest.approx((group[row] - middle) / (high - low) * 1.349)
    held = []
    for _ in range(300):
        groups = [rng.normal(k, 1 + k, 5) for k in range(4)]
        scale, k = fit_scale(groups), rng.integers(4)
        new = (rng.normal(k, 1 + k) - scale.centers[k]) / scale.spreads[k]
        held.append(new > threshold_for(np.concatenate(scores_unseen(groups)), 0.1).value)
    assert np.mean(held) < 0.14


@pytest.mark.parametrize("image_score", ["max", "mean", "std"])
def test_good_images_of_all_classes_come_out_alike(image_score):
    rng = np.random.default_rng(0)
    maps = [torch.from_numpy(rng.gamma(9, 1 + k, (60, 4, 4))) for k in range(3)]
    found = calibrate(
        [RawMaps.enlarged(m, lambda m: to_maps(m, 32)) for m in [*maps, torch.cat(maps)]], image_score, 0.05
    )
    for k, own in enumerate(maps):
        scores = [found.of_score(s, k) for s in image_scores(to_maps(own, 32), image_score).tolist()]
        assert abs(np.median(scores)) < 0.15 and abs(np.std(scores) - 1) < 0.3
        above = np.mean(np.array(scores) > found.threshold.value)
        assert above < 0.12
    assert found.images == (60, 60, 60, 180) and found.good_images == 180
    assert found == type(found).from_json(json.loads(json.dumps(found.to_json())))
    assert found.threshold_at(0.05).value == pytest.approx(found.threshold.value, abs=1e-5)
    assert found.threshold_at(0.01).value > found.threshold.value > found.threshold_at(0.3).value
    raw = to_maps(maps[1][:1], 32)[0].numpy()
    if image_score == "max":
        pooled = image_scores(torch.from_numpy(found.of_map(raw, 1))[None], "max").item()
        assert pooled == pytest.approx(
            found.of_score(image_scores(torch.from_numpy(raw)[None], "max").item(), 1), abs=1e-4
        )


@pytest.mark.parametrize("rate", [1e-3, 1e-5, 1e-12])
def test_no_rate_that_is_asked_for_shows_more_than_the_images_do(rate):
    found = threshold_for(np.random.default_rng(0).normal(size=40), rate)
    assert found.extrapolated and found.rate == rate
    assert found.interval[0] < rate and found.interval[1] == pytest.approx(1 - 0.025 ** (1 / 40))


def test_a_threshold_below_the_largest_score_shows_less():
    found = threshold_for([*np.linspace(0, 1, 39), 12.0], 0.02)
    assert found.extrapolated and 1 < found.value < 12
    assert found.interval[1] == pytest.approx(0.132, abs=1e-3)  # of Beta(2, 39)
