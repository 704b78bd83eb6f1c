"""What a run keeps on disk: a checkpoint to go on from, and a log with a row a step."""

import contextlib
import csv
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import UniadFastError
from ..files import atomic_path, save_tensors
from ..printable import printable
from . import generators
from .patience import Patience
from .processes import ALONE, Processes

LOG_FIELDS = ("step", "epoch", "loss", "learning_rate", "gradient_norm", "seconds")
LOG_EVERY = 10
"""Steps whose losses are read from the device together."""


class ResumeError(UniadFastError):
    """A run can't be gone on with: its checkpoint or log is damaged, or it belongs to another run."""


class Diverged(UniadFastError):
    """The loss is not finite any more. `rows`: of the training images in the batch where it was seen first."""

    def __init__(self, step: int, loss: float, rows: list[int]) -> None:
        super().__init__(f"training stopped at step {step}: the loss is {loss}")
        self.rows = rows

    def with_names(self, paths: Sequence[Path]) -> "Diverged":
        """This error, its message followed by the images of the batch."""
        listed = "".join(f"\n  {printable(path)}" for path in paths)
        self.args = (f"{self}, first on a batch of these images:{listed}",)
        return self


@dataclass(frozen=True)
class RunFiles:
    """Where a run keeps its log and its checkpoints, whether it goes on from one, and who takes part.

    Attributes:
        directory: gets `log.csv` and `checkpoint.pt`.
        run: what identifies this run (JSON values); a checkpoint of another one is not resumed.
        resume: go on from the checkpoint, to the same numbers as an unbroken run; without one, start.
        checkpoint_seconds: between two checkpoints; there is one at the end, too.
        events: folder for TensorBoard's events; None for none.
        together: the processes that train this network, all of which run it with the same arguments. The first one
            writes the files.
        quiet: no progress bar.
    """

    directory: str | os.PathLike
    run: dict[str, Any]
    resume: bool = False
    checkpoint_seconds: float = 60.0
    events: str | os.PathLike | None = None
    together: Processes = ALONE
    quiet: bool = False

    def path(self, name: str) -> Path:
        return Path(self.directory, name)


class Checkpoint:
    """Everything a run depends on at a step: parameters, optimiser, schedule, generators of the device it trains on."""

    def __init__(
        self,
        files: RunFiles,
        run: dict[str, Any],
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        schedulers: Sequence[torch.optim.lr_scheduler.LRScheduler],
        patience: Patience,
        device: torch.device,
    ) -> None:
        self._path = files.path("checkpoint.pt")
        self._run = run
        self._device = device
        self._parts: dict[str, Any] = {"model": model, "patience": patience}
        for number, pair in enumerate(zip(optimizers, schedulers, strict=True)):
            names = (f"optimizer{number or ''}", f"scheduler{number or ''}")
            self._parts |= dict(zip(names, pair, strict=True))

    def save(self, step: int) -> None:
        if not all(parameter.isfinite().all() for parameter in self._parts["model"].parameters()):
            raise UniadFastError(f"training stopped at step {step}: parameters are not finite any more")
        content = {name: part.state_dict() for name, part in self._parts.items()}
        content |= {"run": json.dumps(self._run), "step": step, "generators": generators.states(self._device)}
        with atomic_path(self._path) as path:
            save_tensors(content, path)

    def read(self) -> dict[str, Any] | None:
        """What is in the file, for `restore`; None if there is none yet (killed before the first)."""
        if not self._path.exists():
            return None
        try:
            content = torch.load(self._path, map_location="cpu", weights_only=True)
            run = json.loads(content["run"])
        except Exception as error:  # torch.load raises many kinds for a damaged file
            raise ResumeError(f"{self._path} is not a checkpoint that can be read: {error}") from error
        if changes := _differences(run, self._run):
            raise ResumeError(f"{self._path} is the checkpoint of another run ({'; '.join(changes)})")
        return content

    def restore(self, content: dict[str, Any]) -> int:
        """Set everything as it was; the step it was saved at."""
        try:
            for name, part in self._parts.items():
                part.load_state_dict(content[name])
            generators.restore(content["generators"], self._device)
            step = content["step"]
            if not isinstance(step, int) or step < 0:
                raise ValueError(f"it is of step {step!r}")
        except Exception as error:
            raise ResumeError(f"{self._path} is a damaged checkpoint: {error}") from error
        return step


