"""Recognizer, residual score and calibration of a pipeline, from features of good images."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..data.tiling import STEP
from ..rows import TokenRows
from .calibration import Calibration, RawMaps, batches, calibrate
from .class_recognizer import fit_recognizer
from .fitting import UnseenMaps, fit_residual_score, pooled_features, score_maps_of
from .mosaic import Pictures
from .pipeline import Pipeline
from .settings import DetectorSettings
from .trained import Recognition

_PLACES = 32  # along each side of a picture
_PRIOR = 10  # pictures
_BY_HEART = 3.0  # standard errors by which images that the network has not seen may score higher than those it has


def fit_scores(
    pipeline: Pipeline,
    parts: Sequence[TokenRows],
    classes: NDArray,
    settings: DetectorSettings,
    pictures: Pictures | None = None,
) -> tuple[Calibration, Recognition | None]:
    """Fit all that comes after the network, and set scales, threshold and colours.

    Args:
        parts: features [images, N, C], those that the network was trained on first, then what was held out.
        classes: numbers of the classes of all of their images, one part's after the other's.
        pictures: of which their images are tiles; None where they are none.

    Raises:
        UniadFastError: what comes out is not finite.
    """
    recognition, numbers = None, None if pictures is None else pictures.numbers
    if pipeline.recognizer is not None:
        wrong, unsure, seen = fit_recognizer(
            pipeline.recognizer, pooled_features(pipeline, parts), classes, settings.seed, numbers
        )
        recognition = Recognition(seen, wrong, unsure)
    maps = fit_residual_score(pipeline.residual_score, pipeline, parts, classes, settings.seed, numbers)
    trained_on = len(parts[0])
    if maps is None:  # fitted to what was trained on: the others alone have had no part in it
        own = None if pictures is None else pictures.part(np.arange(trained_on, len(classes)))
        return calibrated_by(pipeline, parts[1], classes[trained_on:], settings, own), recognition
    if _learnt_by_heart(maps[:-1] if len(maps) > 1 else maps, trained_on, pictures):
        maps = [UnseenMaps(one.rows[late], one.score_maps[late]) for one in maps for late in [one.rows >= trained_on]]
    return _calibrated(pipeline, maps, settings, pictures), recognition


def calibrated_by(
    pipeline: Pipeline,
    tokens: TokenRows,
    fields: NDArray,
    settings: DetectorSettings,
    pictures: Pictures | None = None,
) -> Calibration:
    """Scales, threshold and colours from features [images, N, C] that nothing was fitted to, each by its field.

    pictures: of which the images are tiles; None where they are none.
    """
    return _calibrated(pipeline, _maps_by_field(pipeline, tokens, fields), settings, pictures)


def _calibrated(
    pipeline: Pipeline, maps: Sequence[UnseenMaps], settings: DetectorSettings, pictures: Pictures | None
) -> Calibration:
    rates = (settings.image_score, settings.false_alarm_rate)
    if pictures is None:
        return calibrate([RawMaps.enlarged(one.score_maps, pipeline.enlarge) for one in maps], *rates)

    if settings.aligned:
        pipeline.places = torch.stack([_places(pictures.maps(one.rows, one.score_maps)) for one in maps])
        pipeline.places = pipeline.places.to(pipeline.device)

    def of_pictures(one: UnseenMaps, field: int) -> RawMaps:
        return RawMaps(
            len(pictures.whole(one.rows)),
            lambda: (
                pipeline.masked(pipeline.by_place(raw[0], field)[None])
                for raw in pictures.maps(one.rows, one.score_maps)
            ),
        )

    return calibrate([of_pictures(one, field) for field, one in enumerate(maps)], *rates, STEP)


def _places(maps: Iterable[Tensor]) -> Tensor:
    """[_PLACES, _PLACES]: what raw maps [1, height, width] of good pictures have at each place, over its mean.

    Few pictures say little of a place: it is drawn towards the mean as if `_PRIOR` more had that there.
    """
    total, count = torch.zeros(_PLACES, _PLACES), 0
    for raw in maps:
        total += F.adaptive_avg_pool2d(raw[None].float().cpu(), _PLACES)[0, 0]
        count += 1
    if not total.mean() > 0:
        return torch.ones(_PLACES, _PLACES)
    return (count * total / total.mean() + _PRIOR) / (count + _PRIOR)


def _learnt_by_heart(maps: Sequence[UnseenMaps], trained_on: int, pictures: Pictures | None = None) -> bool:
    """Whether images that the network was not trained on score higher, class by class, by more than chance."""
    difference = variance = 0.0
    for one in maps:
        scores = one.score_maps.amax(dim=(1, 2)).double().numpy()
        late = one.rows >= trained_on
        if pictures is not None:  # which are what is independent of one another
            whole = pictures.whole(one.rows)
            scores = np.array([scores[members].max() for members in whole])
            late = np.array([late[members[0]] for members in whole], dtype=bool)
        if min(late.sum(), (~late).sum()) < 2:
            continue
        weight = float(late.sum())
        difference += weight * float(scores[late].mean() - scores[~late].mean())
        variance += weight**2 * float(scores.var(ddof=1) * (1 / late.sum() + 1 / (~late).sum()))
    return difference > _BY_HEART * variance**0.5


def fields_of(pipeline: Pipeline, tokens: TokenRows, told: Sequence[int | None]) -> NDArray:
    """The field of each image, of features [images, N, C] and the numbers of classes that are told."""
    parts, start = [np.zeros(0, np.int64)], 0
    for batch in batches(tokens):
        parts.append(pipeline.fields_of(batch, told[start : start + len(batch)]).cpu().numpy())
        start += len(batch)
    return np.concatenate(parts)


def _maps_by_field(pipeline: Pipeline, tokens: TokenRows, fields: NDArray) -> list[UnseenMaps]:
    """Of each field its own images; of the last one of several all, as they are measured without their class."""
    maps = score_maps_of(pipeline, tokens, fields)
    parts = [UnseenMaps(rows, maps[rows]) for k in range(pipeline.fields) for rows in [np.flatnonzero(fields == k)]]
    if pipeline.fields > 1:
        together = np.full(len(fields), pipeline.fields - 1)
        parts[-1] = UnseenMaps(np.arange(len(fields)), score_maps_of(pipeline, tokens, together))
    return parts
