"""What the names of folders say, in any case: splits, kinds of image, masks."""

import re
import unicodedata
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
_NO = frozenset({"no", "non", "not", "zero"})
# Words that say what a picture shows, and beginnings of such words; a product is no "crack", but may be a "cracker".
_DEFECTIVE = frozenset(
    [
        "bad", "ng", "nok", "ko", "nio", "notok", "nogood", "notgood", "def", "broken", "crack", "cracks", "cracked",
        "fail", "fails", "failed", "failing", "failure", "failures", "scraps", "scrapped", "ausschuss", "schlecht",
        "rebut", "rebuts",
    ]
)  # fmt: skip
_STEMS = (
    "defect", "anomal", "abnormal", "scratch", "damag", "fault", "reject", "contamin", "outlier", "flaw", "blemish",
    "corros", "fehler", "defekt", "nonconform", "blowhole", "défaut", "défect",
)  # fmt: skip
_INNOCENT_ENDS = ("less", "free", "frei")
# Of a name that says nothing else: a pipe may be bent, and scrap metal a product.
_ALONE = frozenset({"bent", "dent", "dents", "dented", "scrap", "dirt", "dirty", "burr", "burrs", "uneven"})
_PARTS = ("不良", "欠陥", "異常", "不合格", "缺陷", "异常", "불량", "결함")
_UNCLEAR = frozenset({"positive", "positives", "negative", "negatives"})
"""A crack is the positive of some data sets, and the good part of others."""
_OF_FILES = frozenset(
    ["bad", "ng", "nok", "nio", "notok", "defect", "defects", "defective", "reject", "rejects", "rejected", "faulty"]
)
"""Hashes are names too, and so are products': what an image is called has to be plain."""
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[^\W\d_A-Z]+|\d+")
_INITIALS = re.compile(r"(?<![^\W\d_])((?:[A-Za-z]\.)+[A-Za-z])\.?(?![^\W\d_])")  # n.i.O.
_FILE_WORD = re.compile(r"[^\W_]+")
UNLABELLED = re.compile(r"test_private(_.*)?$")
MASK_STEM = re.compile(r"[_-](mask|gt|label|ground_truth)$", re.IGNORECASE)


def is_defective(name: str) -> bool:
    """Whether a name speaks of defects in one of its words: rejects, NOK_2024, n.i.O., "not good"; not "faultless"."""
    return any(_speaks_of_defects(words) for words in _both_ways(_plain(name)))


def is_defective_alone(name: str) -> bool:
    """Whether a name says nothing but that: "rejects", NG_2; a "defect detection" may hold anything."""
    words = [word for word in _both_ways(_plain(name))[1] if not word.isdecimal()]
    others = [w for w in words if not _is_defective_word(w) and w not in _NO | GOOD_WORDS | _ALONE]
    return is_defective(name) and not others


def is_called_defective(stem: str) -> bool:
    """Whether an image's name says plainly that it is defective: NOK_12, part_3_bad; not the "bad" in a hash."""
    words = [word.lower() for word in _FILE_WORD.findall(_plain(stem))]
    return any(word in _OF_FILES or re.fullmatch(r"(ng|nok|nio)\d+", word) for word in words)


def is_of_masks(name: str) -> bool:
    """Whether a name speaks of masks: "masks", "masks_old"."""
    return name.lower() in MASKS or bool({"mask", "masks", "groundtruth"} & {*_both_ways(name)[0]})


def is_doubtful(name: str) -> bool:
    """Whether a folder of this name may hold something else than good images to learn from."""
    unclear = bool(_UNCLEAR & {*_both_ways(name)[0]})
    return name.lower() in TEST or is_of_masks(name) or is_defective(name) or unclear


def _plain(name: str) -> str:
    """Accents as one character, as macOS does not write them, and initials without points."""
    return _INITIALS.sub(lambda found: found[1].replace(".", ""), unicodedata.normalize("NFC", name))


def _both_ways(name: str) -> tuple[list[str], list[str]]:
    """The words of a name, and its numbers: of BadParts bad and parts, and of NiO nio."""
    return [word.lower() for word in _WORD.findall(name)], _WORD.findall(name.lower())


def _speaks_of_defects(words: list[str]) -> bool:
    if words and all(word in _ALONE or word.isdecimal() for word in words) and not all(map(str.isdecimal, words)):
        return True
    for before, word, after in zip(["", *words], words, [*words[1:], ""], strict=False):
        if before in _NO:
            if word in GOOD_WORDS or word.startswith("conform"):
                return True
        elif before != "without" and after not in ("free", "frei") and _is_defective_word(word):
            return True
    return False


def _is_defective_word(word: str) -> bool:
    if any(part in word and not re.search(f"[无無]{part}|{part}なし", word) for part in _PARTS):
        return True
    return word in _DEFECTIVE or (word.startswith(_STEMS) and not word.endswith(_INNOCENT_ENDS))


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
