"""Results for people and for programs: text tables, JSON, CSV, JSON lines, heat-map files."""

import contextlib
import csv
import errno
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from PIL import Image

from ..data.samples import GOOD
from ..files import atomic_path
from ..printable import printable, table_cell
from .decisions import Decisions, Outcome
from .evaluation import COLUMNS, Evaluation

_WORST = 5
SCORE_FIELDS = ("image", "class", "score", "label", "threshold", "heat_map", "regions")


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
    body = table(
        ["class", *(column.replace("_", " ") for column in columns)],
        [[printable(name), *(_figure(values[column]) for column in columns)] for name, values in _rows(evaluation)],
    )
    notes = [f"{printable(name)}: {note}" for name, reasons in evaluation.notes.items() for note in reasons]
    notes += [
        f"classes recognized: of {images} {what} images {wrong} were taken for another class, {unsure} for none"
        for what, (images, wrong, unsure) in (evaluation.recognized or {}).items()
    ]
    return "\n".join([body, *notes])


def beside_table(evaluations: Mapping[str, Evaluation]) -> str:
    """A row a detector: mean AUROCs over the classes, and what each one's own threshold does."""
    rows = []
    for name, evaluation in evaluations.items():
        found = alarms = "no threshold"
        if (decisions := evaluation.decisions) is not None:
            good = [outcome for outcome in decisions.outcomes if outcome.kind == GOOD]
            bad = [outcome for outcome in decisions.outcomes if outcome.kind != GOOD]
            found = f"{sum(one.above for one in bad)} of {sum(one.images for one in bad)}"
            alarms = f"{sum(one.above for one in good)} of {sum(one.images for one in good)}"
        aurocs = [_figure(evaluation.mean[column]) for column in ("image_auroc", "pixel_auroc")]
        rows.append([name, *aurocs, found, alarms])
    return table(["", "image auroc", "pixel auroc", "found", "false alarms"], rows)


def decisions_table(decisions: Decisions) -> str:
    """What the threshold does: a row a class and kind, other thresholds, and the worst of the wrong verdicts."""
    rows = [
        [
            printable(outcome.class_name),
            printable(outcome.kind),
            str(outcome.images),
            _verdicts(outcome),
            f"{outcome.share:.1%}",
            "{:.1%} to {:.1%}".format(*outcome.interval),
        ]
        for outcome in decisions.outcomes
    ]
    header = ["class", "kind", "images", "verdicts", "called defective", "with 95% confidence"]
    lines = [f"at the threshold {decisions.threshold:.4f}:", "", table(header, rows), ""]
    for other in decisions.alternatives:
        lines.append(
            f"at most {other.rate:.0%} false alarms among these images: threshold {other.threshold:.4f}, "
            f"{other.false_alarms} of {other.good_images} good ones, misses {other.missed} of {other.defective_images}"
        )
    for what, wrong in (("missed", decisions.misses), ("false alarm", decisions.false_alarms)):
        lines += [f"{what}: {printable(sample.path)} ({score:.4f})" for sample, score in wrong[:_WORST]]
        lines += [f"... and {len(wrong) - _WORST} more" for _ in range(len(wrong) > _WORST)]
    return "\n".join(lines)


def _verdicts(outcome: Outcome) -> str:
    if outcome.kind == GOOD:
        return f"{outcome.above} false alarms"
    return f"{outcome.above} found, {outcome.images - outcome.above} missed"


def write_evaluation(evaluation: Evaluation, directory: str | os.PathLike) -> list[Path]:
    """metrics.json, metrics.csv (a row a class, then the mean), decisions.csv (a row a class and kind, where there is a
    threshold) and scores.csv (a row an image).
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    content = {
        "by_class": evaluation.by_class,
        "mean": evaluation.mean,
        "not_defined": evaluation.notes,
        "images": len(evaluation.samples),
        "unreadable": evaluation.unreadable,
        "recognized": evaluation.recognized,
        "decisions": None,
    }
    written = []
    if (decisions := evaluation.decisions) is not None:
        outcomes = [_outcome_row(outcome) for outcome in decisions.outcomes]
        alternatives = [asdict(other) for other in decisions.alternatives]
        content["decisions"] = {
            "threshold": decisions.threshold,
            "outcomes": outcomes,
            "alternatives": alternatives,
        }
        written = [_write_text(directory / "decisions.csv", _csv(list(outcomes[0]), outcomes))]
    rows = [{"class": name} | values for name, values in _rows(evaluation)]
    scores = [
        {"image": str(sample.path), "class": sample.class_name, "kind": sample.kind, "score": float(f"{score:.9g}")}
        for sample, score in zip(evaluation.samples, evaluation.scores, strict=True)
    ]
    return [
        _write_text(directory / "metrics.json", json.dumps(content, indent=2, allow_nan=False) + "\n"),
        _write_text(directory / "metrics.csv", _csv(["class", *COLUMNS], rows)),
        *written,
        _write_text(directory / "scores.csv", _csv(["image", "class", "kind", "score"], scores)),
    ]


def _outcome_row(outcome: Outcome) -> dict[str, Any]:
    low, high = outcome.interval
    return {
        "class": outcome.class_name,
        "kind": outcome.kind,
        "images": outcome.images,
        "called_defective": outcome.above,
        "share": outcome.share,
        "share_low": low,
        "share_high": high,
    }


class ScoreFiles:
    """scores.csv and scores.jsonl being written, a row an image, fields as in `SCORE_FIELDS`.

    They appear under their names, whole rows only, when the block ends, and also where it ends by an error: what was
    scored by then is not lost.
    """

    def __init__(self, directory: str | os.PathLike) -> None:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.paths = [directory / "scores.csv", directory / "scores.jsonl"]
        self._stack = contextlib.ExitStack()
        self._files: list[IO[bytes]] = []

    def __enter__(self) -> "ScoreFiles":
        for path in self.paths:
            partial = self._stack.enter_context(atomic_path(path))
            self._files.append(self._stack.enter_context(open(partial, "wb", buffering=0)))
        self._write(0, _csv_line(SCORE_FIELDS))
        return self

    def add(self, row: Mapping[str, Any]) -> None:
        """Write one image's row to both; its regions are a list in the JSON lines, and their number in the CSV."""
        counted = dict(row) | {"regions": len(row["regions"])}
        self._write(0, _csv_line([counted[name] for name in SCORE_FIELDS]))
        self._write(1, json.dumps(dict(row), allow_nan=False) + "\n")

    def __exit__(self, *_: object) -> None:
        self._stack.close()  # as without an error

    def _write(self, number: int, text: str) -> None:
        """All of the text, or nothing of it: a full disk leaves no half row."""
        file, content = self._files[number], text.encode()
        end = file.tell()
        try:
            if file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.paths[number]))
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(end)
            raise


def write_png(image: Image.Image, path: str | os.PathLike) -> Path:
    """The image as a PNG file; its folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as partial:
        image.save(partial, format="PNG")
    return path


def _csv(header: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    return _csv_line(header) + "".join(_csv_line([row[name] for name in header]) for row in rows)


def _csv_line(cells: Sequence[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow([table_cell(cell) for cell in cells])
    return text.getvalue()


def _rows(evaluation: Evaluation) -> list[tuple[str, dict[str, float | None]]]:
    """The classes', then their mean's, under a name that no class has."""
    mean = "mean" if "mean" not in evaluation.by_class else "mean over classes"
    return [*evaluation.by_class.items(), (mean, evaluation.mean)]


def _write_text(path: Path, text: str) -> Path:
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


def _figure(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.3f}"