def _differences(was: dict[str, Any], now: dict[str, Any], inside: str = "") -> list[str]:
    """What is another value, by its name; of tables in tables, the names that differ."""
    found: list[str] = []
    for name in sorted(was.keys() | now.keys()):
        before, after = was.get(name), now.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            found += _differences(before, after, f"{inside}{name}.")
        elif before != after:
            found.append(f"{inside}{name}: was {before}, is {after}")
    return found


class Log:
    """A CSV row a step. Losses stay on the device until a few rows are written together.

    Without files, of a process that leaves that to another, nothing is written; what is wrong is found all the same.
    """

    def __init__(self, files: RunFiles | None, keep_below: int) -> None:
        self._pending: list[tuple[int, int, Tensor, float, Tensor, float]] = []
        self._rows: dict[int, NDArray] = {}
        self._started = time.monotonic()
        self.last_loss = float("nan")
        self._file: IO[str] | None = None
        self._events: Any = None
        if files is None:
            return
        path = files.path("log.csv")
        path.parent.mkdir(parents=True, exist_ok=True)
        kept: list[dict[str, str]] = []
        if keep_below:
            kept = _read_log(path, keep_below)
            self._started -= float(kept[-1]["seconds"]) if kept else 0
        with atomic_path(path) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, LOG_FIELDS)
            writer.writeheader()
            writer.writerows(kept)
        self._file = open(path, "a", newline="", encoding="utf-8")  # noqa: SIM115, closed by __exit__
        if files.events is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(files.events), purge_step=keep_below)

    def check(self, step: int, loss: Tensor, rows: NDArray) -> None:
        """Diverged, as soon as looking costs nothing: at once on a CPU, elsewhere when the rows are written."""
        self._rows[step] = rows
        if loss.device.type == "cpu" and not math.isfinite(value := loss.item()):
            raise Diverged(step, value, rows.tolist())

    def add(self, step: int, epoch: int, loss: Tensor, learning_rate: float, norm: Tensor) -> None:
        seconds = time.monotonic() - self._started
        self._pending.append((step, epoch, loss.detach(), learning_rate, norm.detach(), seconds))
        if len(self._pending) >= LOG_EVERY:
            self.flush()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside does not count as training time."""
        stopped = time.monotonic()
        yield
        self._started += time.monotonic() - stopped

    def flush(self) -> None:
        for step, epoch, loss, learning_rate, norm, seconds in self._pending:
            self.last_loss = loss.item()
            if not math.isfinite(self.last_loss):
                self._pending.clear()
                raise Diverged(step, self.last_loss, self._rows[step].tolist())
            numbers = [f"{self.last_loss:.6g}", f"{learning_rate:.6g}", f"{norm.item():.6g}", f"{seconds:.2f}"]
            if self._file is not None:
                csv.writer(self._file).writerow([step, epoch, *numbers])
            if self._events is not None:
                for name, value in zip(
                    LOG_FIELDS[2:], (self.last_loss, learning_rate, norm.item(), seconds), strict=True
                ):
                    self._events.add_scalar(f"training/{name}", value, step)
        self._pending.clear()
        self._rows.clear()
        if self._file is not None:
            self._file.flush()

    @property
    def has_events(self) -> bool:
        """Whether somebody looks at more than the CSV."""
        return self._events is not None

    def add_held_out(self, step: int, loss: float) -> None:
        """The loss of images that are not trained on, for the events."""
        if self._events is not None:
            self._events.add_scalar("held-out loss", loss, step)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            if error is not Diverged:
                self.flush()
        finally:
            if self._file is not None:
                self._file.close()
            if self._events is not None:
                self._events.close()


def _read_log(path: Path, below: int) -> list[dict[str, str]]:
    """The rows of a log before a step, of which there is one each.

    Raises:
        ResumeError: they are not all there, or the file is damaged.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [dict(zip(LOG_FIELDS, cells, strict=True)) for cells in csv.reader(file)][1:]
        kept = [row for row in rows if int(row["step"]) < below]
        if [int(row["step"]) for row in kept] != list(range(below)):
            raise ValueError(f"it has {len(kept)} of {below} steps")
        for name in ("loss", "seconds"):
            [float(row[name]) for row in kept]
    except (OSError, ValueError, csv.Error) as error:
        raise ResumeError(f"{path}, the log beside the checkpoint, can't be gone on with: {error}") from None
    return kept
