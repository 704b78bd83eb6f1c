"""What engines are worth here: each plan's seconds, and how far it is from what the detector says."""

import contextlib
import importlib
import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.image_batches import read_batches
from ..data.images import ImageLike
from ..detect.detector import AnomalyDetector
from ..detect.pipeline import Measured
from ..errors import UniadFastError
from ..progress import progress
from ..signals import stop_if_asked
from .engine_files import EngineFiles
from .parity import OF_MAPS, difference
from .plans import Measure, Plan, plans_here, runner

BOUNDS = {"float32": 0.05, "bfloat16": 0.5}
"""Largest difference of an image's score, in standard deviations of good images. In bfloat16 verdicts near the
threshold change: it has to be asked for."""
_EXAMINED = 16
_ROUNDS = 7
_SECONDS = 20.0  # for the rounds of all engines together


class EngineError(UniadFastError):
    """An engine that can't be used here, or that says something else than the detector."""


@dataclass(frozen=True)
class Examined:
    """What was measured of a plan, at one size of batch.

    Attributes:
        load: seconds from nothing to ready, without the making of its graph, which is kept.
        image: seconds an image, median.
        score, map: largest difference of a score and of a map from the pipeline's, in standard deviations of good
            images.
        classes: how many images it takes for others than the pipeline does.
        problem: why it can't be run; the other figures are then 0.
    """

    engine: str
    part: str
    precision: str
    batch: int
    load: float
    image: float
    score: float
    map: float
    classes: int = 0
    problem: str = ""

    @property
    def plan(self) -> Plan:
        return Plan(self.engine, self.part, self.precision)

    @property
    def agrees(self) -> bool:
        """Whether its verdicts are the detector's."""
        bound = BOUNDS[self.precision]
        return not self.problem and not self.classes and self.score <= bound and self.map <= OF_MAPS * bound


def examine(
    detector: AnomalyDetector,
    images: Sequence[ImageLike],
    batches: Sequence[int],
    *,
    cache_dir: str | os.PathLike | None = None,
    quiet: bool = False,
    plans: Sequence[Plan] | None = None,
) -> list[Examined]:
    """Measure plans in turns on some of the images, hold them against the pipeline, and remember it all.

    Args:
        batches: sizes to measure.
        plans: None for all of `plans_here`.

    Raises:
        EngineError: no image can be read.
    """
    picked = [images[i] for i in np.linspace(0, len(images) - 1, min(len(images), _EXAMINED)).astype(int)]
    read = list(read_batches(picked, detector.settings.image_size, _EXAMINED))
    if not read or not len(read[0].images):
        raise EngineError("no image can be read to examine engines on")
    sample, files = read[0].images, EngineFiles(detector, cache_dir)
    wanted = plans_here() if plans is None else list(plans)
    rows: list[Examined] = []
    with progress("examining engines", len(wanted) + len(batches), unit="step", quiet=quiet) as bar:
        imports = {name: _seconds_to_import(name) for name in sorted({plan.engine for plan in wanted})}
        ready: dict[Plan, tuple[Measure, float]] = {}
        for plan in wanted:
            stop_if_asked()
            try:
                if plan.engine != "torch":
                    files.graph(plan.part)
                started = time.perf_counter()
                measure = runner(plan, detector.pipeline, files)
                measure(sample[:1], None)
                ready[plan] = measure, time.perf_counter() - started + imports[plan.engine]
            except Exception as error:  # an engine that fails, however, is one that is not taken
                rows += [_failed(plan, batch, error) for batch in batches]
            bar.update(1)
        for batch in batches:
            stop_if_asked()
            rows += _examined(detector, sample, batch, ready)
            bar.update(1)
    # What has failed may do so no more.
    fresh = [row for row in rows if not row.problem]
    measured = {(row.plan, row.batch) for row in rows}
    old = [row for row in rows_of(files.table()) if (row.plan, row.batch) not in measured]
    files.remember([asdict(row) for row in old + fresh])
    return rows


def _examined(
    detector: AnomalyDetector, sample: Tensor, batch: int, ready: dict[Plan, tuple[Measure, float]]
) -> list[Examined]:
    given = sample.repeat(-(-batch // len(sample)), 1, 1, 1)[: max(batch, len(sample) // batch * batch)]
    parts = given.split(batch)
    truth = [detector.pipeline.measure(part) for part in parts]
    scale = _scale(detector, truth)
    rows: list[Examined] = []
    times: dict[Plan, list[float]] = {}
    off: dict[Plan, tuple[float, float, int]] = {}
    for plan, (measure, _) in ready.items():
        try:
            pairs = [(measure(part, None), own) for part, own in zip(parts, truth, strict=True)]
            off[plan], times[plan] = _difference(detector, pairs, scale), []
        except Exception as error:  # at this size of batch
            rows.append(_failed(plan, batch, error))
    started = time.perf_counter()
    for number in range(_ROUNDS):
        if number and time.perf_counter() - started > _SECONDS:
            break
        for plan, taken in times.items():
            before = time.perf_counter()
            ready[plan][0](parts[number % len(parts)], None)
            taken.append((time.perf_counter() - before) / batch)
    return rows + [Examined(*plan, batch, ready[plan][1], median(times[plan]), *off[plan]) for plan in times]


def _scale(detector: AnomalyDetector, truth: list[Measured]) -> float:
    """What differences are divided by: of a detector without a scale, the deviation of its maps."""
    return 1.0 if detector.is_calibrated else max(float(torch.cat([one.score_maps for one in truth]).std()), 1e-12)


def _difference(
    detector: AnomalyDetector, pairs: list[tuple[Measured, Measured]], scale: float
) -> tuple[float, float, int]:
    """Largest difference of a score and of a map, and how many images are taken for another class."""
    score = largest = 0.0
    classes = 0
    for theirs, own in pairs:
        both = [detector.judge(detector.pipeline.enlarge(one.score_maps), one.fields) for one in (theirs, own)]
        classes += int((theirs.fields != own.fields).sum())
        for one, other in zip(*both, strict=True):
            score = max(score, difference(np.array(one.score / scale), np.array(other.score / scale)))
            largest = max(largest, difference(one.anomaly_map / scale, other.anomaly_map / scale))
    return score, largest, classes


def _seconds_to_import(name: str) -> float:
    started = time.perf_counter()
    with contextlib.suppress(Exception):  # what is wrong with it, its first use will say
        importlib.import_module(name)
    return time.perf_counter() - started


def _failed(plan: Plan, batch: int, error: Exception) -> Examined:
    return Examined(*plan, batch, 0.0, 0.0, 0.0, 0.0, 0, reason_of(error))


def reason_of(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def rows_of(table: Iterable[dict[str, Any]]) -> list[Examined]:
    """The rows of a table that are what `examine` writes; somebody may have written something else."""
    names = {one.name: one.type for one in fields(Examined)}
    rows = []
    for row in table:
        if row.keys() == names.keys() and all(_is_a(row[name], kind) for name, kind in names.items()):
            rows.append(Examined(**row))
    return [row for row in rows if row.precision in BOUNDS and not row.problem]


def _is_a(value: Any, kind: Any) -> bool:
    if kind in (str, "str"):
        return isinstance(value, str)
    whole = isinstance(value, int) and not isinstance(value, bool)
    return (
        whole if kind in (int, "int") else (whole or isinstance(value, float)) and math.isfinite(value) and value >= 0
    )
