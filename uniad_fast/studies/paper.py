"""The study "paper": the paper's recipe and the fast one, class by class, beside the published figures."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from statistics import mean

from ..training.recipes import FAST, PAPER, Recipe
from .cifar10 import BATCH_SIZE
from .data import ManyVersusMany, StudyData
from .published import Published, published
from .systems import System
from .tables import DETECTION, DETECTION_BY_MEAN, LOCALISATION, Row, Spread, cell, has_masks, markdown
from .trial import EVERY_CLASS, Trial

_SYSTEMS = (PAPER.name, FAST.name)
_NOTABLE = 1.0  # percentage points from a published figure at which a difference is marked


def paper_trials(data: StudyData, seeds: int, paper: Recipe, separate: bool) -> tuple[Trial, ...]:
    """Both recipes, one model for all classes, and, if asked for, one model for each class too.

    Of CIFAR-10 one model for each normal set, which is the paper's unified setting there.

    Args:
        seeds: how many, from 0.
        paper: the paper's recipe, which may have been shortened.
    """
    settings: list[str | None] = [None]
    if isinstance(data, ManyVersusMany):
        settings, paper = list(data.classes), replace(paper, batch_size=BATCH_SIZE)
    elif separate and len(data.classes) > 1:
        settings += data.classes
    # Setting by setting: the unified table, the one people look for, is there before the many models of one class.
    return tuple(
        Trial(System(recipe.name), recipe, seed, setting, sys.maxsize, (recipe.residual_score,))
        for setting in settings
        for seed in range(seeds)
        for recipe in (paper, FAST)
    )


def paper_tables(rows: Sequence[Row], data: StudyData, image_metric: str | None = None) -> str:
    """Markdown: a table for each setting and AUROC, in percent, with the source of what is published.

    A difference of a point or more from the published figure is bold.

    Args:
        rows: as `run_study` returns them.
        image_metric: how a map becomes an image's score; None is the mean for CIFAR-10 and the maximum elsewhere.
    """
    many = isinstance(data, ManyVersusMany)
    metrics = {"Image": image_metric or (DETECTION_BY_MEAN if many else DETECTION)}
    metrics |= {"Pixel": LOCALISATION} if has_masks(rows) else {}
    known = published(data.classes)
    parts = []
    for setting in ("unified", "separate"):
        found = [row for row in rows if row["setting"] == setting]
        title = "one model for each normal set" if many else f"{setting}"
        for name, metric in metrics.items():
            if found:
                told = "separate" if setting == "separate" and not many else "unified"
                table = _table(found, data.classes, metric, known, f"{told} {name.lower()}")
                parts.append(f"## {name} AUROC in percent, {title}\n\n{table}\n")
    parts.append(
        f"Published: {known.source}. Bold: {_NOTABLE:g} point or more from it. "
        if known
        else "No figures are published for these classes. "
    )
    parts[-1] += "Figures are of the last epoch, ± is the deviation over seeds, and the class of a test image is told."
    return "\n".join(parts)


def _table(rows: Sequence[Row], classes: Sequence[str], metric: str, known: Published | None, column: str) -> str:
    header = ["class", "published"] + [part for name in _SYSTEMS for part in (f"{name} recipe", "difference")]
    figures = {name: known.figure(name, column) if known else None for name in classes}
    body = []
    for name in (*classes, EVERY_CLASS):
        told = figures.get(name)
        if name == EVERY_CLASS and None not in figures.values():
            told = mean(value for value in figures.values() if value is not None)
        cells = [cell(name), "" if told is None else f"{told:.1f}"]
        for system in _SYSTEMS:
            own = Spread.of(_last(rows, system, name, metric))
            cells += [own.shown(1), "" if told is None else _difference(own.mean - told)]
        body.append(cells)
    return markdown(header, body)


def _last(rows: Sequence[Row], system: str, name: str, metric: str) -> list[float]:
    """In percent, of each seed the last."""
    last: dict[int, Row] = {}
    for row in rows:
        if (row["system"], row["class"]) == (system, name) and row["epoch"] >= last.get(row["seed"], row)["epoch"]:
            last[row["seed"]] = row
    return [100 * row[metric] for row in last.values()]


def _difference(value: float) -> str:
    text = f"{value:+.1f}"
    return f"**{text}**" if abs(value) >= _NOTABLE else text
