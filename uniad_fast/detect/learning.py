"""From good images to a trained, fitted and calibrated detector: what `AnomalyDetector.fit` and `add` do."""

import contextlib
import copy
import dataclasses
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.feature_cache import NoRoom, cached_features
from ..data.features import Features
from ..data.live_features import live_features
from ..data.samples import DataError, Sample
from ..errors import UniadFastError
from ..image_size import in_json
from ..models.backbone import Backbone
from ..models.precision import computes_in_bfloat16
from ..printable import printable
from ..rows import TokenRows
from ..state_dicts import hash_of_state_dict
from ..training.generators import seeded_generators
from ..training.loop import epochs_and_steps
from ..training.processes import current
from ..training.recipes import Recipe
from ..training.run_files import Diverged, RunFiles
from .calibration import Calibration
from .fit_scores import calibrated_by, fields_of, fit_scores
from .fitting import (
    new_backbone,
    new_model,
    new_pipeline,
    train_pipeline,
)
from .good_images import training_split
from .mosaic import Pictures, by_majority, pictures_of
from .pipeline import Pipeline
from .seen_images import LEARNT_FROM, marks_of, refuse_if_seen, without_copies
from .settings import DetectorSettings
from .trained import Recognition, Trained

_ADDED_SHARE = 0.2  # of the steps that training anew would take


@dataclass(frozen=True)
class Surroundings:
    """What belongs to one machine: device, implementation, folder of features (False keeps none), file of the
    backbone's weights.
    """

    device: torch.device
    impl: str | None = None
    cache_dir: str | os.PathLike | Literal[False] | None = None
    backbone_weights: str | os.PathLike | None = None
    quiet: bool = False

    def features(
        self, backbone: Backbone, settings: DetectorSettings, samples: Sequence[Sample], what: str
    ) -> Features:
        """Of these samples, from the cache or extracted into it; where it is not wanted or has no room, live."""
        paths, size = [sample.path for sample in samples], settings.image_size
        if self.cache_dir is not False:
            how: dict[str, Any] = {"precision": settings.feature_precision, "overlap": settings.overlap}
            try:
                return cached_features(backbone, size, paths, self.cache_dir, what, self.quiet, **how)
            except NoRoom as error:
                if settings.tiling is not None:
                    raise
                print(f"{error}: they are extracted anew whenever they are needed", file=sys.stderr)
        if settings.tiling is not None:
            raise UniadFastError("the features of tiles have to be kept: for each one a whole picture would be decoded")
        return live_features(backbone, size, paths, what, self.quiet)


@dataclass(frozen=True)
class Run:
    """Where log and checkpoints of a training are kept (None: nowhere), whether it goes on, how often it saves, and
    where TensorBoard's events go (None: nowhere).
    """

    work_dir: str | os.PathLike | None = None
    resume: bool = False
    checkpoint_seconds: float = 60.0
    events: str | os.PathLike | None = None


class Learned(NamedTuple):
    """A detector, and messages about images that were left out, or not seen quite as they are."""

    trained: Trained
    unreadable: list[str]
    notes: list[str]


class _Good(NamedTuple):
    """Good images that could be read: to train on, and held out; their features, and the numbers of their classes."""

    kept: list[Sample]
    held_out: list[Sample]
    features: tuple[Features, Features]
    classes: tuple[str, ...]
    numbers: NDArray

    @property
    def pictures(self) -> Pictures | None:
        """Of which the images are tiles, where they are."""
        return pictures_of(self.features)

    @property
    def parts(self) -> list[TokenRows]:
        return [features.tokens for features in self.features]


def learn(
    settings: DetectorSettings,
    samples: list[Sample],
    where: Surroundings,
    run: Run,
    before: Trained | None = None,
    roi: Tensor | None = None,
) -> Learned:
    """Train on good images, fit scores to them, and set the threshold from them.

    Args:
        before: a detector to go on from, in a fifth of the steps; its classes must all be among the samples'.
        roi: bool [height, width] of the images, where they are looked at; None is everywhere, or where `before` does.

    Raises:
        DataError: fewer than two readable good images, or a class of `before` has none.
        The others as `AnomalyDetector.fit` does.
    """
    if before is not None and not before.classes:
        raise DataError("this detector does not know which classes it was trained on: train anew")
    copies: list[str] = []
    samples = without_copies(samples, copies)
    if len(samples) < 2 and copies:
        raise DataError(f"training needs at least two good images, got {len(samples)}: {copies[0]}")
    kept, held_out = training_split(samples, settings.held_out, settings.seed)
    if before is None:
        backbone = new_backbone(settings, where.backbone_weights).to(where.device)
    else:
        backbone = before.pipeline.backbone
    good, unreadable, notes = _read(settings, backbone, kept, held_out, where)
    notes = copies + notes
    if before is not None and (gone := sorted(set(before.classes) - set(good.classes))):
        raise DataError(
            f"no good image of {', '.join(map(printable, gone))}, which the detector knows: it would forget what it is "
            "not shown again. Give the images of all classes, the old ones too; their features are in the cache"
        )
    recipe = settings.recipe if before is None else _shorter(settings.recipe, len(good.parts[0]))
    pipeline = _new_pipeline(settings, backbone, len(good.classes), where, before)
    looked_at = roi.to(where.device) if roi is not None else before.pipeline.roi if before is not None else None
    pipeline.roi = looked_at if settings.tiling is None else None  # it is the picture's, and no tile's
    origin = None if before is None else hash_of_state_dict(before.pipeline.model.state_dict())
    log = _train(pipeline, good, settings, recipe, run, where, origin)
    pipeline.roi = looked_at
    calibration, recognition = _fitted_by_first(pipeline, good, settings)
    earlier = "" if before is None else before.trained_with.get(LEARNT_FROM, "")
    trained_with = _machine(recipe, where.device) | {LEARNT_FROM: marks_of(good.kept + good.held_out, earlier)}
    content = (settings, pipeline.eval(), calibration, good.classes, recognition, trained_with, log)
    return Learned(Trained(*content), unreadable, notes)


