"""The training loop: from cached features to a trained network, to be killed and resumed at any moment."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..errors import UniadFastError
from ..models.precision import computes_in_bfloat16
from ..progress import progress
from ..signals import asked_to_stop, stop_if_asked
from . import optimization
from .patience import Patience
from .recipes import Recipe
from .reconstruction_loss import ReconstructionLoss
from .run_files import LOG_EVERY, Checkpoint, Log, RunFiles

_VALIDATED_AT_A_TIME = 64


def epochs_and_steps(images: int, recipe: Recipe) -> tuple[int, int]:
    """(epochs, steps an epoch) that a recipe makes of so many training images."""
    steps = max(1, images // recipe.batch_size)
    return max(recipe.epochs, math.ceil(recipe.min_steps / steps)), steps


def train(
    criterion: ReconstructionLoss,
    tokens: NDArray,
    recipe: Recipe,
    seed: int,
    files: RunFiles,
    *,
    validation: NDArray | None = None,
    after_epoch: Callable[[int], None] | None = None,
    quiet: bool = False,
) -> int:
    """Train the network in `criterion` in place on tokens [images, N, C]; it ends in evaluation mode.

    Args:
        seed: of batch order and noise.
        validation: [images, N, C] of good images that are not trained on, which a recipe with `patience` watches.
        after_epoch: called with the number of epochs done, the network in evaluation mode; what it takes is not in the
            log's seconds. After a resumption it can be called again for an epoch, never not at all.

    Returns:
        The number of epochs done.

    Raises:
        ResumeError: the checkpoint is damaged or of another run; says what differs.
        Diverged: the loss is not finite; nothing of it is in a checkpoint.
        Stopped: a signal asked for it (see `uniad_fast.signals`), after a step, with a checkpoint.
        UniadFastError: the recipe has `patience`, and there is no image to watch.
    """
    if recipe.patience and (validation is None or not len(validation)):
        raise UniadFastError(f"a recipe with patience {recipe.patience} needs held-out good images to watch")
    with seeded_generators(seed, criterion.mean.device):
        return _Run(criterion, tokens, recipe, seed, files, quiet).go(validation, after_epoch)


class _Run:
    """A training under way."""

    def __init__(
        self,
        criterion: ReconstructionLoss,
        tokens: NDArray,
        recipe: Recipe,
        seed: int,
        files: RunFiles,
        quiet: bool,
    ) -> None:
        self.criterion, self.tokens, self.recipe, self.seed, self.quiet = criterion, tokens, recipe, seed, quiet
        self.epochs, self.steps_per_epoch = epochs_and_steps(len(tokens), recipe)
        self.total = self.epochs * self.steps_per_epoch
        self.optimizers = optimization.optimizers(criterion.model, recipe)
        self.schedulers = [optimization.scheduler(optimizer, recipe, self.total) for optimizer in self.optimizers]
        self.patience = Patience(recipe.patience)
        identity = _identity(files.run, recipe, seed, len(tokens), criterion.mean.device)
        parts = (criterion.model, self.optimizers, self.schedulers, self.patience)
        self.checkpoint = Checkpoint(files, identity, *parts)
        self.checkpoint_seconds = files.checkpoint_seconds
        self.step = self.checkpoint.load() if files.resume else 0
        self.log = Log(files, keep_below=self.step)

    def go(self, validation: NDArray | None, after_epoch: Callable[[int], None] | None) -> int:
        """Step after step to the end; the number of epochs done."""
        size = self.recipe.batch_size
        self.criterion.train()
        with self.log, progress("training", self.total * size, self.step * size, quiet=self.quiet) as bar:
            saved = time.monotonic()
            while self.step < self.total and not self.patience.ended:
                epoch = self.step // self.steps_per_epoch
                self._take_step(epoch)
                bar.update(size)
                if self.step % LOG_EVERY == 0:
                    bar.set_postfix(loss=f"{self.log.last_loss:.4f}", epoch=f"{epoch + 1}/{self.epochs}")
                if self.step % self.steps_per_epoch == 0:
                    self._end_epoch(validation, after_epoch)
                asked = asked_to_stop()
                ended = self.step == self.total or self.patience.ended
                if ended or asked or time.monotonic() - saved >= self.checkpoint_seconds:
                    self.log.flush()
                    self.checkpoint.save(self.step)
                    saved = time.monotonic()
                if asked and self.step < self.total:
                    stop_if_asked()
        self.criterion.eval()
        return self.step // self.steps_per_epoch

    def _take_step(self, epoch: int) -> None:
        model, position = self.criterion.model, self.step % self.steps_per_epoch
        rows = _rows_of_batch(len(self.tokens), epoch, position, self.recipe.batch_size, self.seed)
        loss = self.criterion(torch.from_numpy(self.tokens[rows]))
        self.log.check(self.step, loss, rows)
        model.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), self.recipe.clip)
        for optimizer in self.optimizers:
            optimizer.step()
        self.log.add(self.step, epoch, loss, float(self.schedulers[0].get_last_lr()[0]), norm)
        for scheduler in self.schedulers:
            scheduler.step()
        self.step += 1

    def _end_epoch(self, validation: NDArray | None, after_epoch: Callable[[int], None] | None) -> None:
        self.criterion.eval()
        if validation is not None and len(validation) and (self.recipe.patience or self.log.has_events):
            with self.log.paused() if not self.recipe.patience else contextlib.nullcontext():
                loss = _mean_loss(self.criterion, validation)
            self.log.add_held_out(self.step, loss)
            if self.recipe.patience:
                self.patience.see(loss)
        if after_epoch is not None:
            with self.log.paused():
                after_epoch(self.step // self.steps_per_epoch)
        self.criterion.train()


def _identity(run: dict[str, Any], recipe: Recipe, seed: int, images: int, device: torch.device) -> dict[str, Any]:
    """What a checkpoint of this run is recognised by (JSON values)."""
    content = json.loads(json.dumps({**run, "recipe": asdict(recipe), "seed": seed, "images": images}))
    content["bfloat16"] = computes_in_bfloat16(recipe.precision, device)
    return content


@torch.no_grad()
def _mean_loss(criterion: ReconstructionLoss, tokens: NDArray) -> float:
    """Over images [images, N, C], some at a time."""
    total = 0.0
    for start in range(0, len(tokens), _VALIDATED_AT_A_TIME):
        rows = np.array(tokens[start : start + _VALIDATED_AT_A_TIME])
        total += len(rows) * criterion(torch.from_numpy(rows)).item()
    return total / len(tokens)


def _rows_of_batch(images: int, epoch: int, position: int, batch_size: int, seed: int) -> NDArray:
    """Rows of a batch of the epoch's own order, which depends on nothing but seed and epoch."""
    order = np.random.default_rng((seed, epoch)).permutation(images)
    return np.sort(order[position * batch_size : (position + 1) * batch_size])


@contextlib.contextmanager
def seeded_generators(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's generators seeded for a run, and given back as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
