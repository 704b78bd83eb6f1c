"""Shards of a feature cache: safetensors files of some rows each, in float32 or half of that, with a checksum inside.

A safetensors file is a header that says where the values lie, and the values as they are: a row is read with one call,
whatever else is in the file, and any other program that knows the format reads it too.
"""

import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UniadFastError
from ..files import atomic_path
from ..rows import row_numbers

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_TENSOR, _INFO = "tokens", "info"
_LONGEST_HEADER = 1 << 26
_CHUNK = 1 << 22


class Shard(NamedTuple):
    """A file with `rows` rows from `offset` bytes on; `info` is what was written with them."""

    path: Path
    rows: int
    offset: int
    info: dict[str, Any]


def write_shard(path: Path, tokens: Tensor, info: dict[str, Any]) -> None:
    """Write rows [rows, N, C] in the dtype that they have, and a description (JSON values) with their checksum."""
    tokens = tokens.contiguous()
    checksum = zlib.crc32(tokens.view(torch.uint8).numpy().data) if tokens.numel() else 0
    text = json.dumps(info | {"checksum": checksum})
    with atomic_path(path) as partial:
        save_file({_TENSOR: tokens}, partial, {_INFO: text})


def read_shard(path: Path, places: int, channels: int, precision: str) -> tuple[Shard | None, str]:
    """The shard, its checksum verified, or None and what is wrong with it."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _LONGEST_HEADER:
                return None, f"has a header of {length} bytes"
            header = json.loads(file.read(length))
            entry, info = header[_TENSOR], json.loads(header["__metadata__"][_INFO])
            start, end = entry["data_offsets"]
            found = [_NAMES.get(entry["dtype"]), *entry["shape"][1:]]
            rows, row_bytes = entry["shape"][0], places * channels * PRECISIONS[precision].itemsize
            if found != [precision, places, channels] or start != 0 or end != rows * row_bytes:
                return None, f"holds features of {found}, not {[precision, places, channels]}"
            size = os.fstat(file.fileno()).st_size
            if size != 8 + length + end:
                return None, f"has {size} bytes instead of {8 + length + end}"
            checksum = 0
            while chunk := file.read(_CHUNK):
                checksum = zlib.crc32(chunk, checksum)
            if checksum != info["checksum"]:
                return None, "is damaged (its checksum does not match)"
    except (FileNotFoundError, NotADirectoryError):
        return None, "is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        return None, f"is damaged ({type(error).__name__})"
    return Shard(path, rows, 8 + length, info), ""


class FeatureShards:
    """Rows [images, N, C] of shards one after the other, read when they are asked for, as float32.

    They are read, not mapped: what is held is what was asked for, under any limit of memory.
    """

    def __init__(self, shards: Sequence[Shard], places: int, channels: int, precision: str) -> None:
        self._shards = list(shards)
        self._ends = np.cumsum([shard.rows for shard in shards], dtype=np.int64)
        self._dtype = PRECISIONS[precision]
        self._row = (places, channels)
        self._pool: ThreadPoolExecutor | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        return (int(self._ends[-1]) if len(self._ends) else 0, *self._row)

    @property
    def nbytes(self) -> int:
        """Of all rows in the files."""
        return self.shape[0] * self._row_bytes

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> NDArray:
        if isinstance(rows, (int, np.integer)):
            return self._read(row_numbers([rows], len(self)))[0]
        return self._read(row_numbers(rows, len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray:
        return np.asarray(self[:], dtype=dtype)

    def begin_reading(self, rows: NDArray) -> Callable[[], NDArray]:
        """Read rows on a thread of its own; what is given back waits for them."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="features")
        return self._pool.submit(self._read, row_numbers(rows, len(self))).result

    @property
    def _row_bytes(self) -> int:
        return self._row[0] * self._row[1] * self._dtype.itemsize

    def _read(self, numbers: NDArray) -> NDArray:
        """Of any order, each shard's in the order of the file."""
        tokens = torch.empty(len(numbers), *self._row, dtype=self._dtype)
        if not len(numbers):
            return tokens.float().numpy()
        values = tokens.flatten(1).view(torch.uint8).numpy()
        order = np.argsort(numbers, kind="stable")
        for shard, targets in self._by_shard(numbers, order):
            first = int(self._ends[shard]) - self._shards[shard].rows
            self._read_from(self._shards[shard], [(int(numbers[t]) - first, values[t]) for t in targets])
        return tokens.float().numpy()

    def _by_shard(self, numbers: NDArray, order: NDArray) -> Iterator[tuple[int, NDArray]]:
        shards = np.searchsorted(self._ends, numbers[order], side="right")
        for shard in np.unique(shards).tolist():
            yield shard, order[shards == shard]

    def _read_from(self, shard: Shard, wanted: Sequence[tuple[int, NDArray]]) -> None:
        with open(shard.path, "rb", buffering=0) as file:
            for row, target in wanted:
                file.seek(shard.offset + row * self._row_bytes)
                view, done = target.data, 0
                while done < len(view):
                    count = file.readinto(view[done:])
                    if not count:
                        raise UniadFastError(f"{shard.path} was cut short while it was being read")
                    done += count
