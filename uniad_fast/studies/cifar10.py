"""CIFAR-10 in the paper's setting: five classes together are normal, and every image of the other five is anomalous.

The images lie in a folder for each class, train/airplane, test/airplane and so on; `write_cifar10` makes that of the
binary version (data_batch_1.bin and so on). The Python version is pickled, and what is pickled is not opened here.
"""

import os
from pathlib import Path

import numpy as np
from PIL import Image

from ..data.image_files import find_images
from ..data.samples import DataError, Dataset, Sample
from ..files import atomic_directory
from ..progress import progress
from .made_up import refuse_to_overwrite

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""In the order of their numbers."""
FEATURE_LEVELS, FEATURE_STRIDE = (0, 1, 2, 3, 4), 16
"""Of the public configuration for CIFAR-10: the coarsest stage too, on the same map."""
BATCH_SIZE = 128
"""Of the published figures: 16 on each of 8 GPUs."""
_SIDE = 32
_RECORD = 1 + 3 * _SIDE**2
_PARTS = {"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)}


def is_cifar10(root: Path) -> bool:
    """Whether a folder holds CIFAR-10: as images in folders of the ten classes, or one of its archives unpacked."""
    return _has_images(root) or any((root / name).is_file() for name in ("data_batch_1.bin", "data_batch_1"))


def _has_images(root: Path) -> bool:
    return all((root / part / name).is_dir() for part in _PARTS for name in CLASSES)


def load_cifar10(root: Path) -> Dataset:
    """All images, good ones of their own classes: what is normal is chosen later.

    Raises:
        DataError: the archive's files are there in place of images; says what to do.
    """
    if (root / "data_batch_1.bin").is_file():
        raise DataError(
            f"{root} is CIFAR-10's binary version: write it as images with: uniad-fast data cifar10 {root} FOLDER"
        )
    if not _has_images(root):
        raise DataError(
            f"{root} is CIFAR-10's Python version, which is pickled and is not opened (a pickle can run any program): "
            'unpack "CIFAR-10 binary version" of www.cs.toronto.edu/~kriz/cifar.html, and write it as images with: '
            "uniad-fast data cifar10 cifar-10-batches-bin FOLDER"
        )
    train, test = (
        [Sample(path, name) for name in CLASSES for path in find_images(root / part / name).images] for part in _PARTS
    )
    return Dataset("CIFAR-10", train, test)


def normal_classes(digits: str) -> list[str]:
    """Names of the classes of a normal set, such as "01234"."""
    return [CLASSES[int(digit)] for digit in digits]


def write_cifar10(archive: str | os.PathLike, directory: str | os.PathLike, quiet: bool = False) -> None:
    """Write the binary version's 60,000 images as PNG files, whole or not at all.

    Args:
        archive: the folder with data_batch_1.bin to data_batch_5.bin and test_batch.bin.
        directory: made; must not exist or be empty. Gets train/CLASS/NUMBER.png and test/CLASS/NUMBER.png.

    Raises:
        DataError: a file of the archive is missing or damaged.
        FileExistsError: there is something at `directory`.
    """
    directory, archive = refuse_to_overwrite(directory), Path(archive)
    records = {part: np.concatenate([_read(archive / name) for name in names]) for part, names in _PARTS.items()}
    total = sum(map(len, records.values()))
    with atomic_directory(directory) as root, progress("CIFAR-10", total, quiet=quiet) as bar:
        for part, images in records.items():
            folders = [root / part / name for name in CLASSES]
            for folder in folders:
                folder.mkdir(parents=True)
            for number, record in enumerate(images):
                picture = record[1:].reshape(3, _SIDE, _SIDE).transpose(1, 2, 0)
                Image.fromarray(np.ascontiguousarray(picture)).save(folders[record[0]] / f"{number:05}.png")
                bar.update()


def _read(path: Path) -> np.ndarray:
    """uint8 [images, 1 + 3 * 32 * 32]: label, then the red, green and blue plane."""
    if not path.is_file():
        raise DataError(f"{path} is not there: CIFAR-10's binary version has {', '.join(sum(_PARTS.values(), ()))}")
    content = np.fromfile(path, dtype=np.uint8)
    if not len(content) or len(content) % _RECORD:
        raise DataError(f"{path} is damaged: {len(content)} bytes are no whole number of {_RECORD}-byte records")
    records = content.reshape(-1, _RECORD)
    if (largest := records[:, 0].max()) >= len(CLASSES):
        raise DataError(f"{path} is damaged: it has a label of {largest}, and there are {len(CLASSES)} classes")
    return records
