"""Folders of images as people have them, told apart by the names of their sub-folders (in any case).

    split      CLASS/train/good, CLASS/test/{good,DEFECT}, CLASS/ground_truth/DEFECT: MVTec AD, MPDD, BTAD;
               with validation/good, learnt from too: MVTec LOCO; with test_public and its own ground_truth: MVTec AD 2;
               with rgb, xyz and gt in each kind, of which rgb and gt are looked at: MVTec 3D-AD
    raw        CLASS/Data/Images/{Normal,Anomaly}, CLASS/Data/Masks/Anomaly: VisA
    kinds      CLASS/{good,DEFECT}, with or without masks: good images are split by the seed
    good only  images anywhere below, and no folder whose name speaks of defects, tests or masks

A class lies in a folder of its own, or the folder itself is the only class. Whatever else there is, is refused by name:
a defect that is learnt as good is never found again.
"""

from collections import Counter
from pathlib import Path

from ..printable import printable
from .doubtful_folders import refuse_if_doubtful, refuse_if_mixed
from .folder_names import (
    MASKS,
    TEST,
    TRAIN,
    UNLABELLED,
    VALIDATION,
    below,
    folders,
    is_defective,
    is_defective_alone,
    listed,
    named,
    shown,
)
from .image_files import EXTENSIONS, find_images
from .mask_files import MaskFinder
from .samples import GOOD, DataError, Dataset, Sample, hold_out, is_good

_SHARE_OF_TEST = 0.2  # of good images, where the layout brings no split


def load_folder(root: Path, seed: int, all_good: bool, only_test: bool = False) -> Dataset:
    """The data set in a folder, by the first layout of the module's table that fits.

    only_test: nothing is learnt from it, so that a class may have a test folder alone.

    Raises:
        DataError: a folder may hold defects, masks or tests, and no layout says which.
    """
    root = root.resolve()
    notes: list[str] = []
    if all_good:
        return Dataset(root.name, _images(root, root, root.name, GOOD, notes), [], notes)
    if _is_class(root, only_test=False):
        return _load_classes(root, [root], seed, notes, only_test)
    children = folders(root)
    classes = [child for child in children if not _is_kind(child.name) and _is_class(child, only_test)]
    if not classes:
        beside = [child for child in children if is_good(child.name) or is_defective_alone(child.name)]
        if only_test and _is_split(root, only_test) and not beside:
            return _load_classes(root, [root], seed, notes, only_test)
        refuse_if_doubtful(root)
        images = _images(root, root, root.name, GOOD, notes)
        _note_folders(root, images, notes)
        return Dataset(root.name, images, [], notes)
    others = [child for child in children if child not in classes and find_images(child).images]
    if others:
        raise DataError(
            f"{root}: {listed(c.name for c in classes)} lie there as classes with their splits, but in "
            f"{listed(c.name for c in others)} there are images and no such folders: move them elsewhere, or give "
            "the classes' own folders"
        )
    loose = [p for p in root.iterdir() if p.is_file() and p.suffix.lower() in EXTENSIONS]
    if loose:
        notes.append(f"{len(loose)} images beside the classes' folders")
    return _load_classes(root, classes, seed, notes, only_test)


def _is_class(folder: Path, only_test: bool) -> bool:
    return _is_split(folder, only_test) or _is_raw(folder) or _is_kinds(folder)


def _is_kind(name: str) -> bool:
    """Whether a folder is called like a part of a data set and not like a class."""
    return name.lower() in TEST | MASKS or is_defective_alone(name)


def _is_split(folder: Path, only_test: bool) -> bool:
    parts = TRAIN | TEST if only_test else TRAIN
    return bool(named(folder, parts)) and (folder.name.lower() not in TRAIN | TEST)


def _is_raw(folder: Path) -> bool:
    images = below(folder, "data", "images")
    return images is not None and any(is_good(child.name) for child in folders(images))


def _is_kinds(folder: Path) -> bool:
    """Good and defective images side by side, and nothing that is neither."""
    names = {child.name.lower() for child in folders(folder)}
    good, defects = {n for n in names if is_good(n)}, {n for n in names if is_defective(n)}
    return bool(good and defects) and names <= good | defects | MASKS and folder.name.lower() not in TEST | TRAIN


def _load_classes(root: Path, classes: list[Path], seed: int, notes: list[str], only_test: bool) -> Dataset:
    train: list[Sample] = []
    test: list[Sample] = []
    for folder in classes:
        if _is_split(folder, only_test):
            good, tested = _load_split(folder, notes)
        elif _is_raw(folder):
            good, tested = _load_raw(folder, seed, notes)
        else:
            good, tested = _load_kinds(folder, seed, notes)
        if not good and not only_test:
            raise DataError(f"{folder}: no good image to learn from")
        train += good
        test += tested
    return Dataset(root.name, train, test, notes)


