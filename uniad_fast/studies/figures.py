"""A study's figures, after the paper's 2a, 2b and 4."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..data.images import read_image, to_tensor
from ..detect.pipeline import to_maps
from ..files import atomic_path
from .data import StudyData
from .tables import DETECTION, LOCALISATION, Row, has_masks, means_over_classes
from .trial import EVERY_CLASS

_COLORS = ("#4477AA", "#66CCEE", "#228833", "#CCBB44", "#AA3377", "#EE6677", "#000000")
_DPI = 100
_FEW_COLORS = 160


def draw_curves(rows: Sequence[Row], systems: Sequence[str], settings: Sequence[str], path: Path, title: str) -> Path:
    """Loss and AUROC against epochs, a line for each system: mean over seeds, and their range as a band.

    Args:
        settings: of "unified" and "separate", a column each.
    """
    from matplotlib.figure import Figure

    panels = {"training loss": "loss", "image AUROC": DETECTION}
    if has_masks(rows):
        panels["pixel AUROC"] = LOCALISATION
    figure = Figure(figsize=(1.2 + 4.2 * len(settings), 0.8 + 2.1 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), len(settings), sharex="col", sharey="row", squeeze=False)
    for col, setting in enumerate(settings):
        for system, color in zip(systems, _COLORS, strict=False):
            by_seed = means_over_classes(rows, system, setting, "l2")
            if not by_seed:
                continue
            epochs = [row["epoch"] for row in next(iter(by_seed.values()))]
            for panel, name in enumerate(panels.values()):
                values = np.array([[row[name] for row in seed] for seed in by_seed.values()])
                axes[panel][col].plot(epochs, values.mean(axis=0), color=color, label=system, linewidth=1.6)
                axes[panel][col].fill_between(
                    epochs, values.min(axis=0), values.max(axis=0), color=color, alpha=0.2, linewidth=0
                )
        axes[0][col].set_title(setting)
        axes[-1][col].set_xlabel("epoch")
    for panel, label in enumerate(panels):
        axes[panel][0].set_ylabel(label)
        for ax in axes[panel]:
            ax.grid(alpha=0.3)
    axes[0][0].set_yscale("log")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(title)
    return _save(figure, path)


def draw_maps(rows: Sequence[Row], systems: Sequence[str], data: StudyData, path: Path, title: str) -> Path | None:
    """Anomaly maps of a few defects, where the system's AUROC was best and at the end; None without pictured runs.

    The maps of a system and an epoch share one scale, from their median to their largest value.
    """
    from matplotlib.figure import Figure

    columns: list[tuple[str, dict[int, torch.Tensor]]] = []
    for system in systems:
        found = [
            row
            for row in rows
            if row["system"] == system
            and row["setting"] == "unified"
            and row["class"] == EVERY_CLASS
            and row["score_maps"]
        ]
        if found:
            best, last = max(found, key=lambda row: row[DETECTION]), max(found, key=lambda row: row["epoch"])
            columns += [(f"{system}\nepoch {row['epoch']}", _score_maps(row)) for row in (best, last)]
    if not columns:
        return None
    pictured = sorted(columns[0][1])
    fixed = 2 if data.masks is not None else 1
    width = fixed + len(columns)
    figure = Figure(figsize=(1.05 * width, 0.7 + 1.05 * len(pictured)), layout="constrained")
    axes = figure.subplots(len(pictured), width, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for line, index in enumerate(pictured):
        sample = data.test[index]
        image = to_tensor(read_image(sample.path), data.image_size).permute(1, 2, 0).numpy()
        axes[line][0].imshow(image)
        if data.masks is not None:
            axes[line][1].imshow(data.masks[index], cmap="gray")
    for col, (name, score_maps) in enumerate(columns, start=fixed):
        low = float(np.median(torch.stack(list(score_maps.values())).numpy()))
        high = max(float(one.max()) for one in score_maps.values())
        for line, index in enumerate(pictured):
            picture = to_maps(score_maps[index][None], data.image_size)[0].numpy()
            axes[line][col].imshow(picture, cmap="inferno", vmin=low, vmax=high)
        axes[0][col].set_title(name, fontsize=6)
    figure.suptitle(title, fontsize=9)
    return _save(figure, path)


def _score_maps(row: dict[str, Any]) -> dict[int, torch.Tensor]:
    return {int(index): torch.tensor(score_map) for index, score_map in row["score_maps"].items()}


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as partial:
        figure.savefig(partial, dpi=_DPI, format="png")
        few = Image.open(partial).convert("RGB").quantize(_FEW_COLORS, dither=Image.Dither.NONE)
        few.save(partial, format="png", optimize=True)  # a third of the bytes
    return path
