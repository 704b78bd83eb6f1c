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
import sys
import time
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UniadFastError
from ..files import atomic_path, locked, sha256_of_file
from ..image_size import ImageSize, in_words
from ..models.backbone import Backbone
from ..printable import printable
from ..progress import progress
from ..signals import stop_if_asked
from .image_batches import Failure, ImageBatch, read_batches

_FORMAT = 2  # part of the key: raise it when preprocessing or layout change
_FORGOTTEN = 14 * 24 * 3600  # seconds after which an unfinished extraction is not gone on with


class CacheError(UniadFastError):
    """Features can't be kept where they should be; says what to do."""


@dataclass(frozen=True)
class Features:
    """Features of some images.

    Attributes:
        tokens: [images, N, C] float32, memory-mapped.
        used: the index of each row's path.
        unreadable: a message for each image that has no row.
        key: what they are recognised by.
        notes: remarks on images that are not shown quite as they are.
    """

    tokens: NDArray
    used: list[int]
    unreadable: list[str]
    key: str
    notes: list[str] = field(default_factory=list)


def default_cache_dir() -> Path:
    """Where features are kept when nothing is said: the user's cache folder."""
    from platformdirs import user_cache_path

    try:
        return user_cache_path("uniad_fast", appauthor=False)
    except RuntimeError:  # no home, and a user that the system does not know
        raise CacheError("there is no home folder to keep features in: say where with --cache FOLDER") from None


def cached_features(
    backbone: Backbone,
    image_size: ImageSize,
    paths: Sequence[Path],
    cache_dir: str | os.PathLike | None = None,
    description: str = "features",
    quiet: bool = False,
) -> Features:
    """Features of the images at `paths`, in order, from the cache or extracted into it.

    Unreadable images are left out and listed, and so are those whose features are not finite. A cache that is damaged,
    or that lacks an image for a reason that may have passed, is made anew, with a warning.

    Raises:
        CacheError: there is no folder to keep them in.
        Stopped: a signal asked for it, between two batches; what is done is kept.
    """
    directory = Path(cache_dir) if cache_dir else default_cache_dir()
    height, width = backbone.feature_size(image_size)
    shape = (height * width, backbone.channels)
    digests = [_digest(path) for path in paths]
    key = _key(backbone, image_size, paths, digests)
    rows_path, info_path = directory / f"{key}.f32", directory / f"{key}.json"
    with _lock(directory, key, info_path) as writable:
        if info_path.exists():
            info, problem = _read_info(rows_path, info_path, key, len(paths), shape)
            if info is not None:
                return _open(rows_path, info, paths, key)
            warnings.warn(f"the feature cache {rows_path} {problem}: extracting again", stacklevel=2)
            if writable:
                info_path.unlink()
        if not writable:
            raise CacheError(f"{directory} can't be written to: keep features elsewhere with --cache FOLDER")
        partial = _PartialCache(directory, key, len(paths), shape)
        with progress(description, len(paths), initial=partial.done, quiet=quiet) as bar:
            rest = slice(partial.done, None)
            for batch in read_batches(paths[rest], image_size, digests=digests[rest]):
                partial.append(*finite_tokens(batch, backbone), batch)
                bar.update(batch.size)
                stop_if_asked()
        partial.finish(rows_path, info_path, shape)
        return _open(rows_path, json.loads(info_path.read_text(encoding="utf-8")), paths, key)


def tokens_of(batch: ImageBatch, backbone: Backbone) -> NDArray:
    """[len(batch.used), N, C] float32."""
    if not batch.used:
        return np.zeros((0, 1, 1), dtype=np.float32)
    return backbone(batch.images.to(backbone.mean.device)).flatten(2).transpose(1, 2).cpu().numpy()


def finite_tokens(batch: ImageBatch, backbone: Backbone) -> tuple[NDArray, list[int], list[Failure]]:
    """(tokens, positions, failures) of a batch, those whose features are not finite among the failures."""
    tokens = tokens_of(batch, backbone)
    finite = np.isfinite(tokens).all(axis=(1, 2))
    failures = list(batch.failures)
    failures += [Failure(batch.used[i], "its features are not finite") for i in np.flatnonzero(~finite)]
    failures.sort(key=lambda failure: failure.position)
    return tokens[finite], [position for position, good in zip(batch.used, finite, strict=True) if good], failures


@contextlib.contextmanager
def _lock(directory: Path, key: str, info_path: Path) -> Iterator[bool]:
    """Whether the cache may be written: while inside, by this process alone. A finished one can be read anyway."""
    path = directory / f"{key}.lock"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _forget_old(directory)
        waiting = locked(path, wait=False)
        held = waiting.__enter__()
    except OSError as error:
        if not info_path.exists():
            raise CacheError(
                f"{directory} can't be used to keep features ({error.strerror}): say another with --cache FOLDER"
            ) from None
        yield False
        return
    if held:
        try:
            yield True
        finally:
            waiting.__exit__(None, None, None)
        return
    print("another process is extracting these features: waiting for it", file=sys.stderr)
    with locked(path):
        yield True


