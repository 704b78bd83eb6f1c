"""Reconstructed feature maps on disk, one .npy an image, named as the public code names them."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data.samples import Sample
from ..errors import UniadFastError
from ..files import atomic_path
from ..printable import file_name, printable
from .detector import AnomalyDetector


def save_reconstructions(
    feature_rec: Tensor, class_names: Sequence[str], filenames: Sequence[str], save_dir: str | os.PathLike
) -> None:
    """What the public code's forward does under `save_recon`, for the caller to do: one .npy an image.

    Args:
        feature_rec: [B, C_org, H, W].
        class_names, filenames: of the B images. DIR/KIND/IMAGE.png is written to save_dir/CLASS/KIND/IMAGE.npy, where
            names that are no file names are replaced (see `uniad_fast.printable.file_name`).
        save_dir: made if missing.
    """
    for class_name, filename, reconstruction in zip(class_names, filenames, feature_rec, strict=True):
        image = Path(filename)
        kind = file_name(image.parent.name) if image.parent.name else ""
        target = Path(save_dir, file_name(class_name), kind, file_name(image.stem) + ".npy")
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(target) as partial, open(partial, "wb") as file:
            np.save(file, reconstruction.detach().float().cpu().numpy())


class Reconstructions:
    """Reconstructed feature maps on disk, if they are asked for."""

    def __init__(self, detector: AnomalyDetector, directory: str | os.PathLike | None) -> None:
        self._detector = detector
        self._directory = directory
        self._names: dict[tuple[str, str, str], Path] = {}

    def save(self, samples: list[Sample], tokens: torch.Tensor) -> list[str]:
        """Write those of images with features [len(samples), N, C]; a message for each that can't be written."""
        if self._directory is None or not samples:
            return []
        if not len(tokens):
            raise UniadFastError("reconstructions need the features, which an exported file keeps: use another engine")
        problems = []
        for sample, one in zip(samples, self._detector.pipeline.reconstruction(tokens).split(1), strict=True):
            try:
                file = _name_once(sample, self._names)
                save_reconstructions(one, [sample.class_name], [file], self._directory)
            except OSError as error:
                problems.append(f"{printable(sample.path)}: reconstruction not written ({error.strerror})")
        return problems


def _name_once(sample: Sample, names: dict[tuple[str, str, str], Path]) -> str:
    """The sample's file, for `save_reconstructions` to name its own after, told apart from others of its name."""
    name = (sample.class_name, sample.path.parent.name, sample.path.stem)
    if names.setdefault(name, sample.path) == sample.path:
        return str(sample.path)
    digest = hashlib.sha256(os.fsencode(sample.path)).hexdigest()[:8]
    return str(sample.path.with_name(f"{sample.path.stem}-{digest}{sample.path.suffix}"))
