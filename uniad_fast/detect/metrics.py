"""Detection and localisation metrics, exact with ties: AUROC, AP, F1-max, and AUPRO over defect regions.

Every one of them changes only where a positive's score is crossed. So only the positives are kept and sorted; the
negatives, nearly all pixels of a data set, stream past and are counted by which positives they fall between. The
numbers are those of a full sort, in the memory of the positives alone.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DETECTION = ("auroc", "ap", "f1_max")
LOCALISATION = (*DETECTION, "aupro")
AUPRO_LIMIT = 0.3

_EIGHT_CONNECTED = np.ones((3, 3), dtype=int)


@dataclass(frozen=True)
class Metrics:
    """Values by name; a value is None where it is not defined, and `undefined` then says why."""

    values: dict[str, float | None]
    undefined: str | None = None


def detection_metrics(scores: Sequence[float] | NDArray, labels: Sequence[bool] | NDArray) -> Metrics:
    """Image AUROC, AP and F1-max.

    Args:
        scores: one a image, higher is more anomalous.
        labels: True or 1 for a defective image.

    An AUROC below 0.5 stays below 0.5. With one kind of image alone, nothing is defined.

    Raises:
        ValueError: lengths differ, or a score is NaN.
    """
    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=bool)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ValueError(f"scores and labels must be two lists of one length, got {scores.shape}, {labels.shape}")
    _check_not_nan(scores)
    reason = _one_kind_only("image", int(labels.sum()), int((~labels).sum()))
    if reason:
        return Metrics(dict.fromkeys(DETECTION), reason)
    positives = _Positives(scores[labels])
    positives.count_negatives(scores[~labels])
    return Metrics(positives.detection())


def localisation_metrics(maps: Iterable[tuple[NDArray, NDArray]]) -> Metrics:
    """Pixel AUROC, AP, F1-max, and AUPRO up to a false-positive rate of 0.3.

    AUPRO (Bergmann et al., 2020): the overlap with each connected region of the ground truth (8-connected, all
    regions of the data set weigh the same) against the false-positive rate over all good pixels, integrated with
    linear interpolation up to the limit, and divided by it.

    Args:
        maps: pairs of an anomaly map [height, width] and its ground truth of the same shape, True where defective.
            It is gone through twice, so it must be a list or the like, not a generator. Memory grows with the
            defective pixels alone, about 40 bytes each.

    Raises:
        ValueError: shapes differ, or a score is NaN.
    """
    from scipy import ndimage

    scores: list[NDArray] = []
    regions: list[NDArray] = []
    region_count = good_pixels = 0
    for anomaly_map, mask in maps:
        anomaly_map, mask = np.asarray(anomaly_map, dtype=np.float32), np.asarray(mask, dtype=bool)
        if anomaly_map.ndim != 2 or anomaly_map.shape != mask.shape:
            raise ValueError(f"a map and its mask must be of one 2D shape, got {anomaly_map.shape}, {mask.shape}")
        _check_not_nan(anomaly_map)
        good_pixels += int(mask.size - mask.sum())
        if not mask.any():
            continue
        labelled, count = ndimage.label(mask, _EIGHT_CONNECTED)
        scores.append(anomaly_map[mask])
        regions.append(labelled[mask].astype(np.int32) + (region_count - 1))
        region_count += count
    reason = _one_kind_only("pixel", sum(len(s) for s in scores), good_pixels)
    if reason:
        return Metrics(dict.fromkeys(LOCALISATION), reason)

    region = np.concatenate(regions)
    weight = 1 / (np.bincount(region) * float(region_count))
    positives = _Positives(np.concatenate(scores), weight[region])
    del scores, regions, region
    for anomaly_map, mask in maps:
        positives.count_negatives(np.asarray(anomaly_map, dtype=np.float32)[~np.asarray(mask, dtype=bool)])
    return Metrics({**positives.detection(), "aupro": positives.region_overlap(AUPRO_LIMIT)})


class _Positives:
    """Distinct scores of the positives, ascending, with what lies on and between them.

    m distinct scores u_0 < ... < u_(m-1); `count[i]` positives and `equal[i]` negatives at u_i, `below[i]` negatives
    strictly between u_(i-1) and u_i, `below[m]` above all.
    """

    def __init__(self, scores: NDArray, weight: NDArray | None = None) -> None:
        order = np.argsort(scores)
        scores = scores[order]
        first = np.flatnonzero(np.concatenate([[True], scores[1:] != scores[:-1]]))
        self.value = scores[first]
        self.count = np.diff(np.append(first, len(scores)))
        self.weight = None if weight is None else np.add.reduceat(weight[order], first)
        self.equal = np.zeros(len(first), dtype=np.int64)
        self.below = np.zeros(len(first) + 1, dtype=np.int64)

    def count_negatives(self, scores: NDArray) -> None:
        # Sorted needles walk through `value` in order, which a cache likes far better than random ones.
        scores = np.sort(scores)
        index = np.searchsorted(self.value, scores)
        on = self.value[np.minimum(index, len(self.value) - 1)] == scores
        for counts, where in ((self.equal, index[on]), (self.below, index[~on])):
            if len(where):
                first = np.flatnonzero(np.concatenate([[True], where[1:] != where[:-1]]))
                counts[where[first]] += np.diff(np.append(first, len(where)))

    def detection(self) -> dict[str, float | None]:
        positives, negatives = int(self.count.sum()), int(self.equal.sum() + self.below.sum())
        true = np.cumsum(self.count[::-1])[::-1]  # positives at or above u_i
        false = self._negatives_from()
        outranked = negatives - false + self.equal / 2  # negatives below u_i, and half of those at it
        return {
            "auroc": float((self.count * outranked).sum() / positives / negatives),
            "ap": float((self.count * (true / (true + false))).sum() / positives),
            "f1_max": float((2 * true / (true + false + positives)).max()),
        }

    def region_overlap(self, limit: float) -> float:
        """Area under (false-positive rate, mean region overlap) up to `limit`, over `limit`."""
        assert self.weight is not None
        negatives = self.equal.sum() + self.below.sum()
        overlap = np.cumsum(self.weight[::-1])  # from the highest score down
        false = self._negatives_from()[::-1]
        # Two points a score: just above it (the good pixels higher up are in, it is not), and with it.
        rate = np.column_stack([false - self.equal[::-1], false]).ravel() / negatives
        overlap = np.column_stack([np.concatenate([[0.0], overlap[:-1]]), overlap]).ravel()
        rate, overlap = np.append(rate, 1.0), np.append(overlap, 1.0)
        inside = rate <= limit
        end = np.interp(limit, rate, overlap)
        rate, overlap = np.append(rate[inside], limit), np.append(overlap[inside], end)
        return float(np.trapezoid(overlap, rate) / limit)

    def _negatives_from(self) -> NDArray:
        """Negatives at or above u_i."""
        return (np.cumsum((self.equal + self.below[1:])[::-1]))[::-1]


def _one_kind_only(what: str, positives: int, negatives: int) -> str | None:
    if positives and negatives:
        return None
    present = "defective" if positives else "good"
    return f"no {what}s at all" if not positives and not negatives else f"every {what} is {present}"


def _check_not_nan(scores: NDArray) -> None:
    if np.isnan(scores).any():
        raise ValueError(f"{int(np.isnan(scores).sum())} of {scores.size} scores are NaN")


def mean_of_defined(values: Sequence[float | None]) -> float | None:
    """The mean of those that are defined, as over the classes of a data set; None where none is."""
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None
