"""Which engine measures images fastest on this machine, with the same verdicts: PyTorch, OpenVINO or ONNX Runtime.

An engine runs the backbone alone, before this package's own network, or the network too. What it says of some images is
held against what the pipeline says; the fastest of those that agree is taken, and remembered (`engine_files`).
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..data.images import ImageLike
from ..detect.detector import AnomalyDetector
from ..packages import require
from ..printable import printable
from .engine_files import EngineFiles
from .examine import BOUNDS, EngineError, Examined, examine, reason_of, rows_of
from .export import SUFFIXES
from .exported import measured_by_file
from .parity import OF_MAPS
from .plans import Plan, plans_here, runner

ENGINES = ("auto", "torch", "openvino", "onnxruntime")
WORTH_MEASURING = 1000  # images: to measure takes about as long as it saves on these
_WORTH_BATCHES = 60
_WORTH_FOLDING = 32  # images
_PLAIN = Plan("torch", "features", "float32")


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
    plans = _plans(detector, name, precision)
    detector.engine = None
    folds = count is None or count > _WORTH_FOLDING
    is_free = (name, precision) == ("auto", "float32")
    if not plans or (not folds and (is_free or plans == [_PLAIN])):
        return Choice(None, [], None)  # on a GPU; or all is done before anything else is ready
    files = EngineFiles(detector, cache_dir)
    if plans == [_PLAIN]:
        return _first_that_works(detector, plans, files, [], name)
    batch = batch if count is None else max(1, min(batch, count))
    known = [row for row in rows_of(files.table()) if row.batch == batch and row.plan in plans]
    if {row.plan for row in known} != set(plans) and not (known and name == "auto"):
        few = count is not None and count < max(WORTH_MEASURING, _WORTH_BATCHES * batch)
        if is_free and (few or not len(images)):
            return _first_that_works(detector, [_PLAIN], files, [], name)
        if not len(images):
            raise EngineError(
                f"{name} was not measured with this detector at batches of {batch}: "
                f"run uniad-fast engines BUNDLE IMAGES --batch-size {batch}"
            )
        known = examine(detector, images, [batch], cache_dir=cache_dir, quiet=quiet, plans=plans)
    total = 1e9 if count is None else count
    able = sorted((row for row in known if row.agrees), key=lambda row: row.load + total * row.image)
    if not able:
        raise EngineError(f"{name} does not agree with the detector here: {'; '.join(map(_why_not, known))}")
    return _first_that_works(detector, [row.plan for row in able], files, known, name)


def _plans(detector: AnomalyDetector, name: str, precision: str) -> list[Plan]:
    """Those of this name and precision here; none where the detector is on a GPU, which PyTorch has for itself."""
    if name not in ENGINES:
        names = ", ".join(ENGINES)
        raise EngineError(f"the engine must be one of {names}, or an exported file, got {printable(name)!r}")
    if precision not in BOUNDS:
        raise EngineError(f"an engine's precision must be one of {', '.join(BOUNDS)}, got {printable(precision)!r}")
    if name not in ("auto", "torch"):
        require(name, "onnx", "onnxscript")
    if detector.device.type != "cpu":
        if name not in ("auto", "torch") or precision != "float32":
            raise EngineError(f"the detector is on {detector.device}: there it is PyTorch in float32 alone")
        return []
    plans = [plan for plan in plans_here() if name in ("auto", plan.engine) and plan.precision == precision]
    if not plans:
        what = "no engine" if name == "auto" else f"{name} is not one that"
        raise EngineError(f"{what} computes in {precision} on this machine as it should")
    return plans


def _first_that_works(
    detector: AnomalyDetector, plans: Sequence[Plan], files: EngineFiles, known: list[Examined], name: str
) -> Choice:
    """Set the first plan that can be loaded; without any, "auto" leaves the pipeline as it is."""
    notes = [_why_not(row) for row in known if not row.agrees and not row.problem]
    for plan in plans:
        try:
            detector.engine = runner(plan, detector.pipeline, files)
        except Exception as error:  # engines raise whatever they like
            notes.append(f"{plan} can't be loaded: {reason_of(error)}")
            continue
        return Choice(plan, known, "; ".join(notes) or None)
    if name != "auto":
        raise EngineError("; ".join(notes))
    return Choice(None, known, "; ".join(notes) or None)


def _why_not(row: Examined) -> str:
    if row.problem:
        return f"{row.plan}: {printable(row.problem)}"
    bound = BOUNDS[row.precision]
    if row.classes:
        return f"{row.plan} takes {row.classes} images for another class"
    if row.score <= bound:
        return f"{row.plan} is off by {row.map:.2g} standard deviations in a map, and may be by {OF_MAPS * bound:g}"
    return f"{row.plan} is off by {row.score:.2g} standard deviations, and may be by {bound}"
