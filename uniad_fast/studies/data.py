"""What a study is made on: the features of a data set's training and test images, and the masks."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..data.feature_cache import cached_features
from ..data.image_files import list_images
from ..data.masks import read_mask
from ..data.samples import GOOD, DataError, Dataset, Sample
from ..files import sha256_of_file
from ..image_size import ImageSize, size_of
from ..models.backbone import Backbone
from ..rows import TokenRows
from .cifar10 import normal_classes
from .digits import NORMAL_SETS


@dataclass(frozen=True)
class StudyData:
    """Features of a data set, training images and test images.

    Attributes:
        name, image_size: of the data set; what its images are resized to, the side of a square or (height, width).
        backbone: whose features they are.
        train, test: samples that could be read.
        train_tokens, test_tokens: [images, N, C], row by row those of `train` and `test`.
        masks: bool [len(test), height, width], or None if some defective image has none.
        key: what everything above is recognised by: features, classes, labels and masks.
        unreadable: a message for each image that could not be read.
    """

    name: str
    image_size: ImageSize
    backbone: Backbone
    train: list[Sample]
    test: list[Sample]
    train_tokens: TokenRows
    test_tokens: TokenRows
    masks: NDArray | None
    key: str
    unreadable: list[str]

    @classmethod
    def load(
        cls, dataset: Dataset, backbone: Backbone, image_size: ImageSize, cache_dir: Path | None, quiet: bool = False
    ) -> "StudyData":
        """Features from the cache, or extracted into it.

        Raises:
            DataError: a class has no good image to train on, or not both kinds to test on.
            UnreadableImage: a mask can't be read.
        """
        cls._check(dataset.name, dataset.train, dataset.test)
        good = cached_features(
            backbone, image_size, [s.path for s in dataset.train], cache_dir, "features of training images", quiet
        )
        tested = cached_features(
            backbone, image_size, [s.path for s in dataset.test], cache_dir, "features of test images", quiet
        )
        train_samples = [dataset.train[i] for i in good.used]
        test_samples = [dataset.test[i] for i in tested.used]
        cls._check(dataset.name, train_samples, test_samples)
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
        train = {i: sample for i, sample in enumerate(self.train) if sample.class_name == name}
        test = {i: sample for i, sample in enumerate(self.test) if sample.class_name == name}
        return self._part(name, train, test)

    def _part(self, name: str, train: dict[int, Sample], test: dict[int, Sample]) -> "StudyData":
        """Of some rows, and what their samples are there."""
        train_rows, test_rows = list(train), list(test)
        return StudyData(
            self.name,
            self.image_size,
            self.backbone,
            list(train.values()),
            list(test.values()),
            self.train_tokens[train_rows],
            self.test_tokens[test_rows],
            None if self.masks is None else self.masks[test_rows],
            f"{self.key}/{name}",
            [],
        )

    @staticmethod
    def _check(name: str, train: list[Sample], test: list[Sample]) -> None:
        _check_classes(name, train, test)


class ManyVersusMany(StudyData):
    """Images of ten classes, five of which are normal at a time (paper, section 4: CIFAR-10).

    A "class" is a normal set such as "01234": its training images are those of its classes, and its test images are
    those of all ten, anomalous where the class is not in it.
    """

    @property
    def classes(self) -> list[str]:
        """The paper's normal sets."""
        return list(NORMAL_SETS)

    def of_class(self, name: str) -> StudyData:
        """What is trained and tested on with one normal set."""
        normal = normal_classes(name)
        train = {i: replace(s, class_name=name) for i, s in enumerate(self.train) if s.class_name in normal}
        test = {
            i: replace(s, class_name=name, kind=GOOD if s.class_name in normal else s.class_name)
            for i, s in enumerate(self.test)
        }
        return self._part(name, train, test)

    @staticmethod
    def _check(name: str, train: list[Sample], test: list[Sample]) -> None:
        for part, samples in (("train on", train), ("test on", test)):
            if missing := set(normal_classes("0123456789")) - {sample.class_name for sample in samples}:
                raise DataError(f"{name} has no image of {', '.join(sorted(missing))} to {part}")


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


def _masks(samples: list[Sample], image_size: ImageSize) -> NDArray | None:
    if any(sample.defective and sample.mask is None for sample in samples):
        return None
    masks = np.zeros((len(samples), *size_of(image_size)), dtype=bool)
    for row, sample in enumerate(samples):
        if sample.mask is not None:
            masks[row] = read_mask(sample.mask, image_size, sample.path)
    return masks
