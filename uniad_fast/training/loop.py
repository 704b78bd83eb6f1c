"""The training loop: from cached features to a trained `UniAD`, to be killed and resumed at any moment."""

import contextlib
import csv
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import UniadFastError
from ..files import atomic_path
from ..models.precision import autocast, computes_in_bfloat16
from ..models.reconstructor import Reconstructor
from ..progress import progress
from ..signals import asked_to_stop, stop_if_asked
from . import optimization
from .recipes import Recipe

LOG_FIELDS = ("step", "epoch", "loss", "learning_rate", "gradient_norm", "seconds")
_LOG_EVERY = 10
_VALIDATED_AT_A_TIME = 64
_WORTH_WAITING_FOR = 0.01


class ResumeError(UniadFastError):
    """A run can't be gone on with: its checkpoint or log is damaged, or it belongs to another run."""


class Diverged(UniadFastError):
    """The loss is not finite any more. `rows`: of the training images in the batch where it was seen first."""

    def __init__(self, step: int, loss: float, rows: list[int]) -> None:
        super().__init__(f"training stopped at step {step}: the loss is {loss}")
        self.rows = rows


def channel_statistics(tokens: NDArray) -> tuple[Tensor, Tensor]:
    """Mean and deviation per channel, [C] each, of tokens [images, N, C]; a constant channel has deviation 1."""
    channels = tokens.shape[-1]
    total, squares, count = np.zeros(channels), np.zeros(channels), 0
    for start in range(0, len(tokens), 256):
        chunk = tokens[start : start + 256].reshape(-1, channels).astype(np.float64)
        total += chunk.sum(axis=0)
        squares += np.square(chunk).sum(axis=0)
        count += len(chunk)
    mean = total / count
    if not (np.isfinite(mean).all() and np.isfinite(squares).all()):
        raise UniadFastError("the features of the training images are not all finite")
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    std[std < 1e-6 * (np.abs(mean) + 1e-6)] = 1
    return torch.from_numpy(mean).float(), torch.from_numpy(std).float()


