"""Results for people and for programs: text tables, JSON, CSV, JSON lines, heat-map files."""

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .evaluation import COLUMNS, Evaluation
from .files import atomic_path

SCORE_FIELDS = ("image", "score", "label", "threshold", "heat_map")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns in plain text, the first to the left, the others to the right."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([text[0], "  ".join("-" * w for w in widths), *text[1:]])


def evaluation_table(evaluation: Evaluation) -> str:
    """A row a class and their mean; columns that are defined nowhere are left out, with the reasons below."""
    columns = [column for column in COLUMNS if evaluation.mean[column] is not None]
    rows = [*evaluation.by_class.items(), ("mean", evaluation.mean)]
    body = table(
        ["class", *(column.replace("_", " ") for column in columns)],
        [[name, *(_figure(values[column]) for column in columns)] for name, values in rows],
    )
    notes = [f"{name}: {note}" for name, reasons in evaluation.notes.items() for note in reasons]
    return "\n".join([body, *notes])


def write_evaluation(evaluation: Evaluation, directory: str | os.PathLike) -> list[Path]:
    """metrics.json, metrics.csv (a row a class, then the mean) and scores.csv (a row an image)."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    content = {
        "by_class": evaluation.by_class,
        "mean": evaluation.mean,
        "not_defined": evaluation.notes,
        "images": len(evaluation.samples),
        "unreadable": evaluation.unreadable,
    }
    rows = [{"class": name} | values for name, values in [*evaluation.by_class.items(), ("mean", evaluation.mean)]]
    scores = [
        {"image": sample.path, "class": sample.class_name, "kind": sample.kind, "score": f"{score:.9g}"}
        for sample, score in zip(evaluation.samples, evaluation.scores, strict=True)
    ]
    return [
        _write_text(directory / "metrics.json", json.dumps(content, indent=2) + "\n"),
        _write_text(directory / "metrics.csv", _csv(["class", *COLUMNS], rows)),
        _write_text(directory / "scores.csv", _csv(["image", "class", "kind", "score"], scores)),
    ]


def write_scores(rows: Sequence[Mapping[str, Any]], directory: str | os.PathLike) -> list[Path]:
    """scores.csv and scores.jsonl, a row an image, fields as in `SCORE_FIELDS`."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    return [
        _write_text(directory / "scores.csv", _csv(SCORE_FIELDS, rows)),
        _write_text(directory / "scores.jsonl", "".join(json.dumps(row) + "\n" for row in rows)),
    ]


def write_png(image: Image.Image, path: str | os.PathLike) -> Path:
    """The image as a PNG file; its folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as partial:
        image.save(partial, format="PNG")
    return path


def _csv(header: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, header, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _write_text(path: Path, text: str) -> Path:
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


def _figure(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.3f}"
