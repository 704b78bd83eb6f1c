"""A study's measurements as tables: mean and spread over seeds."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from ..detect.residual_score import RESIDUAL_SCORES
from ..printable import printable
from .trial import EVERY_CLASS

Row = dict[str, Any]
DETECTION, DETECTION_BY_MEAN, LOCALISATION = "image_auroc_max", "image_auroc_mean", "pixel_auroc"


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over seeds; the deviation of one seed is None."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(mean(values), stdev(values) if len(values) > 1 else None)

    def __str__(self) -> str:
        return self.shown(3)

    def shown(self, digits: int) -> str:
        """Mean and deviation with so many digits after the point."""
        return f"{self.mean:.{digits}f}" + ("" if self.deviation is None else f" ± {self.deviation:.{digits}f}")


def means_over_classes(rows: Sequence[Row], system: str, setting: str, score: str) -> dict[int, list[Row]]:
    """{seed: rows by epoch} of the mean over classes."""
    by_seed: dict[int, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["epoch"]):
        if (row["system"], row["setting"], row["score"], row["class"]) == (system, setting, score, EVERY_CLASS):
            by_seed.setdefault(row["seed"], []).append(row)
    return by_seed


def has_masks(rows: Sequence[Row]) -> bool:
    return any(row[LOCALISATION] is not None for row in rows)


def shortcut_table(rows: Sequence[Row], systems: Sequence[str]) -> str:
    """Markdown: of each system and setting the loss at the end, and of each AUROC the best, the last and the fall."""
    metrics = {"image": DETECTION} | ({"pixel": LOCALISATION} if has_masks(rows) else {})
    header = ["system", "setting", "last loss"]
    header += [f"{name} AUROC, {which}" for name in metrics for which in ("best", "last", "fall")]
    body = []
    for setting in ("unified", "separate"):
        for system in systems:
            by_seed = means_over_classes(rows, system, setting, "l2")
            if not by_seed:
                continue
            cells = [system, setting, f"{mean(seed[-1]['loss'] for seed in by_seed.values()):.4f}"]
            for metric in metrics.values():
                best = [max(row[metric] for row in seed) for seed in by_seed.values()]
                last = [seed[-1][metric] for seed in by_seed.values()]
                fall = [b - e for b, e in zip(best, last, strict=True)]
                cells += [str(Spread.of(values)) for values in (best, last, fall)]
            body.append(cells)
    return markdown(header, body)


def final_table(rows: Sequence[Row], systems: Sequence[str], image_metric: str = DETECTION) -> str:
    """Markdown: loss and AUROC of each system at the end, the latter by each score and how far from the first's."""
    metrics = {"image": image_metric} | ({"pixel": LOCALISATION} if has_masks(rows) else {})
    scores = [score for score in RESIDUAL_SCORES if any(row["score"] == score for row in rows)]
    columns = [(f"{name} AUROC, {score}", score, metric) for score in scores for name, metric in metrics.items()]
    header = ["system", "loss", *(part for name, *_ in columns for part in (name, "difference")), "seconds"]
    body = []
    for system in systems:
        cells = [system, f"{mean(_last(rows, system, scores[0], 'loss').values()):.3f}"]
        for _, score, metric in columns:
            here, first = (_last(rows, name, score, metric) for name in (system, systems[0]))
            cells.append(str(Spread.of(list(here.values()))))
            # Seed against seed: what a seed does to every system alike is no difference.
            differences = [here[seed] - first[seed] for seed in here if seed in first]
            cells.append("" if system == systems[0] else f"{mean(differences):+.3f}")
        cells.append(f"{mean(_last(rows, system, scores[0], 'seconds').values()):.0f}")
        body.append(cells)
    return markdown(header, body)


def time_table(rows: Sequence[Row], image_metric: str = DETECTION) -> str:
    """Markdown: what the paper's recipe reaches at its best, and when the fast one has reached that.

    Two targets: the paper's best by the paper's own score, "l2", and its best by the score of the line.
    """
    header = ["recipe", "seed", "score", "image AUROC", "epoch", "seconds"]
    header += ["paper's best by l2 after", "times as fast", "by this score after", "times as fast"]
    scores = [score for score in RESIDUAL_SCORES if any(row["score"] == score for row in rows)]
    best: dict[str, Row] = {}
    for score in scores:
        paper = [row for seed in means_over_classes(rows, "paper", "unified", score).values() for row in seed]
        best[score] = max(paper, key=lambda row: row[image_metric])
    body = [_time_cells("paper, its best", row, image_metric) + [""] * 4 for row in best.values()]
    for score in scores:
        for seed in means_over_classes(rows, "fast", "unified", score).values():
            cells = _time_cells("fast, its end", seed[-1], image_metric)
            for target in (best["l2"], best[score]):
                reached = next((row for row in seed if row[image_metric] >= target[image_metric]), None)
                gain = reached and reached["seconds"] and f"{target['seconds'] / reached['seconds']:.0f}"
                cells += [f"{reached['seconds']:.0f} s" if reached else "not reached", gain or ""]
            body.append(cells)
    return markdown(header, body)


def _time_cells(name: str, row: Row, metric: str) -> list[str]:
    return [name, str(row["seed"]), row["score"], f"{row[metric]:.3f}", str(row["epoch"]), f"{row['seconds']:.0f}"]


def _last(rows: Sequence[Row], system: str, score: str, metric: str) -> dict[int, float]:
    """{seed: at the end, the metric's mean over classes}."""
    by_seed = means_over_classes(rows, system, "unified", score)
    return {seed: found[-1][metric] for seed, found in by_seed.items()}


def markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table. Cells are markup: a name from data goes through `cell` first."""
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def cell(name: str) -> str:
    """A name from data as a cell's text: a sign that Markdown or HTML obeys has a backslash before it."""
    return re.sub(r"([\\`*_\[\]<>|~&])", r"\\\1", printable(name))
