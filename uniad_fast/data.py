"""What to learn from and what to test on: folders, metadata files and the demo set, as lists of samples.

Folder of classes (MVTec AD's layout)       Folder of good images
    CLASS/train/good/*.png                      *.png, or any tree of images
    CLASS/test/good/*.png
    CLASS/test/DEFECT/*.png
    CLASS/ground_truth/DEFECT/*_mask.png

Metadata (the public UniAD code's): JSON lines with "filename", "label" (0 good, 1 defective), "label_name",
"maskname", "clsname"; one file, or a folder with train.json and test.json (.jsonl).
VisA's split CSV: object,split,label,image,mask, with paths relative to the data set's root.
"elpv": solar cells from the package elpv-dataset.
"""

import csv
import json
import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .images import list_images

GOOD = "good"


class DataError(ValueError):
    """A data set that can't be used; the message says where and why."""


@dataclass(frozen=True)
class Sample:
    """One image: its file, class, kind ("good" or the defect's name), and mask file if there is one."""

    path: Path
    class_name: str
    kind: str = GOOD
    mask: Path | None = None

    @property
    def defective(self) -> bool:
        return self.kind != GOOD


@dataclass(frozen=True)
class Dataset:
    """`train` holds good images only; `test` both, and may be empty."""

    name: str
    train: list[Sample] = field(default_factory=list)
    test: list[Sample] = field(default_factory=list)


def load_dataset(source: str | os.PathLike, image_root: str | os.PathLike | None = None, seed: int = 0) -> Dataset:
    """The data set that `source` names: a folder, a metadata or CSV file, or "elpv" (see the module).

    Args:
        image_root: folder that paths in a metadata file start from, and may not leave; the file's own by default.
        seed: of the split of data sets that bring none ("elpv").

    Raises:
        DataError: nothing there, nothing usable in it, or a malformed line (with its number).
    """
    if str(source) == "elpv":
        return _load_elpv(seed)
    path = Path(source)
    if path.is_file():
        root = Path(image_root) if image_root else path.parent
        if path.suffix == ".csv":
            # VisA keeps its split files in ROOT/split_csv.
            visa_root = root.parent if image_root is None and root.name == "split_csv" else root
            return _load_visa(path, visa_root)
        samples = list(_read_metadata(path, root))
        return _not_empty(Dataset(path.stem, [s for s in samples if not s.defective], samples), path)
    if not path.is_dir():
        raise DataError(f"{path} is neither a folder nor a file, nor the name of a data set (elpv)")
    metadata = {split: _metadata_file(path, split) for split in ("train", "test")}
    if metadata["train"]:
        root = Path(image_root) if image_root else path
        train = [s for s in _read_metadata(metadata["train"], root) if not s.defective]
        test = list(_read_metadata(metadata["test"], root)) if metadata["test"] else []
        return _not_empty(Dataset(path.name, train, test), path)
    return _not_empty(_load_folder(path.resolve()), path)


def hold_out(samples: list[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Split into (kept, held out): `share` of each class, at least one of a class with two or more."""
    kept, held_out = [], []
    for _, members in sorted(_by_class(samples).items()):
        members = list(members)
        random.Random(seed).shuffle(members)
        count = max(1, round(share * len(members))) if share > 0 and len(members) > 1 else 0
        held_out += members[:count]
        kept += members[count:]
    return kept, held_out


def _load_folder(root: Path) -> Dataset:
    classes = sorted(p.parent.parent for p in root.glob("*/train/good") if p.is_dir())
    if not classes and (root / "train" / GOOD).is_dir():
        classes = [root]
    if not classes:
        return Dataset(root.name, [Sample(path, root.name) for path in list_images(root)])
    train, test = [], []
    for folder in classes:
        train += [Sample(path, folder.name) for path in list_images(folder / "train" / GOOD)]
        for kind in sorted(p for p in folder.glob("test/*") if p.is_dir()):
            masks = folder / "ground_truth" / kind.name
            test += [
                Sample(path, folder.name, kind.name, None if kind.name == GOOD else _mask_of(path, masks))
                for path in list_images(kind)
            ]
    return Dataset(root.name, train, test)


def _mask_of(image: Path, masks: Path) -> Path | None:
    candidates = (masks / f"{image.stem}_mask.png", masks / f"{image.stem}.png", masks / image.name)
    return next((path for path in candidates if path.is_file()), None)


def _metadata_file(folder: Path, split: str) -> Path | None:
    candidates = (folder / f"{split}{suffix}" for suffix in (".jsonl", ".json"))
    return next((path for path in candidates if path.is_file()), None)


def _read_metadata(path: Path, root: Path) -> Iterator[Sample]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            entry: Any = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not JSON ({error})") from None
        if not isinstance(entry, dict) or "filename" not in entry or entry.get("label") not in (0, 1):
            raise DataError(f'{where}: needs "filename" and "label" (0 good, 1 defective), got {line[:120]}')
        defective = entry["label"] == 1
        mask = entry.get("maskname") if defective else None
        yield Sample(
            _inside(root, entry["filename"], where),
            str(entry.get("clsname") or "unnamed"),
            _defect_name(entry.get("label_name")) if defective else GOOD,
            _inside(root, mask, where) if mask else None,
        )


def _load_visa(path: Path, root: Path) -> Dataset:
    train, test = [], []
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = {"object", "split", "label", "image", "mask"} - set(reader.fieldnames or ())
        if missing:
            raise DataError(f"{path}: not a VisA split file, it has no column {', '.join(sorted(missing))}")
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if row["split"] not in ("train", "test"):
                raise DataError(f"{where}: split must be train or test, got {row['split']!r}")
            defective = row["label"] not in ("normal", GOOD)
            sample = Sample(
                _inside(root, row["image"], where),
                row["object"],
                _defect_name(row["label"]) if defective else GOOD,
                _inside(root, row["mask"], where) if defective and row["mask"] else None,
            )
            if row["split"] == "test":
                test.append(sample)
            elif not defective:
                train.append(sample)
    return _not_empty(Dataset(path.stem, train, test), path)


def _load_elpv(seed: int) -> Dataset:
    """Train on 80% of the good cells of each kind, test on the rest and on all defective ones."""
    try:
        import elpv_dataset
    except ModuleNotFoundError:
        raise DataError("the data set elpv is in the package elpv-dataset: pip install 'uniad_fast[demo]'") from None
    root = Path(elpv_dataset.__file__).parent / "data"
    good: list[Sample] = []
    defective: list[Sample] = []
    for line in (root / "labels.csv").read_text().splitlines():
        if not line.strip():
            continue
        filename, probability, kind = line.split()
        if float(probability) == 0:
            good.append(Sample(root / filename, kind))
        elif float(probability) == 1:
            defective.append(Sample(root / filename, kind, "defective"))
    train, test_good = hold_out(good, share=0.2, seed=seed)
    return Dataset("elpv", train, test_good + defective)


def _inside(root: Path, relative: str, where: str) -> Path:
    path = Path(os.path.normpath(root / relative))
    if not path.is_relative_to(os.path.normpath(root)):
        raise DataError(f"{where}: {relative!r} leaves the image root {root}")
    return path


def _defect_name(name: str | None) -> str:
    return name if name and name != GOOD else "defective"


def _by_class(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.class_name, []).append(sample)
    return groups


def _not_empty(dataset: Dataset, source: Path) -> Dataset:
    if not dataset.train and not dataset.test:
        raise DataError(f"no images in {source}")
    return dataset
