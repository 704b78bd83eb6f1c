"""One run of a study: a system trained on some classes with a seed, its quality measured as the loss falls."""

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..detect.fitting import fit_residual_score, train_pipeline
from ..detect.metrics import detection_metrics, mean_of_defined
from ..detect.pipeline import Pipeline, to_maps
from ..detect.residual_score import ResidualScore, image_scores
from ..files import atomic_path
from ..printable import file_name
from ..rows import TokenRows
from ..training.generators import seeded_generators
from ..training.recipes import Recipe
from ..training.run_files import ResumeError, RunFiles
from .data import StudyData
from .systems import System

_BATCH = 64
_WATCHED = 10
"""A recipe with patience watches every so manyth training image instead of training on it."""
EVERY_CLASS = "mean"
"""The class name of a row that is the mean over classes."""


@dataclass(frozen=True)
class Trial:
    """What is run.

    Attributes:
        system: what is trained.
        recipe: of the study; the system's changes come on top.
        seed: of initial values, batch order and noise.
        class_name: the one class trained and tested on (the separate setting); None is all in one model (unified).
        every: epochs between two evaluations; the first epoch and the last are evaluated too.
        scores: how residuals are scored, of `RESIDUAL_SCORES`.
        pictured: rows of the test set whose maps are kept.
    """

    system: System
    recipe: Recipe
    seed: int
    class_name: str | None
    every: int
    scores: tuple[str, ...] = ("l2",)
    pictured: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """A file name."""
        words = [self.system.name, f"seed {self.seed}", "unified"]
        if self.class_name is not None:
            words[-1] = f"class {file_name(self.class_name)}"
        return "-".join(word.replace(" ", "_") for word in words[:-1]) + f"-{words[-1]}"

    @property
    def setting(self) -> str:
        return "unified" if self.class_name is None else "separate"

    def evaluates(self, epoch: int) -> bool:
        """Whether there is an evaluation after so many epochs; after the last there is one anyway."""
        return epoch == 1 or epoch % self.every == 0

    def identity(self, data: StudyData, impl: str | None) -> dict[str, Any]:
        """What a finished run is recognised by (JSON values)."""
        content = {
            "system": self.system.identity(),
            "recipe": asdict(self.recipe),
            "seed": self.seed,
            "class": self.class_name,
            "every": self.every,
            "scores": self.scores,
            "features": data.key,
            "image_size": data.image_size,
            "impl": impl,
        }
        return json.loads(json.dumps(content))


