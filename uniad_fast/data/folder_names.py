"""What the names of folders say, in any case: splits, kinds of image, masks."""

import re
from collections.abc import Iterable
from pathlib import Path

from ..printable import printable
from .samples import GOOD_WORDS

TRAIN = frozenset({"train", "training"})
TEST = frozenset({"test", "testing", "test_public"})
VALIDATION = frozenset({"validation", "valid", "val"})
MASKS = frozenset(
    {"ground_truth", "groundtruth", "gt", "mask", "masks", "label", "labels", "annotation", "annotations"}
)
_NO = frozenset({"no", "non", "not", "without", "free", "zero"})
# Words that say what a picture shows, and beginnings of such words; a product is no "crack", but may be a "cracker".
_DEFECTIVE = frozenset(
    [
        "bad", "ng", "nok", "ko", "nio", "broken", "bent", "crack", "cracks", "cracked", "dent", "dents", "dented",
        "scrap", "scraps", "scrapped", "negative", "negatives", "dirty", "dirt", "burr", "burrs",
        "ausschuss", "fehler", "schlecht", "rebut", "rebuts",
    ]
)  # fmt: skip
_DEFECTIVE_STEMS = (
    "defect", "anomal", "abnormal", "scratch", "damag", "fault", "fail", "reject", "contamin", "outlier", "flaw",
    "blemish", "corros", "fehlerhaft", "defekt",
)  # fmt: skip
_DEFECTIVE_PARTS = ("不良", "欠陥", "異常", "不合格", "缺陷", "异常", "불량", "결함", "défaut", "défect")
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
UNLABELLED = re.compile(r"test_private(_.*)?$")
MASK_STEM = re.compile(r"[_-](mask|gt|label|ground_truth)$", re.IGNORECASE)


def is_defective(name: str) -> bool:
    """Whether a name speaks of defects in one of its words: rejects, NOK_2024, "not good"; not "defect-free"."""
    if any(part in name.lower() for part in _DEFECTIVE_PARTS):
        return True
    words = _words(name)
    negated = bool(words & _NO)
    if negated and words & GOOD_WORDS:
        return True
    return not negated and any(map(_is_defective_word, words))


def is_defective_alone(name: str) -> bool:
    """Whether a name says nothing but that: "rejects", NG_2; a "defect detection" may hold anything."""
    words = _words(name)
    return is_defective(name) and (not words or words <= GOOD_WORDS | _NO or all(map(_is_defective_word, words)))


def _words(name: str) -> set[str]:
    return {word.lower() for word in _WORD.findall(name.replace(".", ""))}


def _is_defective_word(word: str) -> bool:
    return word in _DEFECTIVE or (word.startswith(_DEFECTIVE_STEMS) and not word.endswith("less"))


def is_of_masks(name: str) -> bool:
    """Whether a name speaks of masks: "masks", "gt_old"."""
    return name.lower() in MASKS or bool(MASKS & _words(name))


def is_doubtful(name: str) -> bool:
    """Whether a folder of this name may hold something else than good images to learn from."""
    return name.lower() in TEST or is_of_masks(name) or is_defective(name)


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
