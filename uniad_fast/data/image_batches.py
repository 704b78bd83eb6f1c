"""Image files in batches of tensors, read ahead: each file is read once, and one that can't be read stops nothing."""

import hashlib
import os
import threading
import time
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ..image_size import ImageSize, size_of
from ..printable import printable
from .images import ImageLike, UnreadableImage, as_image, decode, pixels_of, read_bytes, to_tensor

BATCH = 32
_PIXELS_AT_A_TIME = 64_000_000  # of decoded images: 192 MB


@dataclass(frozen=True)
class Failure:
    """An image that could not be read: its position, why, and whether that may pass (a share's hiccup, a race)."""

    position: int
    reason: str
    passing: bool = False

    def message(self, images: Sequence[ImageLike]) -> str:
        """For the list of images that the position is in."""
        image = images[self.position]
        return f"{printable(image)}: {self.reason}" if isinstance(image, (str, os.PathLike)) else self.reason


@dataclass(frozen=True)
class ImageBatch:
    """Some images, read: `images` [len(used), 3, height, width]; `used` are positions among the `size` paths asked for.

    sizes: (height, width) in pixels of the upright images of `used`.
    pictures: these images, where they were asked for.
    notes: (position, remark) of images that are not shown quite as they are.
    opened: when each of `used` was begun to be read, by `time.perf_counter`.
    """

    images: Tensor
    used: list[int]
    failures: list[Failure]
    size: int
    sizes: list[tuple[int, int]] = field(default_factory=list)
    pictures: list[Image.Image] = field(default_factory=list)
    notes: list[tuple[int, str]] = field(default_factory=list)
    opened: list[float] = field(default_factory=list)


class _Read(NamedTuple):
    tensor: Tensor
    size: tuple[int, int]
    picture: Image.Image | None
    note: str | None
    pixels: int
    opened: float


def read_batches(
    images: Sequence[ImageLike],
    image_size: ImageSize | None,
    batch_size: int = BATCH,
    *,
    digests: Sequence[str | None] | None = None,
    keep_pictures: bool = False,
) -> Generator[ImageBatch, None, None]:
    """Read the images in order, the next batch while the caller works on the last.

    Args:
        images: files, or what is in memory already, see `as_image`.
        image_size: (height, width) that they are resized to, or the side of a square; None leaves the batch without
            tensors.
        digests: the SHA-256 that each file should have; one that has another has changed meanwhile, and is a failure.
        keep_pictures: give the decoded images too. Where they are large, a batch has fewer, and less is read ahead,
            so that memory stays bounded.
    """
    gate = _Gate(_PIXELS_AT_A_TIME)

    def read(index: int) -> _Read | Failure:
        path, pixels, opened = images[index], 0, time.perf_counter()
        try:
            if not isinstance(path, (str, os.PathLike)):
                return _decoded(as_image(path), image_size, keep_pictures, 0, opened)
            content = read_bytes(path)
            if digests is not None and hashlib.sha256(content).hexdigest() != digests[index]:
                return Failure(0, "it changed while it was being read", passing=True)
            pixels = gate.enter(index, pixels_of(content)) if keep_pictures else 0
            return _decoded(decode(content, path), image_size, keep_pictures, pixels, opened)
        except UnreadableImage as error:
            gate.leave(pixels)
            # What was unreadable from the start is known by its digest, which then is none.
            passing = error.passing and digests is not None and digests[index] is not None
            return Failure(0, str(error).removeprefix(f"{printable(path)}: "), passing)

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        waiting = iter(range(len(images)))
        ahead = deque(pool.submit(read, index) for index in islice(waiting, batch_size))
        done = 0
        try:
            while done < len(images):
                results: list[_Read | Failure] = []
                held = 0
                while len(results) < batch_size and ahead and held < _PIXELS_AT_A_TIME:
                    gate.expect(done + len(results))
                    results.append(ahead.popleft().result())
                    held += 0 if isinstance(results[-1], Failure) else results[-1].pixels
                    ahead.extend(pool.submit(read, index) for index in islice(waiting, 1))
                done += len(results)
                yield _batch(results, image_size)
                gate.leave(held)
        finally:
            gate.open()
            for future in ahead:  # a caller that has had enough does not wait for what was read ahead
                future.cancel()


def _decoded(image: Image.Image, image_size: ImageSize | None, keep: bool, pixels: int, opened: float) -> _Read:
    size, note = (image.height, image.width), image.info.get("note")
    tensor = torch.zeros(0) if image_size is None else to_tensor(image, image_size)
    return _Read(tensor, size, image if keep else None, note, pixels, opened)


def _batch(results: Sequence[_Read | Failure], image_size: ImageSize | None) -> ImageBatch:
    read = {position: result for position, result in enumerate(results) if not isinstance(result, Failure)}
    tensors = [one.tensor for one in read.values()]
    return ImageBatch(
        torch.stack(tensors) if tensors else torch.zeros(0, 3, *size_of(image_size or 0)),
        list(read),
        [replace(result, position=i) for i, result in enumerate(results) if isinstance(result, Failure)],
        len(results),
        [one.size for one in read.values()],
        [one.picture for one in read.values() if one.picture is not None],
        [(position, one.note) for position, one in read.items() if one.note],
        [one.opened for one in read.values()],
    )


class _Gate:
    """Lets decoded images in until they are too many pixels together; the one that is waited for always goes in."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held = 0
        self._expected = 0
        self._is_open = False
        self._changed = threading.Condition()

    def enter(self, index: int, pixels: int) -> int:
        """Wait until there is room for image number `index`, and give its pixels back."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_open or index <= self._expected or self._held + pixels <= self._most
            )
            self._held += pixels
        return pixels

    def expect(self, index: int) -> None:
        """Somebody waits for this image."""
        with self._changed:
            self._expected = index
            self._changed.notify_all()

    def leave(self, pixels: int) -> None:
        """So many pixels are not held any more."""
        with self._changed:
            self._held -= pixels
            self._changed.notify_all()

    def open(self) -> None:
        """Let everything in: nobody waits any more."""
        with self._changed:
            self._is_open = True
            self._changed.notify_all()