def _forget_old(directory: Path) -> None:
    """Unfinished extractions that nobody has gone on with for two weeks."""
    for path in directory.glob("*.partial.*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _FORGOTTEN:
                path.unlink()


class _PartialCache:
    """A cache being made: rows are appended, and after them how far it got is written down."""

    def __init__(self, directory: Path, key: str, images: int, shape: tuple[int, int]) -> None:
        self._rows_path = directory / f"{key}.partial.f32"
        self._state_path = directory / f"{key}.partial.json"
        self._key, self._images = key, images
        self._state: dict[str, Any] = {"done": 0, "used": [], "failed": [], "notes": [], "checksum": 0}
        self._row_bytes = 4 * shape[0] * shape[1]
        if self._rows_path.exists() and self._state_path.exists():
            state = _json(self._state_path)
            # Rows that were written after the last note are cut off and extracted again; what is damaged starts anew.
            if (
                _is_state(state, images)
                and _crc32(self._rows_path, self._row_bytes * len(state["used"])) == state["checksum"]
            ):
                self._state = state
        with open(self._rows_path, "ab") as file:
            file.truncate(len(self._state["used"]) * self._row_bytes)

    @property
    def done(self) -> int:
        """Paths dealt with."""
        return self._state["done"]

    def append(self, tokens: NDArray, used: list[int], failures: list[Failure], batch: ImageBatch) -> None:
        rows = np.ascontiguousarray(tokens, dtype=np.float32).tobytes() if used else b""
        with open(self._rows_path, "ab") as file:
            file.write(rows)
            file.flush()
            os.fsync(file.fileno())
        state = self._state
        state["used"] += [self.done + position for position in used]
        state["failed"] += [[self.done + f.position, f.reason, f.passing] for f in failures]
        state["notes"] += [[self.done + position, note] for position, note in batch.notes]
        state["checksum"] = zlib.crc32(rows, state["checksum"])
        state["done"] += batch.size
        with atomic_path(self._state_path) as path:
            path.write_text(json.dumps(state), encoding="utf-8")

    def finish(self, rows_path: Path, info_path: Path, shape: tuple[int, int]) -> None:
        self._rows_path.replace(rows_path)
        info = self._state | {"key": self._key, "images": self._images, "shape": [len(self._state["used"]), *shape]}
        with atomic_path(info_path) as path:
            path.write_text(json.dumps(info), encoding="utf-8")
        self._state_path.unlink(missing_ok=True)  # there is none of no images


def _is_state(state: Any, images: int) -> bool:
    """Whether `_PartialCache` could have written this down of so many images: each dealt with is used or has failed."""
    try:
        used, failed, notes = state["used"], state["failed"], state["notes"]
        positions = [*used, *(position for position, _, _ in failed)]
        numbers = [*positions, *(position for position, _ in notes), state["checksum"], state["done"]]
        texts = [*(reason for _, reason, _ in failed), *(note for _, note in notes)]
        return (
            all(type(n) is int and n >= 0 for n in numbers)
            and all(isinstance(text, str) for text in texts)
            and all(isinstance(passing, bool) for _, _, passing in failed)
            and all(position < state["done"] for position, _ in notes)
            and used == sorted(used)
            and state["done"] <= images
            and sorted(positions) == list(range(state["done"]))
        )
    except (KeyError, TypeError, ValueError):
        return False


def _json(path: Path) -> Any:
    """What the file holds; None where it is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _open(rows_path: Path, info: dict[str, Any], paths: Sequence[Path], key: str) -> Features:
    shape = tuple(info["shape"])
    # An empty file can't be mapped.
    tokens = np.memmap(rows_path, dtype=np.float32, mode="r", shape=shape) if shape[0] else np.zeros(shape, np.float32)
    failures = [Failure(position, reason) for position, reason, _ in info["failed"]]
    notes = [f"{printable(paths[position])}: {note}" for position, note in info["notes"]]
    return Features(tokens, info["used"], [failure.message(paths) for failure in failures], key, notes)


def _read_info(
    rows_path: Path, info_path: Path, key: str, images: int, shape: tuple[int, int]
) -> tuple[dict[str, Any] | None, str]:
    """What the .json says, or None and what is wrong with the cache."""
    info = _json(info_path)
    if not _is_state(info, images):
        return None, "has a damaged description"
    if info.get("key") != key or info.get("images") != images or info["done"] != images:
        return None, "is of other images"
    if info.get("shape") != [len(info["used"]), *shape]:
        return None, f"holds features of shape {info.get('shape')}, not {[len(info['used']), *shape]}"
    if any(passing for _, _, passing in info["failed"]):
        return None, "lacks images that could not be read for a reason that may have passed"
    size = 4 * len(info["used"]) * shape[0] * shape[1]
    if not rows_path.exists():
        return None, "is missing"
    if rows_path.stat().st_size != size:
        return None, f"has {rows_path.stat().st_size} bytes instead of {size}"
    if _crc32(rows_path, size) != info["checksum"]:
        return None, "is damaged (its checksum does not match)"
    return info, ""


def _crc32(path: Path, size: int) -> int | None:
    """Of the first `size` bytes of the file; None if it has fewer."""
    checksum = 0
    with open(path, "rb") as file:
        while size > 0:
            chunk = file.read(min(size, 1 << 24))
            if not chunk:
                return None
            checksum, size = zlib.crc32(chunk, checksum), size - len(chunk)
    return checksum


def _digest(path: Path) -> str | None:
    """SHA-256 of the file; None if it can't be read, which the extraction will say."""
    try:
        return sha256_of_file(path)
    except (OSError, ValueError):
        return None


def _key(backbone: Backbone, image_size: ImageSize, paths: Sequence[Path], digests: Sequence[str | None]) -> str:
    hashed = hashlib.sha256(f"{_FORMAT} {backbone.fingerprint()} {in_words(image_size)}\n".encode())
    for path, digest in zip(paths, digests, strict=True):
        hashed.update((digest or f"missing {path}").encode("utf-8", "surrogatepass"))
    return hashed.hexdigest()[:32]