def run_trial(
    trial: Trial,
    data: StudyData,
    directory: Path,
    device: torch.device,
    impl: str | None = None,
    after_epoch: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """Train and measure, or read what an earlier call measured; an interrupted one goes on.

    Args:
        directory: gets NAME.json when the run is done, and NAME.training/ until then.
        after_epoch: called with the number of epochs done.

    Returns:
        One row for each evaluation, class and score: {"epoch", "seconds" of training so far, "loss" of the epoch,
        "score", "class", "image_auroc_max", "image_auroc_mean", "pixel_auroc" (None without masks), and "score_maps" of
        the pictured images in the row of `EVERY_CLASS`}.

    Raises:
        ResumeError: `directory` holds a run of this name that is not this one; says what differs.
    """
    identity = trial.identity(data, impl)
    finished = directory / f"{trial.name}.json"
    if finished.exists():
        return _read_finished(finished, identity)
    work_dir = directory / f"{trial.name}.training"
    measured_path = work_dir / "measured.json"
    measured = _read_measured(measured_path) if measured_path.exists() else {}
    recipe = trial.system.recipe(trial.recipe)
    pipeline = _new_pipeline(trial, data, recipe, device, impl)

    def measure(epoch: int) -> None:
        measured[str(epoch)] = _measure(pipeline, data, trial)
        with atomic_path(measured_path) as path:
            path.write_text(json.dumps(measured, allow_nan=False), encoding="utf-8")

    def at_epoch(epoch: int) -> None:
        if trial.evaluates(epoch):
            measure(epoch)
        if after_epoch is not None:
            after_epoch(epoch)

    tokens, watched = _trained_and_watched(data.train_tokens, recipe)
    files = RunFiles(work_dir, {"trial": identity}, resume=True, quiet=True)
    options: dict[str, Any] = {"validation": watched, "after_epoch": at_epoch}
    epochs = train_pipeline(pipeline, tokens, recipe, trial.seed, files, **options)
    if str(epochs) not in measured:
        measure(epochs)
    rows = _with_training_figures(measured, work_dir / "log.csv")
    with atomic_path(finished) as path:
        path.write_text(json.dumps({"identity": identity, "rows": rows}, allow_nan=False), encoding="utf-8")
    shutil.rmtree(work_dir)
    return rows


def _new_pipeline(trial: Trial, data: StudyData, recipe: Recipe, device: torch.device, impl: str | None) -> Pipeline:
    backbone = data.backbone
    feature_size = backbone.feature_size(data.image_size)
    with seeded_generators(trial.seed, device):
        model = trial.system.build(backbone.channels, backbone.stride, feature_size, recipe, impl)
    return Pipeline(backbone, model, data.image_size, recipe.precision, "l2").to(device)


def _trained_and_watched(tokens: TokenRows, recipe: Recipe) -> tuple[TokenRows, TokenRows]:
    """What a recipe with patience watches is a part of the training images, which it then does not train on."""
    if not recipe.patience:
        return tokens, tokens[:0]
    watched = np.arange(len(tokens)) % _WATCHED == 0
    return tokens[~watched], tokens[watched]


def _with_training_figures(measured: dict[str, list[dict[str, Any]]], log: Path) -> list[dict[str, Any]]:
    """Rows of all evaluations, in order, with the loss of the epoch and the seconds until then."""
    losses, seconds = _epochs_of_log(log)
    return [
        {"epoch": int(epoch), "seconds": seconds[int(epoch)], "loss": losses[int(epoch)], **row}
        for epoch, found in sorted(measured.items(), key=lambda item: int(item[0]))
        for row in found
    ]


def _read_measured(path: Path) -> dict[str, list[dict[str, Any]]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not all(int(epoch) > 0 and isinstance(found, list) for epoch, found in content.items()):
            raise ValueError("not the evaluations by epoch")
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ResumeError(f"{path} is damaged ({error}): remove {path.parent} to run it again") from None
    return content


def _read_finished(path: Path, identity: dict[str, Any]) -> list[dict[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        was, rows = content["identity"], content["rows"]
        if not isinstance(was, dict) or not isinstance(rows, list):
            raise ValueError("not a run")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ResumeError(f"{path} is damaged ({error}): remove it to run it again") from None
    differing = [f"{n}: was {was.get(n)}, is {identity[n]}" for n in identity if was.get(n) != identity[n]]
    if differing:
        raise ResumeError(f"{path} is of another study ({'; '.join(differing)}): choose another output folder")
    return rows


def _measure(pipeline: Pipeline, data: StudyData, trial: Trial) -> list[dict[str, Any]]:
    """Rows of one evaluation, without the training's figures."""
    classes = sorted({sample.class_name for sample in data.train})
    fields = len(classes) + 1 if len(classes) > 1 else 1
    size = pipeline.model.feature_size
    scores = {
        kind: ResidualScore(kind, pipeline.backbone.deepest, size, fields).to(pipeline.device) for kind in trial.scores
    }
    numbers = np.array([classes.index(sample.class_name) for sample in data.train])
    for one in scores.values():
        fit_residual_score(one, pipeline, [data.train_tokens], numbers, trial.seed)
    told = torch.tensor([classes.index(sample.class_name) for sample in data.test])
    parts: dict[str, list[torch.Tensor]] = {score: [] for score in trial.scores}
    for start in range(0, len(data.test), _BATCH):
        residual = pipeline.residual(torch.from_numpy(np.array(data.test_tokens[start : start + _BATCH])))
        own = told[start : start + _BATCH].to(pipeline.device)
        for score in trial.scores:
            parts[score].append(scores[score](residual, own).cpu())
    rows: list[dict[str, Any]] = []
    for score in trial.scores:
        score_maps = torch.cat(parts[score])
        by_class = [_measure_class(data, score_maps, name) for name in data.classes]
        mean = {name: mean_of_defined([row[name] for row in by_class]) for name in by_class[0]}
        pictures = {str(row): score_maps[row].tolist() for row in trial.pictured}
        rows += [{"score": score, "class": n, **row} for n, row in zip(data.classes, by_class, strict=True)]
        rows.append({"score": score, "class": EVERY_CLASS, **mean, "score_maps": pictures})
    return rows


def _measure_class(data: StudyData, score_maps: torch.Tensor, name: str) -> dict[str, float | None]:
    rows = [i for i, sample in enumerate(data.test) if sample.class_name == name]
    labels = [data.test[i].defective for i in rows]
    scores: dict[str, list[NDArray]] = {"max": [], "mean": []}
    kept: list[NDArray] = []
    for start in range(0, len(rows), _BATCH):  # ten thousand whole maps are 2 GB
        maps = to_maps(score_maps[rows[start : start + _BATCH]], data.image_size)
        for kind, parts in scores.items():
            parts.append(image_scores(maps, kind).numpy())
        if data.masks is not None:
            kept.append(maps.numpy().ravel())
    image = {
        f"image_auroc_{kind}": detection_metrics(np.concatenate(parts), labels).values["auroc"]
        for kind, parts in scores.items()
    }
    pixel = None
    if data.masks is not None:
        pixel = detection_metrics(np.concatenate(kept), data.masks[rows].ravel()).values["auroc"]
    return {**image, "pixel_auroc": pixel}


def _epochs_of_log(path: Path) -> tuple[dict[int, float], dict[int, float]]:
    """(mean loss, seconds of training until its end) by the number of the epoch, from 1."""
    losses: dict[int, list[float]] = {}
    seconds: dict[int, float] = {}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            epoch = int(row["epoch"]) + 1
            losses.setdefault(epoch, []).append(float(row["loss"]))
            seconds[epoch] = float(row["seconds"])
    return {epoch: float(np.mean(values)) for epoch, values in losses.items()}, seconds
