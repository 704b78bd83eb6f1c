"""Features of images: what they are, what they are recognised by, how they come from a batch."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..files import sha256_of_file
from ..image_size import ImageSize, in_words
from ..models.backbone import Backbone
from ..rows import TokenRows
from .feature_shards import PRECISIONS
from .image_batches import Failure, ImageBatch
from .tiling import Tiles, Tiling

_FORMAT = 3  # part of the key: raise it when preprocessing or layout change


@dataclass(frozen=True)
class Features:
    """Features of some images.

    Attributes:
        tokens: [images, N, C] float32, in files, or extracted when they are read.
        used: the index of each row's path.
        unreadable: a message for each image that has no row.
        key: what they are recognised by.
        notes: remarks on images that are not shown quite as they are.
        tiles: where each row's tile lies in its image; None where a row is a whole image's.
    """

    tokens: TokenRows
    used: list[int]
    unreadable: list[str]
    key: str
    notes: list[str] = field(default_factory=list)
    tiles: Tiles | None = None


def tokens_of(batch: ImageBatch, backbone: Backbone) -> NDArray:
    """[len(batch.used), N, C] float32."""
    if not batch.used:
        return np.zeros((0, 1, 1), dtype=np.float32)
    return backbone(batch.images.to(backbone.mean.device)).flatten(2).transpose(1, 2).cpu().numpy()


def finite_tokens(
    batch: ImageBatch, backbone: Backbone, precision: str = "float32"
) -> tuple[Tensor, list[int], list[Failure]]:
    """(tokens in that precision, positions, failures) of a batch, those whose features are not finite among the
    failures.
    """
    tokens = torch.from_numpy(np.ascontiguousarray(tokens_of(batch, backbone))).to(PRECISIONS[precision])
    finite = tokens.isfinite().flatten(1).all(dim=1)
    failures = list(batch.failures)
    failures += [
        Failure(batch.used[i], "its features are not finite" + (f" in {precision}" if precision != "float32" else ""))
        for i in (~finite).nonzero()[:, 0].tolist()
    ]
    failures.sort(key=lambda failure: failure.position)
    positions = [position for position, good in zip(batch.used, finite.tolist(), strict=True) if good]
    return tokens[finite], positions, failures


def digest(path: Path) -> str | None:
    """SHA-256 of the file; None if it can't be read, which the extraction will say."""
    try:
        found = path.stat()
        return _digest(path, found.st_ino, found.st_size, found.st_mtime_ns)
    except (OSError, ValueError):
        return None


@lru_cache(1 << 16)
def _digest(path: Path, *_state: int) -> str:
    """Read once as long as the file is as it was: several ask, and a slow disk takes its time."""
    return sha256_of_file(path)


def key_of(
    backbone: Backbone,
    image_size: ImageSize,
    precision: str,
    paths: Sequence[Path],
    digests: Sequence[str | None],
    tiling: Tiling | None = None,
) -> str:
    """What features are recognised by: all that they depend on, and how they are kept."""
    kept_in = "" if precision == "float32" else f" {precision}"
    kept_in += "" if tiling is None else f" in tiles that overlap by {tiling.overlap:g}"
    hashed = hashlib.sha256(f"{_FORMAT} {backbone.fingerprint()} {in_words(image_size)}{kept_in}\n".encode())
    for path, digest in zip(paths, digests, strict=True):
        hashed.update((digest or f"missing {path}").encode("utf-8", "surrogatepass"))
    return hashed.hexdigest()[:32]
