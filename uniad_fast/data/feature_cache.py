"""Features of many images: extracted once, kept in files of a bounded size, used again by the next run.

The backbone is frozen and the paper trains without augmentation, so an image's features never change. A cache is a
folder KEY of shards (`feature_shards`), each of some images in a row. KEY is a hash of what the features depend on:
backbone, levels and weights, image size, precision, and the content of every image. A shard is whole or not there, so
an interrupted extraction goes on with the next one, and a damaged one is made again alone.

Each shard has a lock: processes that extract the same features at the same time, on one machine or on several with a
common folder, share the work, however many they are, and go on with what one that died has left.
"""

import contextlib
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import UniadFastError
from ..files import locked, sweep
from ..image_size import ImageSize, size_of
from ..models.backbone import Backbone
from ..printable import printable
from ..progress import progress
from ..signals import stop_if_asked
from .feature_shards import PRECISIONS, FeatureShards, Shard, read_shard, write_shard
from .features import Features, digest, finite_tokens, key_of
from .image_batches import Failure, ImageBatch, read_batches
from .tiling import Plan, Tiles, Tiling, read_tiles

_SHARD_BYTES, _SHARD_IMAGES = 1 << 24, 64  # at most: what an interruption loses
_FORGOTTEN = 14 * 24 * 3600  # seconds after which an unfinished extraction is not gone on with
_SHARE_OF_DISK = 0.9  # of what is free, that features may take
_WAIT = 0.5  # seconds between two looks at what other processes do


class CacheError(UniadFastError):
    """Features can't be kept where they should be; says what to do."""


class NoRoom(CacheError):
    """There is less room on the disk than features need."""


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
    *,
    precision: str = "float32",
    overlap: float | None = None,
) -> Features:
    """Features of the images at `paths`, in order, from the cache or extracted into it.

    Unreadable images are left out and listed, and so are those whose features are not finite. A shard that is damaged,
    or that lacks an image for a reason that may have passed, is made anew, with a warning.

    Args:
        precision: in which they are kept, a key of `PRECISIONS`.
        overlap: cut images in tiles of `image_size`, see `Tiling`, each of which has a row; None resizes them to it.

    Raises:
        CacheError: there is no folder to keep them in; NoRoom, where its disk is too full.
        Stopped: a signal asked for it, between two batches; shards that are done are kept.
    """
    folder = Path(cache_dir) if cache_dir else default_cache_dir()
    tiling = None if overlap is None else Tiling(size_of(image_size), overlap)
    return _Extraction(backbone, image_size, paths, folder, precision, tiling).run(description, quiet)


