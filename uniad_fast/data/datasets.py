"""`load_dataset` takes every layout that is understood: folders, metadata files, and the demo's set.

Folders: see `uniad_fast.data.folder_layouts`. Metadata files: see `uniad_fast.data.metadata`. "elpv": solar cells from
the package elpv-dataset. docs/guide/data.md has the rules on one page.
"""

import os
from collections import Counter
from pathlib import Path

from .folder_layouts import load_folder
from .metadata import load_metadata, metadata_of
from .samples import GOOD, DataError, Dataset, Sample, by_class, hold_out


def load_dataset(
    source: str | os.PathLike,
    image_root: str | os.PathLike | None = None,
    seed: int = 0,
    all_good: bool = False,
    only_test: bool = False,
) -> Dataset:
    """The data set that `source` names: a folder, a metadata or CSV file, or "elpv" (see the module).

    Args:
        image_root: folder that paths in a metadata file start from, and may not leave; the file's own by default.
        seed: of the split of data sets that bring none.
        all_good: take every image in a folder for a good one to learn from, whatever the folders are called.
        only_test: nothing is learnt from it, so that a class's folder may hold test images alone.

    Raises:
        DataError: nothing there, nothing usable in it, a malformed line (with its number), or a folder that may hold
            defects; says which.
    """
    path = Path(source)
    if str(source) == "elpv" and not path.exists():
        return _load_elpv(seed)
    if not str(source).strip():
        raise DataError("the name of the data is empty")
    if path.is_file():
        if all_good:
            raise DataError(f"{path} is a file: --all-good is for folders")
        return _not_empty(load_metadata(path, image_root, seed), path)
    if not path.is_dir():
        raise DataError(f"{path} is neither a folder nor a file, nor the name of a data set (elpv)")
    if not all_good and (listed := metadata_of(path)):
        return _not_empty(load_metadata(listed, image_root or path, seed), path)
    if image_root is not None:
        raise DataError(f"{path} is a folder of images: an image root is for metadata files")
    return _not_empty(load_folder(path, seed, all_good, only_test), path)


def composition(dataset: Dataset) -> list[tuple[str, int, str, str]]:
    """A row a class: (class, good images to learn from, test images by kind, masks found for the defective ones)."""
    rows = []
    train, test = by_class(dataset.train), by_class(dataset.test)
    for name in sorted(train.keys() | test.keys()):
        members = test.get(name, [])
        kinds = Counter(sample.kind for sample in members)
        tested = ", ".join(f"{kinds[kind]} {kind}" for kind in sorted(kinds, key=lambda k: (k != GOOD, k)))
        defective = [sample for sample in members if sample.defective]
        masks = f"{sum(sample.mask is not None for sample in defective)} of {len(defective)}" if defective else ""
        rows.append((name, len(train.get(name, [])), tested, masks))
    return rows


def _load_elpv(seed: int) -> Dataset:
    """Train on 80% of the good cells of each kind, test on the rest and on all defective ones."""
    try:
        import elpv_dataset
    except ModuleNotFoundError:
        raise DataError("the data set elpv is in the package elpv-dataset: pip install elpv-dataset") from None
    root = Path(elpv_dataset.__file__).parent / "data"
    good: list[Sample] = []
    defective: list[Sample] = []
    for line in (root / "labels.csv").read_text(encoding="utf-8").splitlines():
        if not line.strip():
            continue
        filename, probability, kind = line.split()
        if float(probability) == 0:
            good.append(Sample(root / filename, kind))
        elif float(probability) == 1:
            defective.append(Sample(root / filename, kind, "defective"))
    train, test_good = hold_out(good, share=0.2, seed=seed)
    return Dataset("elpv", train, test_good + defective)


def _not_empty(dataset: Dataset, source: Path) -> Dataset:
    if not dataset.train and not dataset.test:
        raise DataError("; ".join([f"no images in {source}", *dataset.notes]))
    return dataset
