"""Data sets that are written down in a file: the public UniAD code's JSON lines, ADer's meta.json, VisA's split CSV.

    JSON lines   {"filename", "label" (0 good, 1 defective), "label_name", "maskname", "clsname"} a line; one file, or a
                 folder with train.json and test.json (.jsonl). A single file called test... is for testing alone; any
                 other that lists defects has a fifth of its good images kept for testing.
    meta.json    {"train": {CLASS: [{"img_path", "mask_path", "cls_name", "specie_name", "anomaly"}]}, "test": ...}, and
                 "validation", which is learnt from too
    CSV          object,split,label,image,mask; paths from the data set's root

UTF-8 or UTF-16, with or without a byte-order mark. Paths may not leave the image root, not even through links.
"""

import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..printable import printable
from .image_files import EXTENSIONS
from .samples import GOOD, DataError, Dataset, Sample, hold_out, is_good

_COLUMNS = frozenset({"object", "split", "label", "image", "mask"})
_SHARE_OF_TEST = 0.2
_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
_SHOWN = 120


def metadata_of(folder: Path) -> Path | None:
    """The file in this folder that lists its images, if there is one; train.json stands for test.json too.

    Raises:
        DataError: there is a list of tests and none to learn from.
    """
    visa = folder / "split_csv" / "1cls.csv"
    for path in (_split_file(folder, "train"), folder / "meta.json", visa):
        if path is not None and path.is_file():
            return path
    if test := _split_file(folder, "test"):
        raise DataError(f"{folder} has {test.name} and no train.json: to test a bundle on it, give that file")
    return None


def load_metadata(path: Path, image_root: str | os.PathLike | None, seed: int) -> Dataset:
    """The data set that a metadata file lists.

    Raises:
        DataError: it can't be read or followed; says in which line.
    """
    if path.suffix.lower() in EXTENSIONS:
        raise DataError(f"{path} is an image: give the folder that holds it, or a metadata file")
    text = _text(path)
    root = _Root(image_root if image_root is not None else path.parent)
    if path.suffix.lower() in (".csv", ".tsv"):
        # VisA keeps its split files in ROOT/split_csv.
        in_visa = path.parent.name == "split_csv" and (image_root is None or Path(image_root) == path.parent.parent)
        return _load_csv(path, text, _Root(path.parent.parent) if in_visa else root)
    whole = _whole_json(path, text)
    if isinstance(whole, dict) and isinstance(whole.get("train"), dict):
        return _load_ader(path, whole, root)
    samples = _without_repeats(_read_lines(path, text, root))
    stem = path.stem.lower()
    test_file = _split_file(path.parent, "test") if stem == "train" else None
    if stem == "train":
        test = _without_repeats(_read_lines(test_file, _text(test_file), root)) if test_file else []
        return Dataset(path.parent.name if test_file else path.stem, [s for s in samples if not s.defective], test)
    good = [sample for sample in samples if not sample.defective]
    if stem.startswith("test"):
        return Dataset(path.stem, [], samples, [f"{path.name} is a list of tests: nothing in it is learnt from"])
    if len(good) == len(samples):
        return Dataset(path.stem, good, [])
    train, held = hold_out(good, _SHARE_OF_TEST, seed)
    note = f"{path.name}: one list without a split, so {len(held)} of {len(good)} good images are kept for testing"
    return Dataset(path.stem, train, [*held, *(s for s in samples if s.defective)], [note])


class _Root:
    """The folder that paths in a file start from, and may not leave."""

    def __init__(self, folder: str | os.PathLike) -> None:
        self._folder = Path(os.path.abspath(folder))
        self._real = os.path.realpath(folder)

    def path(self, relative: object, where: str, field: str) -> Path:
        """The file of that name below the root; names with backslashes, as Windows writes them, are followed too."""
        if not isinstance(relative, str) or not relative.strip() or "\0" in relative:
            raise DataError(f"{where}: {field} must be the name of a file, got {_short(relative)}")
        path = Path(os.path.normpath(self._folder / relative))
        if "\\" in relative and not path.exists():
            path = Path(os.path.normpath(self._folder / relative.replace("\\", "/")))
        inside = path.is_relative_to(self._folder) and path != self._folder
        try:
            real = os.path.realpath(path)
        except OSError as error:
            raise DataError(f"{where}: {field} {_short(relative)}: {error.strerror}") from None
        if not inside or os.path.commonpath([real, self._real]) != self._real:
            raise DataError(f"{where}: {_short(relative)} leaves the image root {printable(self._folder)}")
        return path


def _text(path: Path) -> str:
    content = path.read_bytes()
    encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}, line {line}: neither UTF-8 nor UTF-16 text (byte 0x{content[error.start]:02x})"
        ) from None


def _whole_json(path: Path, text: str) -> Any:
    """What the file is as one JSON value; None where it is a value a line."""
    if "\n" in text.strip() or path.name == "meta.json":
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return None
    return None