def epochs_and_steps(images: int, recipe: Recipe) -> tuple[int, int]:
    """(epochs, steps an epoch) that a recipe makes of so many training images."""
    steps = max(1, images // recipe.batch_size)
    return max(recipe.epochs, math.ceil(recipe.min_steps / steps)), steps


def train(
    model: Reconstructor,
    tokens: NDArray,
    recipe: Recipe,
    seed: int,
    mean: Tensor,
    std: Tensor,
    directory: str | os.PathLike,
    run: dict[str, Any],
    resume: bool = False,
    checkpoint_seconds: float = 60.0,
    quiet: bool = False,
    after_epoch: Callable[[int], None] | None = None,
    validation: NDArray | None = None,
) -> int:
    """Train `model` in place on tokens [images, N, C] to reconstruct (tokens - mean) / std.

    Args:
        directory: gets `log.csv` and `checkpoint.pt`, the latter every `checkpoint_seconds` and at the end.
        run: what identifies this run (JSON values); a checkpoint of another one is not resumed.
        resume: go on from the checkpoint, to the same numbers as an unbroken run; without one, start.
        after_epoch: called with the number of epochs done, the model in evaluation mode; what it takes is not in the
            log's seconds. After a resumption it can be called again for an epoch, never not at all.
        validation: [images, N, C] of good images that are not trained on, which a recipe with `patience` watches.

    Returns:
        The number of epochs done.

    Raises:
        ResumeError: the checkpoint is damaged or of another run; says what differs.
        Diverged: the loss is not finite; nothing of it is in a checkpoint.
        Stopped: a signal asked for it (see `uniad_fast.signals`), after a step, with a checkpoint.
        UniadFastError: the recipe has `patience`, and there is no image to watch.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    device = next(model.parameters()).device
    epochs, steps_per_epoch = epochs_and_steps(len(tokens), recipe)
    total = epochs * steps_per_epoch
    loss_of = optimization.loss(recipe)
    optimizers = optimization.optimizers(model, recipe)
    schedulers = [optimization.scheduler(optimizer, recipe, total) for optimizer in optimizers]
    run = json.loads(json.dumps({**run, "recipe": asdict(recipe), "seed": seed, "images": len(tokens)}))
    run["bfloat16"] = computes_in_bfloat16(recipe.precision, device)
    run["optimizer"] = optimization.optimizer_name(recipe, device)
    mean, std = mean.to(device), std.to(device)
    if recipe.patience and (validation is None or not len(validation)):
        raise UniadFastError(f"a recipe with patience {recipe.patience} needs held-out good images to watch")
    patience = Patience(recipe.patience)

    def validation_loss() -> float:
        assert validation is not None
        total_loss = 0.0
        for start in range(0, len(validation), _VALIDATED_AT_A_TIME):
            rows = np.array(validation[start : start + _VALIDATED_AT_A_TIME])
            target = (torch.from_numpy(rows).to(device) - mean) / std
            with torch.no_grad(), autocast(recipe.precision, device):
                total_loss += len(rows) * loss_of(model.reconstruct(target).float(), target).item()
        return total_loss / len(validation)

    with seeded_generators(seed, device):
        checkpoint = _Checkpoint(directory / "checkpoint.pt", run, model, optimizers, schedulers, patience)
        step = checkpoint.load() if resume else 0
        model.train()
        log = _Log(directory / "log.csv", keep_below=step)
        with log, progress("training", total * recipe.batch_size, step * recipe.batch_size, quiet=quiet) as bar:
            saved = time.monotonic()
            while step < total and not patience.ended:
                epoch, position = divmod(step, steps_per_epoch)
                rows = _rows_of_batch(len(tokens), epoch, position, recipe.batch_size, seed)
                batch = _batch(tokens, rows)
                target = (batch.to(device) - mean) / std
                with autocast(recipe.precision, device):
                    reconstruction = model.reconstruct(target)
                loss = loss_of(reconstruction.float(), target)
                log.check(step, loss, rows)
                model.zero_grad(set_to_none=True)
                loss.backward()
                norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
                for optimizer in optimizers:
                    optimizer.step()
                log.add(step, epoch, loss, float(schedulers[0].get_last_lr()[0]), norm)
                for scheduler in schedulers:
                    scheduler.step()
                step += 1
                bar.update(recipe.batch_size)
                if step % _LOG_EVERY == 0:
                    bar.set_postfix(loss=f"{log.last_loss:.4f}", epoch=f"{epoch + 1}/{epochs}")
                if step % steps_per_epoch == 0 and (recipe.patience or after_epoch is not None):
                    model.eval()
                    if recipe.patience:
                        patience.see(validation_loss())
                    if after_epoch is not None:
                        with log.paused():
                            after_epoch(step // steps_per_epoch)
                    model.train()
                asked = asked_to_stop()
                if step == total or patience.ended or asked or time.monotonic() - saved >= checkpoint_seconds:
                    log.flush()
                    checkpoint.save(step)
                    saved = time.monotonic()
                if step < total:
                    stop_if_asked()
    model.eval()
    return step // steps_per_epoch


def _rows_of_batch(images: int, epoch: int, position: int, batch_size: int, seed: int) -> NDArray:
    """Rows of a batch of the epoch's own order, which depends on nothing but seed and epoch."""
    order = np.random.default_rng((seed, epoch)).permutation(images)
    return np.sort(order[position * batch_size : (position + 1) * batch_size])


def _batch(tokens: NDArray, rows: NDArray) -> Tensor:
    return torch.from_numpy(tokens[rows])


@contextlib.contextmanager
def seeded_generators(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's generators seeded for a run, and given back as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class Patience:
    """Ends a training whose loss on good images that it has not seen no longer falls.

    It asks for no defect: what it watches is the reconstruction, not the detection.
    """

    def __init__(self, epochs: int) -> None:
        self._epochs = epochs
        self._lowest = math.inf
        self._waited = 0

    @property
    def ended(self) -> bool:
        return 0 < self._epochs <= self._waited

    def see(self, loss: float) -> None:
        """The loss after another epoch; UniadFastError if it is not finite."""
        if not math.isfinite(loss):
            raise UniadFastError(f"the loss on held-out good images is {loss}")
        if loss < (1 - _WORTH_WAITING_FOR) * self._lowest:
            self._lowest, self._waited = loss, 0
        else:
            self._waited += 1

    def state_dict(self) -> dict[str, Any]:
        return {"lowest": self._lowest, "waited": self._waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._lowest, self._waited = state["lowest"], state["waited"]


class _Checkpoint:
    """Everything a run depends on at a step: parameters, optimiser, schedule, generators."""

    def __init__(
        self,
        path: Path,
        run: dict[str, Any],
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        schedulers: Sequence[torch.optim.lr_scheduler.LRScheduler],
        patience: "Patience",
    ) -> None:
        self._path = path
        self._run = run
        self._parts: dict[str, Any] = {"model": model, "patience": patience}
        for number, pair in enumerate(zip(optimizers, schedulers, strict=True)):
            names = (f"optimizer{number or ''}", f"scheduler{number or ''}")
            self._parts |= dict(zip(names, pair, strict=True))

    def save(self, step: int) -> None:
        if not all(parameter.isfinite().all() for parameter in self._parts["model"].parameters()):
            raise UniadFastError(f"training stopped at step {step}: parameters are not finite any more")
        content = {name: part.state_dict() for name, part in self._parts.items()}
        content |= {"run": json.dumps(self._run), "step": step, "generator": torch.get_rng_state()}
        if torch.cuda.is_available():
            content["cuda_generators"] = torch.cuda.get_rng_state_all()
        with atomic_path(self._path) as path:
            torch.save(content, path)

    def load(self) -> int:
        """The step it was saved at; 0 if there is none yet (killed before the first)."""
        if not self._path.exists():
            return 0
        try:
            content = torch.load(self._path, map_location="cpu", weights_only=True)
            run = json.loads(content["run"])
        except Exception as error:  # torch.load raises many kinds for a damaged file
            raise ResumeError(f"{self._path} is not a checkpoint that can be read: {error}") from error
        differing = sorted(name for name in self._run.keys() | run.keys() if self._run.get(name) != run.get(name))
        if differing:
            changes = "; ".join(f"{n}: was {run.get(n)}, is {self._run.get(n)}" for n in differing)
            raise ResumeError(f"{self._path} is the checkpoint of another run ({changes})")
        try:
            for name, part in self._parts.items():
                part.load_state_dict(content[name])
            torch.set_rng_state(content["generator"])
            if torch.cuda.is_available() and "cuda_generators" in content:
                torch.cuda.set_rng_state_all(content["cuda_generators"])
            step = content["step"]
            if not isinstance(step, int) or step < 0:
                raise ValueError(f"it is of step {step!r}")
        except Exception as error:
            raise ResumeError(f"{self._path} is a damaged checkpoint: {error}") from error
        return step


class _Log:
    """A CSV row a step. Losses stay on the device until a few rows are written together."""

    def __init__(self, path: Path, keep_below: int) -> None:
        self._pending: list[tuple[int, int, Tensor, float, Tensor, float]] = []
        self._rows: dict[int, NDArray] = {}
        self._started = time.monotonic()
        self.last_loss = float("nan")
        kept: list[dict[str, str]] = []
        if keep_below:
            kept = _read_log(path, keep_below)
            self._started -= float(kept[-1]["seconds"]) if kept else 0
        with atomic_path(path) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, LOG_FIELDS)
            writer.writeheader()
            writer.writerows(kept)
        self._file = open(path, "a", newline="", encoding="utf-8")  # noqa: SIM115, closed by __exit__
        self._writer = csv.writer(self._file)

    def check(self, step: int, loss: Tensor, rows: NDArray) -> None:
        """Diverged, as soon as looking costs nothing: at once on a CPU, elsewhere when the rows are written."""
        self._rows[step] = rows
        if loss.device.type == "cpu" and not math.isfinite(value := loss.item()):
            raise Diverged(step, value, rows.tolist())

    def add(self, step: int, epoch: int, loss: Tensor, learning_rate: float, norm: Tensor) -> None:
        seconds = time.monotonic() - self._started
        self._pending.append((step, epoch, loss.detach(), learning_rate, norm.detach(), seconds))
        if len(self._pending) >= _LOG_EVERY:
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
            self._writer.writerow(
                [step, epoch, f"{self.last_loss:.6g}", f"{learning_rate:.6g}", f"{norm.item():.6g}", f"{seconds:.2f}"]
            )
        self._pending.clear()
        self._rows.clear()
        self._file.flush()

    def __enter__(self) -> "_Log":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            if error is not Diverged:
                self.flush()
        finally:
            self._file.close()


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