def _fitted_by_first(
    pipeline: Pipeline, good: _Good, settings: DetectorSettings
) -> tuple[Calibration, Recognition | None]:
    """What `fit_scores` gives: one process fits, and the others have it from there."""
    together = current()
    if together.count == 1:
        return fit_scores(pipeline, good.parts, good.numbers, settings, good.pictures)

    def fit() -> tuple[Any, ...]:
        found = fit_scores(pipeline, good.parts, good.numbers, settings, good.pictures)
        parts = (pipeline.residual_score, pipeline.recognizer, pipeline.places)
        return found, [None if part is None else copy.deepcopy(part).cpu() for part in parts]

    found, (pipeline.residual_score, pipeline.recognizer, pipeline.places) = together.from_first(fit)
    pipeline.to(pipeline.device)
    return found


def recalibrated(trained: Trained, samples: list[Sample], where: Surroundings) -> tuple[Trained, Features]:
    """The detector with scales, threshold and colours from other good images, and their features.

    An image whose class it does not know is measured as the class that it recognizes. A class without an image keeps to
    what the others have in common.

    Raises:
        DataError: no readable image.
        UniadFastError: a score is not finite.
    """
    settings, pipeline = trained.settings, trained.pipeline
    refuse_if_seen(samples, trained.trained_with.get(LEARNT_FROM, ""))
    found = where.features(pipeline.backbone, settings, samples, "features of good images")
    if not len(found.tokens):
        raise DataError("calibration needs a readable good image" + "".join(f"\n  {m}" for m in found.unreadable))
    numbers = {name: number for number, name in enumerate(trained.classes)}
    told = [numbers.get(samples[row].class_name) for row in found.used]
    fields, pictures = fields_of(pipeline, found.tokens, told), pictures_of([found])
    if pictures is not None:
        fields = by_majority(fields, pictures.numbers)
    return trained._replace(calibration=calibrated_by(pipeline, found.tokens, fields, settings, pictures)), found


def _read(
    settings: DetectorSettings,
    backbone: Backbone,
    kept: list[Sample],
    held_out: list[Sample],
    where: Surroundings,
) -> tuple[_Good, list[str], list[str]]:
    good = where.features(backbone, settings, kept, "features of good images")
    unseen = where.features(backbone, settings, held_out, "features of held-out good images")
    unreadable = good.unreadable + unseen.unreadable
    if not len(good.tokens) or not len(unseen.tokens):
        raise DataError(
            f"training needs at least two readable good images, of {len(kept) + len(held_out)} listed "
            f"{len(unreadable)} could not be read" + "".join(f"\n  {m}" for m in unreadable[:10])
        )
    readable = [kept[row] for row in good.used], [held_out[row] for row in unseen.used]
    names = [sample.class_name for part in readable for sample in part]
    classes = tuple(sorted(set(names)))
    numbers = np.array([classes.index(name) for name in names])
    return _Good(*readable, (good, unseen), classes, numbers), unreadable, good.notes + unseen.notes


def _new_pipeline(
    settings: DetectorSettings, backbone: Backbone, classes: int, where: Surroundings, before: Trained | None
) -> Pipeline:
    with seeded_generators(settings.seed, where.device):
        model = new_model(settings, backbone, backbone.feature_size(settings.image_size), where.impl)
    pipeline = new_pipeline(settings, backbone, model, classes).to(where.device)
    if before is not None:
        model.load_state_dict(before.pipeline.model.state_dict())
        pipeline.mean, pipeline.std = before.pipeline.mean.clone(), before.pipeline.std.clone()
    return pipeline


def _shorter(recipe: Recipe, images: int) -> Recipe:
    """A fifth of it, in whole epochs, in the units that the network has learnt to see."""
    epochs, _ = epochs_and_steps(images, recipe)
    return dataclasses.replace(recipe, epochs=max(1, round(_ADDED_SHARE * epochs)), min_steps=0, standardize=False)


def _train(
    pipeline: Pipeline,
    good: _Good,
    settings: DetectorSettings,
    recipe: Recipe,
    run: Run,
    where: Surroundings,
    origin: str | None,
) -> str:
    """The training's log. origin: hash of the weights that it goes on from."""
    identity = {
        "features": good.features[0].key,
        "image_size": in_json(settings.image_size),
        **({} if settings.overlap is None else {"overlap": settings.overlap}),
        "architecture": dataclasses.asdict(settings.architecture),
        "goes on from": origin,
    }
    with contextlib.ExitStack() as stack:
        directory = run.work_dir or stack.enter_context(tempfile.TemporaryDirectory())
        files = RunFiles(directory, identity, run.resume, run.checkpoint_seconds, run.events, current(), where.quiet)
        options: dict[str, Any] = {"validation": good.parts[1], "classes": good.numbers[: len(good.parts[0])]}
        try:
            train_pipeline(pipeline, good.parts[0], recipe, settings.seed, files, **options)
        except Diverged as error:
            raise error.with_names([good.kept[row].path for row in error.rows]) from None
        return current().from_first(lambda: files.path("log.csv").read_text(encoding="utf-8"))


def _machine(recipe: Recipe, device: torch.device) -> dict[str, str]:
    """What the recipe left to the machine, and the machine."""
    precision = "bfloat16" if computes_in_bfloat16(recipe.precision, device) else "float32"
    return {
        "optimizer": recipe.optimizer,
        "precision": precision,
        "device": str(device),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
    }
