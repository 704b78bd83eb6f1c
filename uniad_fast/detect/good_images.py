"""The good images that a detector is given, to learn from and to set its threshold."""

import os
from collections.abc import Sequence
from pathlib import Path

from ..data.datasets import load_dataset
from ..data.samples import DataError, Dataset, Sample, hold_out

GoodImages = str | os.PathLike | Dataset | Sequence[str | os.PathLike | Sample]
"""Whatever `load_dataset` takes, a `Dataset`, or a list, all good: of image files, or of samples with their classes."""


def training_split(samples: list[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """(to train on, to set the threshold): both have one at least.

    Raises:
        DataError: there are fewer than two samples.
    """
    if len(samples) < 2:
        raise DataError(f"training needs at least two good images, got {len(samples)}")
    kept, held_out = hold_out(samples, share, seed)
    return (kept, held_out) if held_out else (kept[:-1], kept[-1:])  # classes of one image each


def good_samples(data: GoodImages) -> list[Sample]:
    """The samples to learn from.

    Raises:
        DataError: see `load_dataset`.
    """
    if isinstance(data, (str, os.PathLike)):
        data = load_dataset(data)
    return (
        data.train
        if isinstance(data, Dataset)
        else [one if isinstance(one, Sample) else Sample(Path(one), "unnamed") for one in data]
    )
