"""Writing a data set of made-up images and defects, in MVTec AD's layout."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..files import atomic_directory
from ..progress import progress
from .painting import Pixels, save

_TRIES = 20


class Product(NamedTuple):
    """How the images of one class are made.

    Attributes:
        good: (generator, whether it is to train on) -> a good image.
        spoilt: (generator, kind of defect) -> (a good image, the same with a defect, the defect's mask of 0 and 255).
    """

    good: Callable[[np.random.Generator, bool], Pixels]
    spoilt: Callable[[np.random.Generator, str], tuple[Pixels, Pixels, Pixels]]


class Counts(NamedTuple):
    """Images of each class: good ones to train and to test on, and defective ones of each kind."""

    train: int
    good: int
    defective: int


def refuse_to_overwrite(directory: str | os.PathLike) -> Path:
    """The path, if it is free or an empty folder.

    Raises:
        FileExistsError: there is something at `directory`.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} is there already: choose another place")
    return directory


def write_products(
    directory: str | os.PathLike,
    products: Mapping[str, Product],
    kinds: Sequence[str],
    counts: Counts,
    seed: int,
    least_change: float,
    quiet: bool = False,
) -> None:
    """Write the set, whole or not at all; the same seed gives the same files.

    Args:
        directory: made; must not exist or be empty.
        products: by the name of the class.
        kinds: of defects.
        least_change: under the mask, in grey levels on average, at which a defect shows: it is drawn anew until then.

    Raises:
        FileExistsError: there is something at `directory`.
    """
    directory = refuse_to_overwrite(directory)
    total = len(products) * (counts.train + counts.good + counts.defective * len(kinds))
    with atomic_directory(directory) as root, progress(directory.name, total, quiet=quiet) as bar:
        for number, (name, product) in enumerate(products.items()):
            rng = np.random.default_rng((seed, number))
            for folder, count in (("train", counts.train), ("test", counts.good)):
                for index in range(count):
                    save(product.good(rng, folder == "train"), root / name / folder / "good" / f"{index:03}.png")
                    bar.update()
            for kind in kinds:
                for index in range(counts.defective):
                    spoilt, mask = _visible(product, rng, kind, least_change)
                    save(spoilt, root / name / "test" / kind / f"{index:03}.png")
                    save(mask, root / name / "ground_truth" / kind / f"{index:03}_mask.png")
                    bar.update()


def _visible(product: Product, rng: np.random.Generator, kind: str, least_change: float) -> tuple[Pixels, Pixels]:
    """A spoilt image and its mask, drawn anew until the defect shows; the clearest of some tries at least."""
    best = (-1.0, np.zeros(0, np.uint8), np.zeros(0, np.uint8))
    for _ in range(_TRIES):
        good, spoilt, mask = product.spoilt(rng, kind)
        change = float(np.abs(spoilt.astype(float) - good)[mask > 0].mean())
        if change > best[0]:
            best = (change, spoilt, mask)
        if change >= least_change:
            break
    return best[1], best[2]
