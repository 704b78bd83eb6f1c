"""Thresholds that hold their rate, whitening that whitens, colours that are one for all."""

import numpy as np
import pytest

from uniad_fast.detect.calibration import threshold_for


def test_threshold_is_the_order_statistic():
    scores = list(range(1, 100))  # 99 scores: with the next image, 100 equally likely ranks
    assert threshold_for(scores, 0.05) == (95.0, 0.05)
    assert threshold_for(scores, 0.01) == (99.0, 0.01)
    assert threshold_for(range(1, 101), 0.05) == (96.0, 0.05)  # 95 would let 6 of 101 ranks through
    assert threshold_for(scores[:9], 0.01) == (9.0, 0.1)  # nine images can't promise one percent


def test_threshold_holds_its_rate_on_new_images():
    rng = np.random.default_rng(0)
    alarms = [rng.gamma(2) > threshold_for(rng.gamma(2, size=60), 0.1)[0] for _ in range(4000)]
    assert np.mean(alarms) <= 0.1 + 3 * (0.09 / 4000) ** 0.5
    assert np.mean(alarms) >= 0.07


@pytest.mark.parametrize(("scores", "rate", "message"), [([], 0.1, "at least one"), ([1.0], 1.0, "1.0")])
def test_bad_threshold_input(scores, rate, message):
    with pytest.raises(ValueError, match=message):
        threshold_for(scores, rate)
