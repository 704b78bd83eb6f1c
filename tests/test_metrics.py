"""Metrics: closed form, scikit-learn, brute force over thresholds, and a bound on memory."""

import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from uniad_fast.detect.metrics import detection_metrics, localisation_metrics


def test_closed_form():
    metrics = detection_metrics([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1])
    assert metrics.values == pytest.approx({"auroc": 0.75, "ap": 0.5 * (1 + 2 / 3), "f1_max": 0.8})
    assert detection_metrics([1, 1, 1, 1], [0, 1, 0, 1]).values == pytest.approx(
        {"auroc": 0.5, "ap": 0.5, "f1_max": 2 / 3}
    )
    assert detection_metrics([3, 2, 1], [0, 0, 1]).values["auroc"] == 0  # bad stays bad


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("seed", range(5))
def test_detection_equals_scikit_learn(seed, ties):
    rng = np.random.default_rng(seed)
    labels = rng.random(400) < 0.3
    scores = rng.normal(size=400) + labels
    if ties:
        scores = np.round(scores * 2) / 2
    precision, recall, _ = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    expected = {
        "auroc": roc_auc_score(labels, scores),
        "ap": average_precision_score(labels, scores),
        "f1_max": f1.max(),
    }
    assert detection_metrics(scores, labels).values == pytest.approx(expected, rel=1e-12)


def brute_force_aupro(maps, limit=0.3):
    """Every distinct score as a threshold, region by region."""
    regions = [(m, ndimage.label(g, np.ones((3, 3)))) for m, g in maps]
    good = np.concatenate([m[~g] for m, g in maps])
    points = [(0.0, 0.0)]
    for threshold in np.unique(np.concatenate([m.ravel() for m, _ in maps]))[::-1]:
        overlaps = [
            (m[labelled == r] >= threshold).mean() for m, (labelled, count) in regions for r in range(1, count + 1)
        ]
        points.append(((good >= threshold).mean(), np.mean(overlaps)))
    rate, overlap = np.array(points).T
    grid = np.append(rate[rate <= limit], limit)
    values = np.append(overlap[rate <= limit], np.interp(limit, rate, overlap))
    return np.trapezoid(values, grid) / limit


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("seed", range(4))
def test_localisation_equals_brute_force_and_scikit_learn(seed, ties):
    rng = np.random.default_rng(seed)
    maps = []
    for index in range(4):
        mask = np.zeros((12, 15), dtype=bool)
        if index:
            mask[2:5, 3:6] = mask[5, 6] = mask[8:11, 9:14] = True  # the single pixel touches by a corner
        scores = (rng.normal(size=mask.shape) + 0.8 * mask).astype(np.float32)
        maps.append((np.round(scores * 3) / 3 if ties else scores, mask))
    values = localisation_metrics(maps).values
    scores, labels = (np.concatenate([pair[i].ravel() for pair in maps]) for i in (0, 1))
    assert values["auroc"] == pytest.approx(roc_auc_score(labels, scores), rel=1e-9)
    assert values["ap"] == pytest.approx(average_precision_score(labels, scores), rel=1e-9)
    assert values["aupro"] == pytest.approx(brute_force_aupro(maps), rel=1e-9)


def test_aupro_in_closed_form():
    """Two regions of different size, one found at once, the other only with half of the good pixels."""
    scores = np.zeros((1, 10), dtype=np.float32)
    mask = np.zeros((1, 10), dtype=bool)
    mask[0, :3], scores[0, :3] = True, 9.0  # found
    mask[0, 9], scores[0, 9] = True, 1.0
    scores[0, 4:7] = 5.0  # three of six good pixels above the second region
    # Overlap is 1/2 for rates up to 1/2, so up to the limit too.
    assert localisation_metrics([(scores, mask)]).values["aupro"] == pytest.approx(0.5)
    perfect = mask.astype(np.float32)
    assert localisation_metrics([(perfect, mask)]).values == pytest.approx(
        {"auroc": 1.0, "ap": 1.0, "f1_max": 1.0, "aupro": 1.0}
    )


def test_not_defined_says_why():
    metrics = detection_metrics([1, 2], [0, 0])
    assert metrics.values == {"auroc": None, "ap": None, "f1_max": None} and metrics.undefined == "every image is good"
    assert detection_metrics([1, 2], [1, 1]).undefined == "every image is defective"
    assert detection_metrics([], []).undefined == "no images at all"
    blank = np.zeros((3, 3), dtype=np.float32)
    assert localisation_metrics([(blank, blank > 0)]).undefined == "every pixel is good"


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="1 of 2 scores are NaN"):
        detection_metrics([1, np.nan], [0, 1])
    with pytest.raises(ValueError, match=r"\(2,\), \(3,\)"):
        detection_metrics([1, 2], [0, 1, 1])
    with pytest.raises(ValueError, match=r"\(2, 2\), \(2, 3\)"):
        localisation_metrics([(np.zeros((2, 2)), np.zeros((2, 3)))])


class ManyMaps:
    """Maps that are made when asked for."""

    def __init__(self, count, side):
        self.count, self.side = count, side

    def __iter__(self):
        for index in range(self.count):
            rng = np.random.default_rng(index)
            mask = np.zeros((self.side, self.side), dtype=bool)
            mask[10:40, 10:40] = True
            yield rng.random((self.side, self.side), dtype=np.float32) + mask * np.float32(0.5), mask


def test_memory_does_not_grow_with_the_good_pixels():
    """30 maps of a million pixels: 120 MB as float32, never held at once."""
    import tracemalloc

    tracemalloc.start()
    values = localisation_metrics(ManyMaps(30, 1000)).values
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6, f"{peak / 1e6:.0f} MB"
    assert values["auroc"] == pytest.approx(0.875, abs=0.01)  # P(u + 0.5 > v) for uniform u, v
