"""Processes that work together, on one machine or several, as torchrun and its like start them.

torch.distributed does the work: gloo on processors, NCCL on GPUs. What is here says who this process is, how work is
shared, and how the others wait for one without a hang: a collective ends with an error after `TIMEOUT`, so what may
take longer is waited for by looking at the store.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import UniadFastError

T = TypeVar("T")
TIMEOUT = timedelta(seconds=60)
"""After which a process that is not heard of ends the others."""
_START = timedelta(minutes=10)  # machines do not start at once
_LOOK = 0.2  # seconds
_OF_SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


class ProcessError(UniadFastError):
    """Another process has failed, or is not there."""


class Processes:
    """This process, number `rank` of `count`.

    Alone, it is number 0 of 1, and nothing here does anything.
    """

    def __init__(self, rank: int = 0, count: int = 1, store: Any = None) -> None:
        self.rank, self.count = rank, count
        self._store = store
        self._waited = 0

    @property
    def is_first(self) -> bool:
        """Whether it writes what there is to write."""
        return self.rank == 0

    @property
    def part(self) -> tuple[int, int]:
        return self.rank, self.count

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes, in place."""
        if self.count > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def from_first(self, work: Callable[[], T]) -> T:
        """What the first process's work gives, to all of them; they wait as long as it takes.

        Raises:
            ProcessError: in the others, where it raised an error.
        """
        if self.count == 1:
            return work()
        content: list[Any] = [None]
        if self.is_first:
            try:
                content = [("done", work())]
            except BaseException as error:
                self._tell([("failed", f"{type(error).__name__}: {error}")])
                raise
        self._tell(content)
        kind, found = content[0]
        if kind == "failed":
            raise ProcessError(f"the first process failed: {found}")
        return found

    def gather(self, found: T) -> list[T]:
        """What every process found, by rank; they wait for the slowest as long as it takes."""
        if self.count == 1:
            return [found]
        self.wait()
        every: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(every, found)
        return every

    def wait(self) -> None:
        """For all to come here, as long as it takes."""
        if self.count == 1:
            return
        self._waited += 1
        key = f"waited {self._waited}"
        self._store.add(key, 1)
        while self._store.add(key, 0) < self.count:
            time.sleep(_LOOK)

    def _tell(self, content: list[Any]) -> None:
        self.wait()
        torch.distributed.broadcast_object_list(content, src=0)


ALONE = Processes()
"""No others."""
_current = ALONE


def current() -> Processes:
    """The processes that this one works with."""
    return _current


@contextlib.contextmanager
def joined() -> Iterator[Processes]:
    """Inside, this process works with the others that it was started with; alone, where it was started alone.

    Read are the variables of torchrun (accelerate's are the same), or SLURM's where MASTER_ADDR and MASTER_PORT say
    where the first process is.

    Raises:
        ProcessError: the others are not there.
    """
    global _current
    rank, count = started_as()
    if count == 1 or _current is not ALONE:
        yield _current
        return
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available()
    try:
        if on_gpu:
            torch.cuda.set_device(int(_variable("LOCAL_RANK") or 0) % torch.cuda.device_count())
        for name, value in (("RANK", rank), ("WORLD_SIZE", count)):
            os.environ.setdefault(name, str(value))
        store, _, _ = next(dist.rendezvous("env://", timeout=_START))
        store.set_timeout(TIMEOUT)
        # torchrun's own store outlives a restart, with the addresses of those who are gone.
        attempt = f"uniad_fast {os.environ.get('TORCHELASTIC_RESTART_COUNT')} {count}"
        options: dict[str, Any] = {"rank": rank, "world_size": count, "timeout": TIMEOUT}
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo", store=dist.PrefixStore(attempt, store), **options
        )
    except (RuntimeError, ValueError, KeyError) as error:
        raise ProcessError(f"process {rank} of {count} can't reach the others: {error}") from error
    _current = Processes(rank, count, dist.PrefixStore(f"{attempt} waits", store))
    try:
        yield _current
        _current.wait()
    finally:
        _current = ALONE
        dist.destroy_process_group()


def started_as() -> tuple[int, int]:
    """(rank, count) that this process was started as; (0, 1) alone."""
    try:
        rank, count = (int(_variable(name) or default) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    except ValueError as error:
        raise ProcessError(f"RANK and WORLD_SIZE must be numbers: {error}") from None
    if not 0 <= rank < max(count, 1):
        raise ProcessError(f"RANK {rank} is not one of WORLD_SIZE {count}")
    return rank, max(count, 1)


def restarted(run: str) -> bool:
    """Whether torchrun has started these processes before, and now again; `run` is what `run_id` was then.

    It counts restarts after a failure, and not those because a machine has come or gone.
    """
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0) > 0 or (run != "" and run == run_id())


def run_id() -> str:
    """The name of the job that torchrun was given, or drew; nothing where there is none."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return "" if name == "none" else name


def _variable(name: str) -> str | None:
    if name not in os.environ and "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        return os.environ.get(_OF_SLURM[name])
    return os.environ.get(name)
