"""What a study is made on: the features of a data set's training and test images, and the masks."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..data.feature_cache import cached_features
from ..data.image_files import list_images
from ..data.masks import read_mask
from ..data.samples import DataError, Dataset, Sample
from ..files import sha256_of_file
from ..models.backbone import Backbone


@dataclass(frozen=True)
class StudyData:
    """Features of a data set, training images and test images.

    Attributes:
        name, image_size: of the data set; side of the square that images are resized to.
        backbone: whose features they are.
        train, test: samples that could be read.
        train_tokens, test_tokens: [images, N, C], row by row those of `train` and `test`.
        masks: bool [len(test), image_size, image_size], or None if some defective image has none.
        key: what everything above is recognised by: features, classes, labels and masks.
        unreadable: a message for each image that could not be read.
    """

    name: str
    image_size: int
    backbone: Backbone
    train: list[Sample]
    test: list[Sample]
    train_tokens: NDArray
    test_tokens: NDArray
    masks: NDArray | None
    key: str
    unreadable: list[str]

    @classmethod
    def load(
        cls, dataset: Dataset, backbone: Backbone, image_size: int, cache_dir: Path | None, quiet: bool = False
    ) -> "StudyData":
        """Features from the cache, or extracted into it.

        Raises:
            DataError: a class has no good image to train on, or not both kinds to test on.
            UnreadableImage: a mask can't be read.
        """
        _check_classes(dataset.name, dataset.train, dataset.test)
        good = cached_features(
            backbone, image_size, [s.path for s in dataset.train], cache_dir, "features of training images", quiet
        )
        tested = cached_features(
            backbone, image_size, [s.path for s in dataset.test], cache_dir, "features of test images", quiet
        )
        train_samples = [dataset.train[i] for i in good.used]
        test_samples = [dataset.test[i] for i in tested.used]
        _check_classes(dataset.name, train_samples, test_samples)
        return cls(
            dataset.name,
            image_size,
            backbone,
            train_samples,
            test_samples,
            good.tokens,
            tested.tokens,
            _masks(test_samples, image_size),
            f"{good.key}/{_key_of_tests(tested.key, train_samples, test_samples)}",
            good.unreadable + tested.unreadable,
        )

    @property
    def classes(self) -> list[str]:
        """Names of the classes that are tested, sorted."""
        return sorted({sample.class_name for sample in self.test})

    def of_class(self, name: str) -> "StudyData":
        """The part of one class."""
        train_rows = [i for i, sample in enumerate(self.train) if sample.class_name == name]
        test_rows = [i for i, sample in enumerate(self.test) if sample.class_name == name]
        return StudyData(
            self.name,
            self.image_size,
            self.backbone,
            [self.train[i] for i in train_rows],
            [self.test[i] for i in test_rows],
            self.train_tokens[train_rows],
            self.test_tokens[test_rows],
            None if self.masks is None else self.masks[test_rows],
            f"{self.key}/{name}",
            [],
        )


def _key_of_tests(features: str, train: list[Sample], test: list[Sample]) -> str:
    hashed = hashlib.sha256(features.encode())
    for sample in (*train, *test):
        masks = [] if sample.mask is None else list_images(sample.mask) if sample.mask.is_dir() else [sample.mask]
        told = [sample.class_name, sample.kind, *(sha256_of_file(mask) for mask in masks)]
        hashed.update(json.dumps(told).encode())
    return hashed.hexdigest()[:16]


def _check_classes(name: str, train: list[Sample], test: list[Sample]) -> None:
    tested = sorted({sample.class_name for sample in test})
    if not tested:
        raise DataError(f"{name} has no test images, which a study measures on")
    for class_name in tested:
        if not any(sample.class_name == class_name for sample in train):
            raise DataError(f"class {class_name!r} of {name} has no good image to train on")
        kinds = {sample.defective for sample in test if sample.class_name == class_name}
        if len(kinds) < 2:
            raise DataError(f"class {class_name!r} of {name} needs good and defective test images, has one kind alone")


def _masks(samples: list[Sample], image_size: int) -> NDArray | None:
    if any(sample.defective and sample.mask is None for sample in samples):
        return None
    masks = np.zeros((len(samples), image_size, image_size), dtype=bool)
    for row, sample in enumerate(samples):
        if sample.mask is not None:
            masks[row] = read_mask(sample.mask, image_size, sample.path)
    return masks
