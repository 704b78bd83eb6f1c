"""The many-class semantic setting (paper, section 4: CIFAR-10) on scikit-learn's digits: five normal, five anomalous.

The training set is unlabelled images of five digits together; every other digit is an anomaly. There are no masks, and
the whole image is the defect: the mean of the map is the score that suits it.
"""

import os
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import UniadFastError
from ..files import atomic_directory
from ..packages import require

NORMAL_SETS = ("01234", "56789", "02468", "13579")
"""The splits of the public configurations."""
_SIZE = 32
_TRAIN_SHARE = 0.6


def write_digits(directory: str | os.PathLike, normal: str = "01234", seed: int = 0) -> None:
    """Write one split as one class, "digits", in MVTec AD's layout, whole or not at all.

    train/good has 60% of the normal digits, test/good the others, test/DIGIT the anomalous ones, as many of each as
    there are normal ones of a digit in the test on average. Images are 32 x 32, enlarged from 8 x 8.

    Args:
        directory: made; must not exist or be empty.
        normal: the normal digits, e.g. "02468".

    Raises:
        MissingPackageError: scikit-learn is not installed.
        FileExistsError: there is something at `directory`.
        UniadFastError: not some of the ten digits, but not all.
    """
    require("sklearn")
    from sklearn.datasets import load_digits

    directory = Path(directory)
    if not (0 < len(set(normal)) < 10 and set(normal) <= set("0123456789") and len(set(normal)) == len(normal)):
        raise UniadFastError(f"normal must be one to nine different digits, such as 01234, got {normal!r}")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} is there already: choose another place")
    data = load_digits()
    rng = np.random.default_rng(seed)
    with atomic_directory(directory) as root:
        test_counts = []
        for digit in sorted(normal) + sorted(set("0123456789") - set(normal)):
            members = rng.permutation(np.flatnonzero(data.target == int(digit)))
            if digit in normal:
                cut = round(_TRAIN_SHARE * len(members))
                test_counts.append(len(members) - cut)
                places = [("train/good", members[:cut]), ("test/good", members[cut:])]
            else:
                places = [(f"test/{digit}", members[: round(np.mean(test_counts))])]
            for folder, indices in places:
                for index in indices:
                    picture = Image.fromarray(np.round(data.images[index] * 255 / 16).astype(np.uint8))
                    path = root / "digits" / folder / f"{digit}-{index:04}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    picture.resize((_SIZE, _SIZE), Image.Resampling.BICUBIC).convert("RGB").save(path)
