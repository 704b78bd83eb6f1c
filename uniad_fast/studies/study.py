"""The paper's experiments on any data set: which runs a study is made of, and running them, one after another."""

import csv
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..detect.metrics import mean_of_defined
from ..detect.residual_score import RESIDUAL_SCORES
from ..errors import UniadFastError
from ..files import atomic_path, locked
from ..printable import table_cell
from ..progress import progress
from ..training.loop import epochs_and_steps
from ..training.recipes import FAST, PAPER, Recipe
from .data import StudyData
from .paper import paper_trials
from .systems import PART_SYSTEMS, SHORTCUT_SYSTEMS, System, recipe_systems, switch_systems
from .trial import EVERY_CLASS, Trial, run_trial

COLUMNS = (
    "system", "setting", "seed", "class", "epoch", "seconds", "loss", "score",
    "image_auroc_max", "image_auroc_mean", "pixel_auroc",
)  # fmt: skip
_PICTURED = 6

SHORTCUT_RECIPE = replace(
    FAST,
    name="shortcut",
    epochs=40,
    min_steps=0,
    optimizer="adamw",
    learning_rate=1e-3,
    schedule="constant",
    warmup=0.05,
    residual_score="l2",
)
"""A constant rate, so that nothing but the reconstruction's own progress moves the AUROC; it rises at first, without
which Transformers hardly learn. AdamW for all, since an MLP or a CNN is not what Muon is told apart for."""
ABLATION_RECIPE = replace(FAST, name="ablation", epochs=20, min_steps=0, optimizer="adamw", learning_rate=1e-3)
"""With the optimiser of the paper's own ablation; on small maps its step costs half of Muon's too."""

PAPER_RECIPE = replace(PAPER, epochs=100, precision="auto")
"""The paper's recipe in the study "time": shorter, and in the precision of the fast one, which is in its favour."""

STUDIES = ("shortcut", "ablation", "recipe", "time", "paper")


@dataclass(frozen=True)
class Study:
    """A name, and the runs: seed by seed, so that the first whole comparison is there early."""

    name: str
    trials: tuple[Trial, ...]

    @property
    def systems(self) -> list[str]:
        """Names in the table's order."""
        return list(dict.fromkeys(trial.system.name for trial in self.trials))