def _read_lines(path: Path, text: str, root: _Root) -> Iterator[Sample]:
    for number, line in enumerate(text.split("\n"), start=1):  # and at no other character that ends lines elsewhere
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            entry: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = "too deeply nested" if isinstance(error, RecursionError) else str(error)
            raise DataError(f"{where}: not JSON ({reason})") from None
        label = entry.get("label") if isinstance(entry, dict) else None
        if (
            not isinstance(entry, dict)
            or "filename" not in entry
            or type(label) not in (int, bool)
            or label not in (0, 1)
        ):
            raise DataError(f'{where}: needs "filename" and "label" (0 good, 1 defective), got {_short(line)}')
        yield _sample(root, where, entry, ("filename", "maskname", "clsname", "label_name"), label == 1)


def _sample(
    root: _Root, where: str, entry: dict[str, Any], names: tuple[str, str, str, str], defective: bool
) -> Sample:
    """From an entry whose image, mask, class and kind have these names."""
    image, mask, class_name, kind = names
    path = root.path(entry[image], where, image)
    masked = entry.get(mask) if defective else None
    said = entry.get(class_name)
    if said is None or said == "":
        parts = path.parts  # as the public code does: CLASS/SPLIT/KIND/IMAGE
        said = parts[-4] if len(Path(entry[image]).parts) >= 4 else "unnamed"
    return Sample(
        path,
        _word(said, where, class_name),
        _defect_name(entry.get(kind), where, kind) if defective else GOOD,
        root.path(masked, where, mask) if masked else None,
    )


def _load_ader(path: Path, content: dict[str, Any], root: _Root) -> Dataset:
    parts: dict[str, list[Sample]] = {}
    for split in ("train", "validation", "test"):
        parts[split] = []
        classes = content.get(split, {})
        if not isinstance(classes, dict):
            raise DataError(f"{path}: {split} must map classes to images, got {_short(classes)}")
        for class_name, entries in classes.items():
            if not isinstance(entries, list):
                raise DataError(f"{path}: {split} of {_short(class_name)} must be a list, got {_short(entries)}")
            for number, entry in enumerate(entries, start=1):
                where = f"{path}, {split} of {printable(class_name)}, entry {number}"
                if not isinstance(entry, dict) or "img_path" not in entry or entry.get("anomaly") not in (0, 1):
                    raise DataError(f'{where}: needs "img_path" and "anomaly" (0 or 1), got {_short(entry)}')
                own = {"cls_name": class_name} | entry
                names = ("img_path", "mask_path", "cls_name", "specie_name")
                parts[split].append(_sample(root, where, own, names, entry["anomaly"] == 1))
    good = [sample for sample in (*parts["train"], *parts["validation"]) if not sample.defective]
    spoilt = len(parts["train"]) + len(parts["validation"]) - len(good)
    notes = [f"{spoilt} defective images listed to learn from"] if spoilt else []
    return Dataset(path.parent.name, good, parts["test"], notes)


def _load_csv(path: Path, text: str, root: _Root) -> Dataset:
    train: list[Sample] = []
    test: list[Sample] = []
    spoilt = 0
    reader = csv.reader(
        io.StringIO(text, newline=""), strict=True, delimiter="\t" if path.suffix.lower() == ".tsv" else ","
    )
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        if missing := sorted(_COLUMNS - set(header)):
            raise DataError(f"{path}: not a VisA split file, it has no column {', '.join(missing)}")
        for cells in reader:
            where = f"{path}, line {reader.line_num}"
            if not cells:
                continue
            if len(cells) != len(header):
                raise DataError(f"{where}: {len(cells)} cells under {len(header)} names: {_short(','.join(cells))}")
            row: dict[str, Any] = dict(zip(header, cells, strict=True))
            if row["split"] not in ("train", "test"):
                raise DataError(f"{where}: split must be train or test, got {_short(row['split'])}")
            defective = not is_good(row["label"])
            sample = _sample(root, where, row, ("image", "mask", "object", "label"), defective)
            if row["split"] == "test":
                test.append(sample)
            elif not defective:
                train.append(sample)
            else:
                spoilt += 1
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not CSV ({error})") from None
    notes = [f"{path.name}: {spoilt} defective images listed to learn from"] if spoilt else []
    return Dataset(path.stem, _without_repeats(train), _without_repeats(test), notes)


def _split_file(folder: Path, split: str) -> Path | None:
    candidates = (folder / f"{split}{suffix}" for suffix in (".jsonl", ".json"))
    return next((path for path in candidates if path.is_file()), None)


def _without_repeats(samples: Iterator[Sample] | list[Sample]) -> list[Sample]:
    """Some public lists name each image twice."""
    return list(dict.fromkeys(samples))


def _defect_name(name: object, where: str, field: str) -> str:
    if name is None or name == "" or (isinstance(name, str) and is_good(name)):
        return "defective"
    return _word(name, where, field)


def _word(value: object, where: str, field: str) -> str:
    if not isinstance(value, (str, int)) or not str(value).strip():
        raise DataError(f"{where}: {field} must be a name, got {_short(value)}")
    return str(value)


def _short(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return repr(printable(text[:_SHOWN])) + ("..." if len(text) > _SHOWN else "")