def _load_split(folder: Path, notes: list[str]) -> tuple[list[Sample], list[Sample]]:
    train: list[Sample] = []
    test: list[Sample] = []
    used = {*named(folder, TRAIN), *named(folder, VALIDATION), *named(folder, TEST), *named(folder, MASKS)}
    for part in (*named(folder, TRAIN), *named(folder, VALIDATION)):
        kinds = folders(part)
        good = [kind for kind in kinds if is_good(kind.name)]
        if not good and find_images(part).images:
            raise DataError(
                f"{part}: none of its folders ({listed(k.name for k in kinds) or 'it has none'}) is called good, ok "
                "or normal, so it may hold defects. If all of its images are good, give it by itself with --all-good"
            )
        for kind in good:
            refuse_if_mixed(_pictures(kind), folder)
            train += _images(_pictures(kind), kind, folder.name, GOOD, notes)
        for kind in kinds:
            if kind not in good and (count := len(find_images(kind).images)):
                notes.append(f"{shown(kind, folder)}: {count} images, to learn from are those in {good[0].name} alone")
        _note_loose(part, folder, notes)
    for part in named(folder, TEST):
        own_masks = named(part, MASKS)
        masks = [*own_masks, *named(folder, MASKS)]
        for kind in folders(part):
            if kind not in own_masks:
                test += _kind(kind, folder, masks, notes)
        _note_loose(part, folder, notes)
    for other in folders(folder):
        if other not in used and (count := len(find_images(other).images)):
            why = "without labels" if UNLABELLED.match(other.name.lower()) else "neither train, validation nor test"
            notes.append(f"{shown(other, folder)}: {count} images, {why}")
    _note_loose(folder, folder, notes)
    return train, test


def _load_raw(folder: Path, seed: int, notes: list[str]) -> tuple[list[Sample], list[Sample]]:
    images, masks = below(folder, "data", "images"), below(folder, "data", "masks")
    assert images is not None
    return _split_kinds(images, folder, [masks] if masks else [], seed, notes)


def _load_kinds(folder: Path, seed: int, notes: list[str]) -> tuple[list[Sample], list[Sample]]:
    return _split_kinds(folder, folder, named(folder, MASKS), seed, notes)


def _split_kinds(
    part: Path, folder: Path, masks: list[Path], seed: int, notes: list[str]
) -> tuple[list[Sample], list[Sample]]:
    """Kinds without a split: defective images are for testing, good ones are split by the seed."""
    good: list[Sample] = []
    test: list[Sample] = []
    for kind in folders(part):
        if kind not in masks:
            samples = _kind(kind, folder, masks, notes)
            (good if is_good(kind.name) else test).extend(samples)
    _note_loose(part, folder, notes)
    train, held = hold_out(good, _SHARE_OF_TEST, seed)
    notes.append(f"{printable(folder.name)}: no split, so {len(held)} of {len(good)} good images are kept for testing")
    return train, held + test


def _kind(kind: Path, folder: Path, masks: list[Path], notes: list[str]) -> list[Sample]:
    """The samples in the folder of one kind of image, with their masks."""
    name = GOOD if is_good(kind.name) else kind.name
    pictures = _pictures(kind)
    refuse_if_mixed(pictures, folder)
    samples = _images(pictures, kind, folder.name, name, notes)
    if name == GOOD:
        return samples
    own = [] if pictures == kind else named(kind, MASKS)  # rgb and gt side by side
    finder = MaskFinder(kind.name, own, masks)
    return [Sample(s.path, s.class_name, name, finder.find(s.path.relative_to(pictures))) for s in samples]


def _images(folder: Path, shown: Path, class_name: str, kind: str, notes: list[str]) -> list[Sample]:
    found = find_images(folder)
    if found.others:
        what = ", ".join(f"{count} {suffix}" for suffix, count in sorted(Counter(found.others).items()))
        notes.append(f"{printable(shown)}: {what} ({'no image' if len(found.others) == 1 else 'no images'})")
    notes += found.problems
    return [Sample(path, class_name, kind) for path in found.images]


def _pictures(kind: Path) -> Path:
    """Where a kind's pictures lie: in MVTec 3D-AD, beside its point clouds and masks."""
    return below(kind, "rgb") or kind


def _note_folders(root: Path, images: list[Sample], notes: list[str]) -> None:
    """Which folders' images are learnt as good ones, where nobody has called them so."""
    parts = Counter(path.parts[0] for s in images if len((path := s.path.relative_to(root)).parts) > 1)
    if parts and not is_good(root.name):
        shown = listed(f"{name} ({count})" for name, count in sorted(parts.items()))
        notes.append(f"{printable(root.name)}: learnt from as good are its folders {shown}")


def _note_loose(part: Path, folder: Path, notes: list[str]) -> None:
    loose = [p for p in part.iterdir() if p.is_file() and p.suffix.lower() in EXTENSIONS]
    if loose:
        notes.append(f"{shown(part, folder)}: {len(loose)} images in none of its folders")