def plan(
    name: str,
    data: StudyData,
    seeds: int = 3,
    epochs: int | None = None,
    quick: bool = False,
    separate: bool = True,
) -> Study:
    """The runs of one of `STUDIES`.

    Args:
        seeds: how many, from 0; of the separate setting, and of where and how the mask and the jitter act, one.
        epochs: of every run, in "time" and "paper" of the paper's recipe alone; None is the study's own.
        quick: an eighth of the epochs (in "time" and "paper" of the paper's recipe alone), one seed, a third of the
            evaluations and of an ablation the parts alone: to see it work, not to conclude.
        separate: in "paper", one model for each class too, beside the one for all.

    Raises:
        UniadFastError: no such study, or not even one seed.
    """
    if name not in STUDIES:
        raise UniadFastError(f"study must be one of {', '.join(STUDIES)}, got {name!r}")
    if seeds < 1:
        raise UniadFastError(f"seeds must be at least 1, got {seeds}")
    seeds = 1 if quick else seeds
    if name == "paper":
        return Study(name, paper_trials(data, seeds, _with_epochs(PAPER, epochs, quick), separate))
    recipe = SHORTCUT_RECIPE if name == "shortcut" else ABLATION_RECIPE if name == "ablation" else FAST
    recipe = _with_epochs(recipe, epochs, quick)
    feature_size = data.backbone.feature_size(data.image_size)
    if name == "time":
        paper = _with_epochs(PAPER_RECIPE, epochs, quick)
        every = max(1, epochs_and_steps(len(data.train), FAST)[0] // 6)
        fast = [Trial(System("fast"), FAST, seed, None, every, scores=RESIDUAL_SCORES) for seed in range(seeds)]
        # One seed of the slow one: what it reaches at best is compared, which is in its favour already.
        return Study(
            name, (*fast, Trial(System("paper"), paper, 0, None, max(1, paper.epochs // 20), scores=RESIDUAL_SCORES))
        )
    if name == "shortcut":
        every = max(1, recipe.epochs // (5 if quick else 15))
        pictured = pictured_rows(data)
        # One seed of one model a class: together they take as long as a model for all, and vary less.
        alone = data.classes if len(data.classes) > 1 else []
        trials = [
            Trial(system, recipe, seed, setting, every, pictured=pictured if seed == 0 and setting is None else ())
            for setting, seed in [*((None, s) for s in range(seeds)), *((name, 0) for name in alone)]
            for system in SHORTCUT_SYSTEMS
        ]
        return Study(name, tuple(trials))
    # The ablation is looked at half-way too; of the recipe's changes the end counts.
    every = max(1, recipe.epochs // 2) if name == "ablation" else sys.maxsize
    systems = recipe_systems(recipe) if name == "recipe" else PART_SYSTEMS
    compared = [(system, seed) for seed in range(seeds) for system in systems]
    if name == "ablation" and not quick:
        compared += [(system, 0) for system in switch_systems(feature_size)]
    return Study(
        name, tuple(Trial(system, recipe, seed, None, every, scores=RESIDUAL_SCORES) for system, seed in compared)
    )


def _with_epochs(recipe: Recipe, epochs: int | None, quick: bool) -> Recipe:
    if epochs is not None:
        return recipe.with_epochs(epochs)
    return recipe.with_epochs(max(1, recipe.epochs // 8)) if quick else recipe


def pictured_rows(data: StudyData) -> tuple[int, ...]:
    """Rows of some defective test images, of different classes and kinds as far as there are."""
    rows: list[int] = []
    seen: set[str] = set()
    for index, sample in enumerate(data.test):
        if sample.defective and not {sample.class_name, sample.kind} & seen:
            rows.append(index)
            seen |= {sample.class_name, sample.kind}
    rest = [i for i, sample in enumerate(data.test) if sample.defective and i not in rows]
    return tuple((rows + rest)[:_PICTURED])


def run_study(
    study: Study, data: StudyData, output: Path, device: torch.device, impl: str | None = None, quiet: bool = False
) -> list[dict[str, Any]]:
    """Run what is not done yet, and write every measurement to OUTPUT/results.csv.

    Several processes may be given the same study and folder, and share its runs.

    Args:
        output: gets `runs/`, a file for each run: what is there is not run again.

    Returns:
        Rows with `COLUMNS`, and "score_maps" where there are pictures, see `run_trial`.

    Raises:
        ResumeError: `output` holds runs of another study; says what differs.
    """
    parts: dict[str | None, StudyData] = {None: data}
    for trial in study.trials:
        if trial.class_name is not None and trial.class_name not in parts:
            parts[trial.class_name] = data.of_class(trial.class_name)
    runs = output / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    images = {trial.name: _images_to_train(trial, parts[trial.class_name]) for trial in study.trials}
    found: dict[str, list[dict[str, Any]]] = {}
    with progress(study.name, sum(images.values()), quiet=quiet) as bar:
        # First what no other process is at, then what others were at: it is read, or gone on with where one has died.
        for wait in (False, True):
            for trial in study.trials:
                if trial.name in found:
                    continue
                bar.set_postfix_str(f"run {len(found) + 1}/{len(study.trials)}: {trial.name}", refresh=wait)
                part = parts[trial.class_name]
                done = sum(images[name] for name in found)
                epochs, _ = epochs_and_steps(len(part.train), trial.system.recipe(trial.recipe))

                def move(epoch: int, start: int = done, share: float = images[trial.name] / epochs) -> None:
                    bar.update(start + round(epoch * share) - bar.n if not quiet else 0)

                with locked(runs / f".{trial.name}.lock", wait) as held:
                    if held:
                        found[trial.name] = run_trial(trial, part, runs, device, impl, move)
                        move(epochs)
    rows: list[dict[str, Any]] = []
    for trial in study.trials:
        own = {"system": trial.system.name, "setting": trial.setting, "seed": trial.seed}
        # The mean over the one class of a separate run says nothing: that over all of them comes below.
        measured = found[trial.name]
        rows += [own | row for row in measured if trial.class_name is None or row["class"] != EVERY_CLASS]
    rows += _means_of_separate(rows, data.classes)
    write_rows(rows, COLUMNS, output / "results.csv")
    return rows


def _images_to_train(trial: Trial, data: StudyData) -> int:
    recipe = trial.system.recipe(trial.recipe)
    epochs, steps = epochs_and_steps(len(data.train), recipe)
    return epochs * steps * recipe.batch_size


def _means_of_separate(rows: Sequence[dict[str, Any]], classes: Sequence[str]) -> list[dict[str, Any]]:
    """For each system, seed, epoch and score, the mean over the models of one class each; seconds are added up."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        if row["setting"] == "separate":
            groups.setdefault((row["system"], row["seed"], row["epoch"], row["score"]), []).append(row)
    means = []
    for (system, seed, epoch, score), members in groups.items():
        if len(members) == len(classes):
            own = {"system": system, "setting": "separate", "seed": seed, "class": EVERY_CLASS, "epoch": epoch}
            own |= {"score": score, "seconds": sum(row["seconds"] for row in members)}
            averaged = ("loss", "image_auroc_max", "image_auroc_mean", "pixel_auroc")
            means.append(own | {name: mean_of_defined([row[name] for row in members]) for name in averaged})
    return means


def write_rows(rows: Iterable[dict[str, Any]], columns: Sequence[str], path: Path) -> None:
    """A CSV file of these columns, whole or not at all; floats with six digits, an empty field for None."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in rows:
            values = (table_cell(row[name]) for name in columns)
            writer.writerow([f"{v:.6g}" if isinstance(v, float) else "" if v is None else v for v in values])
