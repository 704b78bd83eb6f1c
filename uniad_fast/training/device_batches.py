"""A training's batches where the network is: on a GPU all features lie there if they fit, else each batch is sent while
the step before computes.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..rows import TokenRows
from ..signals import stop_if_asked
from .batches import Batch, Batches

_SHARE = 0.4
"""Of a GPU's free memory, what features may take: the rest is for the step."""
_UPLOADED_AT_A_TIME = 64 << 20  # bytes


class DeviceBatches:
    """Like the `Batches` that it reads from, their tokens on `device`; none is sent ahead beyond `steps`."""

    def __init__(self, batches: Batches, device: torch.device, steps: int) -> None:
        self._batches, self._device, self._steps = batches, device, steps
        self._resident = _resident(batches.tokens, device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._sent: tuple[int, Batch, Any] | None = None

    @property
    def are_resident(self) -> bool:
        """Whether all features are on the device."""
        return self._resident is not None

    def at(self, step: int) -> Batch:
        """A step's batch, in the device's order of work; one after the other is what is quick."""
        if self._resident is not None:
            rows, first, own = self._batches.part_of(step)
            return Batch(rows, first, self._resident.index_select(0, _sent(torch.from_numpy(own), self._device)))
        sent = self._sent if self._sent is not None and self._sent[0] == step else self._send(step)
        _, batch, arrived = sent
        if arrived is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(arrived)
            batch.tokens.record_stream(current)
        self._sent = None if self._stream is None or step + 1 >= self._steps else self._send(step + 1)
        return batch

    def _send(self, step: int) -> tuple[int, Batch, Any]:
        batch = self._batches.at(step)
        if self._stream is None:
            return step, batch._replace(tokens=batch.tokens.to(self._device)), None
        with torch.cuda.stream(self._stream):
            batch = batch._replace(tokens=_sent(batch.tokens, self._device))
            return step, batch, self._stream.record_event()


def _resident(tokens: TokenRows, device: torch.device) -> Tensor | None:
    """All of [images, N, C] in float32 on a GPU; None where there is none, or no room."""
    if device.type != "cuda":
        return None
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if int(np.prod(tokens.shape)) * 4 > _SHARE * free:
        return None
    return uploaded(tokens, device)


def uploaded(tokens: TokenRows, device: torch.device) -> Tensor:
    """Tokens [images, N, C] in float32 on a device, sent some at a time; `Stopped` where a signal asked for it."""
    found = torch.empty(tokens.shape, dtype=torch.float32, device=device)
    at_a_time = max(1, _UPLOADED_AT_A_TIME // max(1, found[:1].nbytes))
    for start in range(0, len(tokens), at_a_time):
        stop_if_asked()
        part = np.ascontiguousarray(tokens[start : min(start + at_a_time, len(tokens))], np.float32)
        found[start : start + len(part)].copy_(torch.from_numpy(part))
    return found


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device, which reads it from pinned memory by itself; torch keeps that as long as it is read."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
