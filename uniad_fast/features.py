"""Features of many images: extracted once, kept in a memory-mapped file, used again by the next run.

The backbone is frozen and the paper trains without augmentation, so an image's features never change. A cache is two
files, KEY.f32 (the rows: [images, N, C] float32, nothing else) and KEY.json (the shape, a checksum, and which images
could not be read). KEY is a hash of what the features depend on: backbone, levels and weights, image size, and the
content of every image. While being made they are called KEY.partial.*, and an interrupted extraction goes on from
there. A lock file keeps two processes from making the same cache at once.
"""

import contextlib
import hashlib
import json
import os
import warnings
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .backbone import Backbone
from .files import atomic_path, locked, sha256_of_file
from .images import UnreadableImage, read_image, to_tensor
from .progress import progress

_FORMAT = 1  # part of the key: raise it when preprocessing or layout change
_BATCH = 32


@dataclass(frozen=True)
class Features:
    """`tokens` [images, N, C] float32, memory-mapped; `used`, the index of each row's path; `unreadable`, messages."""

    tokens: NDArray
    used: list[int]
    unreadable: list[str]
    key: str


def default_cache_dir() -> Path:
    """Where features are kept when nothing is said: the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "uniad_fast"


def cached_features(
    backbone: Backbone,
    image_size: int,
    paths: Sequence[Path],
    cache_dir: str | os.PathLike | None = None,
    description: str = "features",
    quiet: bool = False,
) -> Features:
    """Features of the images at `paths`, in order, from the cache or extracted into it.

    Unreadable images are left out and listed. A cache that is damaged or of another shape is rebuilt, with a warning.
    """
    directory = Path(cache_dir) if cache_dir else default_cache_dir()
    directory.mkdir(parents=True, exist_ok=True)
    height, width = backbone.grid(image_size)
    shape = (height * width, backbone.channels)
    key = _key(backbone, image_size, paths)
    rows_path, info_path = directory / f"{key}.f32", directory / f"{key}.json"

    with locked(directory / f"{key}.lock"):
        if info_path.exists():
            info, problem = _read_info(rows_path, info_path, shape)
            if info is not None:
                return _open(rows_path, info, key)
            warnings.warn(f"the feature cache {rows_path} {problem}: extracting again", stacklevel=2)
            info_path.unlink()

        partial = _PartialCache(directory, key)
        with progress(description, len(paths), initial=partial.done, quiet=quiet) as bar:
            for batch in read_batches(paths[partial.done :], image_size):
                partial.append(batch.tokens(backbone), batch.used, batch.unreadable, batch.size)
                bar.update(batch.size)
        partial.finish(rows_path, info_path, shape)
        return _open(rows_path, json.loads(info_path.read_text()), key)


@dataclass(frozen=True)
class ImageBatch:
    """Some images, read: `images` [len(used), 3, S, S]; `used` are positions among the `size` paths asked for."""

    images: Tensor
    used: list[int]
    unreadable: list[str]
    size: int

    def tokens(self, backbone: Backbone) -> NDArray:
        """[len(used), N, C] float32."""
        if not self.used:
            return np.zeros((0, 1, 1), dtype=np.float32)
        return backbone(self.images.to(backbone.mean.device)).flatten(2).transpose(1, 2).cpu().numpy()


def read_batches(paths: Sequence[Path], image_size: int, batch_size: int = _BATCH) -> Iterator[ImageBatch]:
    """Read the images in order, the next batch while the caller works on the last."""

    def read(path: Path) -> Tensor | str:
        try:
            return to_tensor(read_image(path), image_size)
        except UnreadableImage as error:
            return str(error)

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        ahead = deque([pool.submit(read, path) for path in paths[:batch_size]])
        for start in range(0, len(paths), batch_size):
            ahead.extend(pool.submit(read, path) for path in paths[start + batch_size : start + 2 * batch_size])
            results = [ahead.popleft().result() for _ in paths[start : start + batch_size]]
            used = [i for i, result in enumerate(results) if isinstance(result, Tensor)]
            images = [result for result in results if isinstance(result, Tensor)]
            yield ImageBatch(
                torch.stack(images) if images else torch.zeros(0, 3, image_size, image_size),
                used,
                [result for result in results if isinstance(result, str)],
                len(results),
            )


class _PartialCache:
    """A cache being made: rows are appended, and after them how far it got is written down."""

    def __init__(self, directory: Path, key: str) -> None:
        self._rows_path = directory / f"{key}.partial.f32"
        self._state_path = directory / f"{key}.partial.json"
        self._state: dict[str, Any] = {"done": 0, "bytes": 0, "used": [], "unreadable": [], "checksum": 0}
        if self._rows_path.exists() and self._state_path.exists():
            with contextlib.suppress(ValueError):  # a damaged note: start again
                state = json.loads(self._state_path.read_text())
                # Rows that were written after the last note are cut off and extracted again.
                if self._rows_path.stat().st_size >= state["bytes"]:
                    self._state = state
        with open(self._rows_path, "ab") as file:
            file.truncate(self._state["bytes"])

    @property
    def done(self) -> int:
        """Paths dealt with."""
        return self._state["done"]

    def append(self, tokens: NDArray, used: list[int], unreadable: list[str], images: int) -> None:
        rows = np.ascontiguousarray(tokens, dtype=np.float32).tobytes() if used else b""
        with open(self._rows_path, "ab") as file:
            file.write(rows)
            file.flush()
            os.fsync(file.fileno())
        state = self._state
        state["used"] += [self.done + position for position in used]
        state["unreadable"] += unreadable
        state["checksum"] = zlib.crc32(rows, state["checksum"])
        state["bytes"] += len(rows)
        state["done"] += images
        with atomic_path(self._state_path) as path:
            path.write_text(json.dumps(state))

    def finish(self, rows_path: Path, info_path: Path, shape: tuple[int, int]) -> None:
        self._rows_path.replace(rows_path)
        info = {"shape": [len(self._state["used"]), *shape]} | self._state
        with atomic_path(info_path) as path:
            path.write_text(json.dumps(info))
        self._state_path.unlink(missing_ok=True)  # there is none of no images


def _open(rows_path: Path, info: dict[str, Any], key: str) -> Features:
    shape = tuple(info["shape"])
    # An empty file can't be mapped.
    tokens = np.memmap(rows_path, dtype=np.float32, mode="r", shape=shape) if shape[0] else np.zeros(shape, np.float32)
    return Features(tokens, info["used"], info["unreadable"], key)


def _read_info(rows_path: Path, info_path: Path, shape: tuple[int, int]) -> tuple[dict[str, Any] | None, str]:
    """What the .json says, or None and what is wrong with the cache."""
    try:
        info = json.loads(info_path.read_text())
        rows, *row_shape = info["shape"]
        size, checksum = 4 * rows * shape[0] * shape[1], info["checksum"]
        if tuple(row_shape) != shape:
            return None, f"holds features of shape {row_shape}, not {list(shape)}"
    except (ValueError, KeyError, TypeError):
        return None, "has a damaged description"
    if not rows_path.exists():
        return None, "is missing"
    if rows_path.stat().st_size != size:
        return None, f"has {rows_path.stat().st_size} bytes instead of {size}"
    if _crc32(rows_path) != checksum:
        return None, "is damaged (its checksum does not match)"
    return info, ""


def _crc32(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def _key(backbone: Backbone, image_size: int, paths: Sequence[Path]) -> str:
    digest = hashlib.sha256(f"{_FORMAT} {backbone.fingerprint()} {image_size}\n".encode())
    for path in paths:
        digest.update((sha256_of_file(path) if path.is_file() else f"missing {path}").encode())
    return digest.hexdigest()[:32]
