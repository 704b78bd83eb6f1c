"""Which engine measures images fastest on this machine, with the same verdicts: PyTorch, OpenVINO or ONNX Runtime.

An engine runs the backbone alone, before this package's own network, or the network too. What it says of some images is
held against what the pipeline says; the fastest of those that agree is taken, and remembered (`engine_files`).
"""

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ..data.image_batches import read_batches
from ..data.images import ImageLike
from ..detect.detector import AnomalyDetector
from ..errors import UniadFastError
from ..packages import require
from ..printable import printable
from ..progress import progress
from .engine_files import EngineFiles
from .export import SUFFIXES
from .exported import measured_by_file
from .parity import difference
from .plans import Measure, Plan, plans_here, runner

ENGINES = ("auto", "torch", "openvino", "onnxruntime")
BOUNDS = {"float32": 0.05, "bfloat16": 0.5}
"""Largest difference of an image's score, in standard deviations of good images. In bfloat16 verdicts near the
threshold change: it has to be asked for."""
WORTH_MEASURING = 1000  # images: to measure takes about as long as it saves on these
_WORTH_FOLDING = 32  # images
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
    problem: str = ""

    @property
    def plan(self) -> Plan:
        return Plan(self.engine, self.part, self.precision)

    @property
    def agrees(self) -> bool:
        """Whether its verdicts are the detector's."""
        return not self.problem and self.score <= BOUNDS[self.precision]


class Choice(NamedTuple):
    """The plan that is used (None: the pipeline as it is), what is known of all plans, and a remark for the user."""

    plan: Plan | None
    examined: list[Examined]
    note: str | None


def use_engine(
    detector: AnomalyDetector,
    name: str = "auto",
    images: Sequence[ImageLike] = (),
    *,
    count: int | None = None,
    batch: int = 1,
    precision: str = "float32",
    cache_dir: str | os.PathLike | None = None,
    quiet: bool = False,
) -> Choice:
    """Let the detector measure images by an engine from now on.

    Args:
        name: one of `ENGINES`, or an .onnx or .xml file that this detector was exported to. "auto" is the fastest that
            agrees with the pipeline: as it was measured before on this machine, or, if `count` is worth it, as is
            measured now.
        images: some like those that will be measured, to examine engines on.
        count: how many images there are to measure; None is no end of them.
        batch: at a time.
        precision: of the engine's part, a key of `BOUNDS`; this package's own network has that of the recipe.

    Raises:
        EngineError: there is no such engine or precision here, or none of its plans agrees with the pipeline.
        MissingPackageError: its package is not installed.
    """
    if Path(name).suffix in SUFFIXES.values():
        detector.engine = measured_by_file(detector, name)
        return Choice(None, [], None)
    if name not in ENGINES:
        names = ", ".join(ENGINES)
        raise EngineError(f"the engine must be one of {names}, or an exported file, got {printable(name)!r}")
    if precision not in BOUNDS:
        raise EngineError(f"an engine's precision must be one of {', '.join(BOUNDS)}, got {printable(precision)!r}")
    if name not in ("auto", "torch"):
        require(name, "onnx", "onnxscript")
    detector.engine = None
    if detector.device.type != "cpu":
        if name not in ("auto", "torch") or precision != "float32":
            raise EngineError(f"the detector is on {detector.device}: there it is PyTorch in float32 alone")
        return Choice(None, [], None)
    plans = [plan for plan in plans_here() if name in ("auto", plan.engine) and plan.precision == precision]
    if not plans:
        raise EngineError(f"no engine computes in {precision} on this machine as it should")
    files = EngineFiles(detector, cache_dir)
    if plans == [Plan("torch", "features", "float32")]:
        return _set(detector, plans[0] if count is None or count > _WORTH_FOLDING else None, files, [])
    known = [row for row in _rows(files.table()) if row.batch == batch and row.plan in plans]
    if {row.plan for row in known} != set(plans):
        few = count is not None and count < WORTH_MEASURING
        if (name, precision) == ("auto", "float32") and (few or not len(images)):
            folds = count is None or count > _WORTH_FOLDING
            return _set(detector, Plan("torch", "features", "float32") if folds else None, files, [])
        known = examine(detector, images, [batch], cache_dir=cache_dir, quiet=quiet, plans=plans)
    able = [row for row in known if row.agrees]
    if not able:
        raise EngineError(f"{name} does not agree with the detector here: {'; '.join(map(_why_not, known))}")
    total = 1e9 if count is None else count
    best = min(able, key=lambda row: row.load + total * row.image)
    return _set(detector, best.plan, files, known)


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
        ready: dict[Plan, tuple[Measure, float]] = {}
        for plan in wanted:
            try:
                if plan.engine != "torch":
                    files.graph(plan.part)
                started = time.perf_counter()
                measure = runner(plan, detector.pipeline, files)
                measure(sample[:1], None)
                ready[plan] = measure, time.perf_counter() - started
            except Exception as error:  # an engine that fails, however, is one that is not taken
                reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
                rows += [Examined(*plan, batch, 0.0, 0.0, 0.0, 0.0, reason) for batch in batches]
            bar.update(1)
        for batch in batches:
            rows += _examined(detector, sample, batch, ready)
            bar.update(1)
    old = [row for row in _rows(files.table()) if (row.plan, row.batch) not in {(one.plan, one.batch) for one in rows}]
    files.remember([asdict(row) for row in old + rows])
    return rows


