"""From images that were read to verdicts: measured whole, or in tiles at the pictures' own resolution."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ..data.image_batches import ImageBatch
from ..data.tiling import STEP, Tiling
from ..image_size import Size
from .mosaic import Mosaic
from .pace import Pace
from .pipeline import Measured
from .prediction import Prediction, judge_maps
from .trained import Trained

Measure = Callable[[Tensor, Sequence[int | None] | None], Measured]
_TILES = 16  # at a time
_ASKED = 32  # tiles, evenly picked, that say which class a picture is of


class Verdicts(NamedTuple):
    """On B images: predictions; the raw score maps, [H, W] each (of tiled images their anomaly maps); features [B, N,
    C], none of tiled images.
    """

    predictions: list[Prediction]
    score_maps: list[Tensor]
    tokens: Tensor


def verdicts(
    measure: Measure,
    known: Trained,
    batch: ImageBatch,
    told: Sequence[int | None],
    threshold: float | None = None,
    pace: Pace | None = None,
) -> Verdicts:
    """Measure and judge a batch; a score that is not finite is for the caller to refuse.

    Args:
        measure: as `Pipeline.measure`.
        batch: with tensors, or for a detector that looks at tiles with pictures.
        told: number of each image's class; None where it is to be recognized.
        threshold: instead of the detector's.
        pace: told how long it takes.

    Raises:
        Whatever `measure` does.
    """
    pace, pipeline, tiling = pace or Pace(), known.pipeline, known.settings.tiling
    if tiling is None:
        with pace.stage("measuring"):
            tokens, score_maps, fields = measure(batch.images, told)
        with pace.stage("verdicts"):
            found = judged(known, pipeline.enlarge(score_maps), fields, batch.sizes, threshold)
        return Verdicts(found, list(score_maps.cpu()), tokens)
    found, maps = [], []
    for picture, number, size in zip(batch.pictures, told, batch.sizes, strict=True):
        with pace.stage("measuring"):
            raw, field = _measure_tiles(measure, known, tiling, picture, number)
        with pace.stage("verdicts"):
            maps.append(pipeline.masked(pipeline.by_place(raw, field)[None])[0])
            found += judged(known, maps[-1][None], torch.tensor([field]), [size], threshold)
    return Verdicts(found, maps, torch.zeros(0, 0, 0))


def judged(
    known: Trained,
    maps: Tensor,
    fields: Tensor | None = None,
    sizes: Sequence[Size] | None = None,
    threshold: float | None = None,
) -> list[Prediction]:
    """What raw anomaly maps [B, height, width] say of their images, see `judge_maps`; fields of None are the last."""
    if fields is None:
        fields = torch.full((len(maps),), known.pipeline.fields - 1)
    kind, step = known.settings.image_score, 1 if known.settings.tiling is None else STEP
    return judge_maps(maps, fields, known.names, kind, known.calibration, threshold, sizes, step)


def _measure_tiles(
    measure: Measure, known: Trained, tiling: Tiling, picture: Image.Image, told: int | None
) -> tuple[Tensor, int]:
    """(raw map of the picture, field that all of its tiles were measured by): what is held is some tiles' at a time."""
    size = (picture.height, picture.width)
    corners, mosaic, begun = tiling.corners(size), Mosaic(tiling, size), dict[int, Tensor]()
    if told is None and known.pipeline.recognizer is not None:
        told, begun = _recognize(measure, known, tiling, picture)
    field = 0 if told is None else told
    for number, score_map in begun.items():
        mosaic.add([corners[number]], score_map[None])
    rest = [number for number in range(len(corners)) if number not in begun]
    for start in range(0, len(rest), _TILES):
        some = [corners[number] for number in rest[start : start + _TILES]]
        images = torch.stack([tiling.cut(picture, corner) for corner in some])
        mosaic.add(some, measure(images, [field] * len(some)).score_maps)
    return mosaic.map(), field


def _recognize(measure: Measure, known: Trained, tiling: Tiling, picture: Image.Image) -> tuple[int, dict[int, Tensor]]:
    """(field of the class that most of some tiles are of, or of none; score maps by it that are known already)."""
    corners = tiling.corners((picture.height, picture.width))
    picked = torch.linspace(0, len(corners) - 1, min(_ASKED, len(corners))).round().long().unique().tolist()
    fields, score_maps = list[int](), list[Tensor]()
    for start in range(0, len(picked), _TILES):
        images = torch.stack([tiling.cut(picture, corners[number]) for number in picked[start : start + _TILES]])
        found = measure(images, None)
        fields += found.fields.tolist()
        score_maps += list(found.score_maps.cpu())
    field = max(set(fields), key=fields.count)
    if 2 * fields.count(field) <= len(fields):
        field = known.pipeline.fields - 1
    pairs = zip(picked, fields, score_maps, strict=True)
    return field, {number: score_map for number, own, score_map in pairs if own == field}
