"""What the names of folders say, in any case: splits, kinds of image, masks."""

import re
from collections.abc import Iterable
from pathlib import Path

from ..printable import printable

TRAIN = frozenset({"train", "training"})
TEST = frozenset({"test", "testing", "test_public"})
VALIDATION = frozenset({"validation", "valid", "val"})
MASKS = frozenset(
    {"ground_truth", "groundtruth", "gt", "mask", "masks", "label", "labels", "annotation", "annotations"}
)
DEFECTS = frozenset(
    [
        "bad",
        "ng",
        "nok",
        "ko",
        "nio",
        "fail",
        "failed",
        "faulty",
        "broken",
        "damaged",
        "defect",
        "defects",
        "defective",
        "anomaly",
        "anomalies",
        "anomalous",
        "abnormal",
        "scratch",
        "crack",
    ]
)
UNLABELLED = re.compile(r"test_private(_.*)?$")
MASK_STEM = re.compile(r"[_-](mask|gt|label|ground_truth)$", re.IGNORECASE)
NOT_GOOD = TEST | MASKS | DEFECTS


def folders(folder: Path) -> list[Path]:
    """Sub-folders, sorted, hidden ones left out, and those that can't be listed empty."""
    try:
        return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "__MACOSX")))
    except OSError:
        return []


def named(folder: Path, names: frozenset[str]) -> list[Path]:
    return [child for child in folders(folder) if child.name.lower() in names]


def below(folder: Path, *names: str) -> Path | None:
    """The sub-folder of this path, in any case."""
    for name in names:
        found = named(folder, frozenset({name}))
        if not found:
            return None
        folder = found[0]
    return folder


def shown(folder: Path, root: Path) -> str:
    return printable(folder.relative_to(root.parent))


def listed(names: Iterable[str]) -> str:
    shown = [printable(name) for name in names]
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")