def _examined(
    detector: AnomalyDetector, sample: Tensor, batch: int, ready: dict[Plan, tuple[Measure, float]]
) -> list[Examined]:
    given = sample.repeat(-(-batch // len(sample)), 1, 1, 1)[: max(batch, len(sample) // batch * batch)]
    parts = given.split(batch)
    truth = [_judged(detector, detector.pipeline.measure, part) for part in parts]
    off = {}
    for plan, (measure, _) in ready.items():
        pairs = [(_judged(detector, measure, part), own) for part, own in zip(parts, truth, strict=True)]
        off[plan] = [max(difference(theirs[k], own[k]) for theirs, own in pairs) for k in (0, 1)]
    times: dict[Plan, list[float]] = {plan: [] for plan in ready}
    started = time.perf_counter()
    for number in range(_ROUNDS):
        if number > 2 and time.perf_counter() - started > _SECONDS:
            break
        for plan, (measure, _) in ready.items():
            before = time.perf_counter()
            measure(parts[number % len(parts)], None)
            times[plan].append((time.perf_counter() - before) / batch)
    return [Examined(*plan, batch, ready[plan][1], median(times[plan]), off[plan][0], off[plan][1]) for plan in ready]


def _judged(detector: AnomalyDetector, measure: Measure, images: Tensor) -> tuple[Any, Any]:
    """(scores, maps) of some images as a detector gives them; of one without a scale, by the maps' deviation."""
    found = measure(images, None)
    predictions = detector.judge(detector.pipeline.enlarge(found.score_maps), found.fields)
    scores, maps = np.array([one.score for one in predictions]), np.stack([one.anomaly_map for one in predictions])
    scale = 1.0 if detector.is_calibrated else max(float(maps.std()), 1e-12)
    return scores / scale, maps / scale


def _set(detector: AnomalyDetector, plan: Plan | None, files: EngineFiles, known: list[Examined]) -> Choice:
    if plan is None:
        return Choice(None, known, None)
    detector.engine = runner(plan, detector.pipeline, files)
    others = [row for row in known if not row.agrees and not row.problem]
    note = "; ".join(map(_why_not, others)) if others else None
    return Choice(plan, known, note)


def _rows(table: list[dict[str, Any]] | None) -> list[Examined]:
    """Rows of a table; none where somebody has written something else."""
    names = {one.name for one in fields(Examined)}
    rows = [Examined(**row) for row in table or [] if row.keys() == names]
    return [row for row in rows if row.precision in BOUNDS]


def _why_not(row: Examined) -> str:
    if row.problem:
        return f"{row.plan}: {printable(row.problem)}"
    return f"{row.plan} is off by {row.score:.2g} standard deviations, and may be by {BOUNDS[row.precision]}"