class _Extraction:
    """The features of some images, or of their tiles, as far as they are in a folder. A row is one's features."""

    def __init__(
        self,
        backbone: Backbone,
        image_size: ImageSize,
        paths: Sequence[Path],
        directory: Path,
        precision: str,
        tiling: Tiling | None,
    ) -> None:
        self.backbone, self.image_size, self.paths, self.precision = backbone, image_size, paths, precision
        self.tiling = tiling
        self.plan = None if tiling is None else Plan.of(paths, tiling)
        self.rows = len(paths) if self.plan is None else len(self.plan.images)
        height, width = backbone.feature_size(image_size)
        self.row = (height * width, backbone.channels)
        self.digests = [digest(path) for path in paths]
        self.key = key_of(backbone, image_size, precision, paths, self.digests, tiling)
        self.folder = directory / self.key
        self.row_bytes = self.row[0] * self.row[1] * PRECISIONS[precision].itemsize
        self.at_once = max(1, min(_SHARD_BYTES // self.row_bytes, _SHARD_IMAGES))
        self.count = -(-self.rows // self.at_once)
        self.found: dict[int, Shard] = {}

    def run(self, description: str, quiet: bool) -> Features:
        waiting = [number for number in range(self.count) if not self._look(number, may_be_missing=True)]
        if waiting:
            missing = sum(len(self._rows(number)) for number in waiting)
            self._make_room(missing * self.row_bytes)
            unit = "image" if self.plan is None else "tile"
            with progress(description, self.rows, self.rows - missing, unit, quiet) as bar:
                self._make_all(waiting, bar)
            for lock in self.folder.glob("*.lock"):  # whoever still waits for one finds all there
                with contextlib.suppress(OSError):
                    lock.unlink()
        return self._features()

    def _make_all(self, waiting: list[int], bar: tqdm) -> None:
        """Make what is missing; what another process is at is left to it, and looked at again later."""
        while waiting:
            left = []
            for number in waiting:
                with locked(self._path(number).with_suffix(".lock"), wait=False) as ours:
                    if not ours:
                        left.append(number)
                    elif not self._look(number, may_be_missing=True, warns=False):
                        self._make(number, bar)
                        continue
                if ours:
                    bar.update(len(self._rows(number)))
            if len(left) == len(waiting):
                time.sleep(_WAIT)
                stop_if_asked()
            waiting = left

    def _make(self, number: int, bar: tqdm) -> None:
        """Extract a shard."""
        own = self._rows(number)
        parts: list[Tensor] = []
        info: dict[str, Any] = {"key": self.key, "first": own.start, "images": len(own)}
        used, failed, notes, done = list[int](), list[list[Any]](), list[list[Any]](), 0
        for batch in self._read(own):
            tokens, positions, failures = finite_tokens(batch, self.backbone, self.precision)
            parts += [tokens] if positions else []
            used += [done + position for position in positions]
            failed += [[done + f.position, f.reason, f.passing] for f in failures]
            notes += [[done + position, note] for position, note in batch.notes]
            done += batch.size
            bar.update(batch.size)
            stop_if_asked()
        rows = torch.cat(parts) if parts else torch.zeros(0, *self.row, dtype=PRECISIONS[self.precision])
        path = self._path(number)
        try:
            write_shard(path, rows, info | {"used": used, "failed": failed, "notes": notes})
        except OSError as error:
            raise CacheError(f"{path} can't be written ({error.strerror}): {_ELSEWHERE}") from None
        shard, problem = read_shard(path, *self.row, self.precision)
        if shard is None:
            raise CacheError(f"{path} {problem} right after it was written: {_ELSEWHERE}")
        self.found[number] = shard

    def _read(self, own: range) -> Iterator[ImageBatch]:
        if self.plan is not None and self.tiling is not None:
            return read_tiles(self.paths, self.tiling, self.plan, own, self.digests)
        part = slice(own.start, own.stop)
        return read_batches(self.paths[part], self.image_size, digests=self.digests[part])

    def _look(self, number: int, may_be_missing: bool, warns: bool = True) -> bool:
        """Whether the shard is there and whole; warns where it is there and is not."""
        shard, problem = read_shard(self._path(number), *self.row, self.precision)
        if shard is not None:
            problem = self._problem(number, shard.info)
        if shard is not None and not problem:
            self.found[number] = shard
            return True
        if warns and not (may_be_missing and problem == "is missing"):
            warnings.warn(f"features in {self._path(number)}: it {problem}: extracting again", stacklevel=5)
        return False

    def _problem(self, number: int, info: Any) -> str:
        """What is wrong with the description of a shard, or nothing."""
        own = self._rows(number)
        if not _is_description(info):
            return "has a damaged description"
        if (info["key"], info["first"], info["images"]) != (self.key, own.start, len(own)):
            return "is of other images"
        if any(passing for _, _, passing in info["failed"]):
            return "lacks images that could not be read for a reason that may have passed"
        return ""

    def _make_room(self, needed: int) -> None:
        """A folder that can be written to, on a disk with so many bytes left."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _forget_old(self.folder.parent)
            probe = self.folder / "writable.lock"
            with locked(probe, wait=False):
                free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise CacheError(
                f"{self.folder.parent} can't be used to keep features ({error.strerror}): {_ELSEWHERE}"
            ) from None
        if needed > _SHARE_OF_DISK * free:
            raise NoRoom(
                f"features of these images need {needed / 1e9:.1f} GB, and {self.folder.parent} has room for "
                f"{free / 1e9:.1f} GB"
            )
        for number in range(self.count):
            sweep(self._path(number))

    def _rows(self, number: int) -> range:
        return range(number * self.at_once, min((number + 1) * self.at_once, self.rows))

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}-of-{self.count:06d}.safetensors"

    def _features(self) -> Features:
        shards = [self.found[number] for number in range(self.count)]
        used: list[int] = []
        failures: list[Failure] = []
        notes: list[str] = []
        for number, shard in enumerate(shards):
            first = self._rows(number).start
            used += [first + position for position in shard.info["used"]]
            failures += [Failure(first + position, reason) for position, reason, _ in shard.info["failed"]]
            notes += [f"{self._name(first + position)}: {note}" for position, note in shard.info["notes"]]
        tokens = FeatureShards(shards, *self.row, self.precision)
        if self.plan is None:
            return Features(tokens, used, [one.message(self.paths) for one in failures], self.key, notes)
        messages = dict.fromkeys(f"{self._name(one.position)}: {one.reason}" for one in failures)  # one an image
        assert self.tiling is not None
        tiles = Tiles(self.tiling, [self.plan.corners[row] for row in used], self.plan.sizes)
        images = [self.plan.images[row] for row in used]
        return Features(tokens, images, list(messages), self.key, list(dict.fromkeys(notes)), tiles)

    def _name(self, row: int) -> str:
        return printable(self.paths[row if self.plan is None else self.plan.images[row]])


_ELSEWHERE = "say another with --cache FOLDER, or keep none with --no-cache"


def _forget_old(directory: Path) -> None:
    """Unfinished extractions that nobody has gone on with for two weeks, also those of earlier releases."""
    for path in directory.glob("*.partial.*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _FORGOTTEN:
                path.unlink()
    for folder in directory.iterdir():
        with contextlib.suppress(OSError, ValueError, StopIteration):
            shards = list(_shards_in(folder))
            wanted = int(shards[0].stem.rpartition("-")[2]) if shards else -1
            if len(shards) < wanted and time.time() - max(s.stat().st_mtime for s in shards) > _FORGOTTEN:
                shutil.rmtree(folder)


def _shards_in(folder: Path) -> Iterator[Path]:
    return folder.glob("??????-of-??????.safetensors")


def _is_description(info: Any) -> bool:
    """Whether a shard could have been written with this: each of its images is used or has failed."""
    try:
        used, failed, notes = info["used"], info["failed"], info["notes"]
        positions = [*used, *(position for position, _, _ in failed)]
        numbers = [*positions, *(position for position, _ in notes), info["first"], info["images"]]
        texts = [*(reason for _, reason, _ in failed), *(note for _, note in notes), info["key"]]
        return (
            all(type(n) is int and n >= 0 for n in numbers)
            and all(isinstance(text, str) for text in texts)
            and all(isinstance(passing, bool) for _, _, passing in failed)
            and all(position < info["images"] for position, _ in notes)
            and used == sorted(used)
            and sorted(positions) == list(range(info["images"]))
        )
    except (KeyError, TypeError, ValueError):
        return False
