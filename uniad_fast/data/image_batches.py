"""Image files in batches of tensors, read ahead: each file is read once, and one that can't be read stops nothing."""

import hashlib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..printable import printable
from .images import UnreadableImage, decode, read_bytes, to_tensor

BATCH = 32


@dataclass(frozen=True)
class Failure:
    """An image that could not be read: its position, why, and whether that may pass (a share's hiccup, a race)."""

    position: int
    reason: str
    passing: bool = False

    def message(self, paths: Sequence[Path]) -> str:
        """For the list of paths that the position is in."""
        return f"{printable(paths[self.position])}: {self.reason}"


@dataclass(frozen=True)
class ImageBatch:
    """Some images, read: `images` [len(used), 3, S, S]; `used` are positions among the `size` paths asked for.

    notes: (position, remark) of images that are not shown quite as they are.
    """

    images: Tensor
    used: list[int]
    failures: list[Failure]
    size: int
    notes: list[tuple[int, str]] = field(default_factory=list)


def read_batches(
    paths: Sequence[Path], image_size: int, batch_size: int = BATCH, digests: Sequence[str | None] | None = None
) -> Iterator[ImageBatch]:
    """Read the images in order, the next batch while the caller works on the last.

    digests: the SHA-256 that each file should have; one that has another has changed meanwhile, and is a failure.
    """

    def read(index: int) -> tuple[Tensor, str | None] | Failure:
        path, position = paths[index], index % batch_size
        try:
            content = read_bytes(path)
            if digests is not None and hashlib.sha256(content).hexdigest() != digests[index]:
                return Failure(position, "it changed while it was being read", passing=True)
            image = decode(content, path)
            return to_tensor(image, image_size), image.info.get("note")
        except UnreadableImage as error:
            # What was unreadable from the start is known by its digest, which then is none.
            passing = error.passing and digests is not None and digests[index] is not None
            return Failure(position, str(error).removeprefix(f"{printable(path)}: "), passing)

    indices = range(len(paths))
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        ahead = deque(pool.submit(read, index) for index in indices[:batch_size])
        try:
            for start in range(0, len(paths), batch_size):
                ahead.extend(pool.submit(read, i) for i in indices[start + batch_size : start + 2 * batch_size])
                results = [ahead.popleft().result() for _ in indices[start : start + batch_size]]
                read_ones = [(i, r) for i, r in enumerate(results) if not isinstance(r, Failure)]
                yield ImageBatch(
                    torch.stack([tensor for _, (tensor, _) in read_ones])
                    if read_ones
                    else torch.zeros(0, 3, image_size, image_size),
                    [position for position, _ in read_ones],
                    [result for result in results if isinstance(result, Failure)],
                    len(results),
                    [(position, note) for position, (_, note) in read_ones if note],
                )
        finally:
            for future in ahead:  # a caller that has had enough does not wait for what was read ahead
                future.cancel()
