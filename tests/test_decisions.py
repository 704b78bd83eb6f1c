"""What a threshold does on labelled images, counted by hand."""

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from uniad_fast.data.samples import Sample
from uniad_fast.detect.decisions import RATES, decide, share_interval
from uniad_fast.detect.results import decisions_table


def images(class_name, kind, count):
    return [Sample(Path(f"{class_name}-{kind}-{i}.png"), class_name, kind) for i in range(count)]


def test_every_verdict_is_counted_once():
    samples = images("cup", "good", 4) + images("cup", "crack", 3) + images("lid", "good", 2) + images("lid", "blot", 1)
    scores = [1.0, 2.0, 5.0, 4.0, 3.0, 9.0, 4.5, 1.0, 4.0, 4.0]
    found = decide(samples, scores, 4.0)  # what lies on the threshold is not above it
    counts = [(o.class_name, o.kind, o.images, o.above) for o in found.outcomes]
    assert counts == [("cup", "good", 4, 1), ("cup", "crack", 3, 2), ("lid", "good", 2, 0), ("lid", "blot", 1, 0)]
    assert [(s.path.name, score) for s, score in found.misses] == [("cup-crack-0.png", 3.0), ("lid-blot-0.png", 4.0)]
    assert [(s.path.name, score) for s, score in found.false_alarms] == [("cup-good-2.png", 5.0)]
    text = decisions_table(found)
    assert "1 false alarms" in text and "2 found, 1 missed" in text and "missed: cup-crack-0.png (3.0000)" in text


def test_other_thresholds_have_at_most_the_false_alarms_asked_for():
    rng = np.random.default_rng(0)
    good, defective = rng.normal(0, 1, 300), rng.normal(2, 1, 200)
    samples = images("cup", "good", 300) + images("cup", "crack", 200)
    for other, rate in zip(decide(samples, [*good, *defective], 9.0).alternatives, RATES, strict=True):
        assert other.false_alarms == (good > other.threshold).sum() == round(rate * 300)
        assert other.missed == (defective <= other.threshold).sum() and other.defective_images == 200
        lower = np.nextafter(np.sort(good[good < other.threshold])[-1], -np.inf)
        assert (good > lower).sum() > rate * 300  # the next lower one has more
    few = decide(images("cup", "good", 5), [1, 2, 3, 4, 5], 0.0).alternatives
    assert all(other.threshold == 5 and other.false_alarms == 0 for other in few)  # five can't show one in a hundred
    assert decide(images("cup", "crack", 2), [1.0, 2.0], 0.0).alternatives == []


@pytest.mark.parametrize(("count", "of"), [(0, 1), (1, 1), (0, 50), (50, 50), (3, 17), (499, 500)])
def test_intervals_are_clopper_and_pearsons(count, of):
    expected = binomtest(count, of).proportion_ci(0.95, "exact")
    assert share_interval(count, of) == pytest.approx((expected.low, expected.high), abs=1e-9)


@pytest.mark.parametrize(("count", "of"), [(0, 0), (2, 1), (-1, 3)])
def test_shares_of_nothing_are_refused(count, of):
    with pytest.raises(ValueError, match=f"got {count} of {of}"):
        share_interval(count, of)
