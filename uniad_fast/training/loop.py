"""The training loop: from features to a trained network, to be killed and resumed at any moment.

Several processes train one network: each takes a part of every batch, with the noise that this part has in the whole
batch, and their gradients are averaged. What they learn is what one process learns, to the rounding of sums.
"""

import contextlib
import json
import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import UniadFastError
from ..models.precision import computes_in_bfloat16
from ..ops.noise import part_of_batch
from ..progress import progress
from ..rows import TokenRows
from ..signals import Stopped, asked_to_stop, stop_if_asked
from . import generators, optimization
from .batches import Batch, Batches, share
from .captured_step import CapturedStep, CudaGraphs, Graphs
from .device_batches import DeviceBatches
from .generators import seeded_generators
from .patience import Patience
from .processes import ProcessError, Processes
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
    tokens: TokenRows,
    recipe: Recipe,
    seed: int,
    files: RunFiles,
    *,
    validation: TokenRows | None = None,
    classes: NDArray | None = None,
    after_epoch: Callable[[int], None] | None = None,
) -> int:
    """Train the network in `criterion` in place on tokens [images, N, C]; it ends in evaluation mode.

    Args:
        seed: of batch order and noise.
        validation: [images, N, C] of good images that are not trained on, which a recipe with `patience` watches.
        classes: number of each image's class, which a recipe with "balanced" sampling needs.
        after_epoch: called with the number of epochs done, the network in evaluation mode; what it takes is not in the
            log's seconds. After a resumption it can be called again for an epoch, never not at all.

    Returns:
        The number of epochs done.

    Raises:
        ResumeError: the checkpoint is damaged or of another run; says what differs.
        Diverged: the loss is not finite; nothing of it is in a checkpoint.
        Stopped: a signal asked for it (see `uniad_fast.signals`), after a step, with a checkpoint.
        UniadFastError: the recipe has `patience`, and there is no image to watch; or a batch has fewer images than
            there are processes.
    """
    together = files.together
    batch = min(recipe.batch_size, len(tokens))
    if batch < together.count:
        raise UniadFastError(f"{together.count} processes can't share batches of {batch} images: start fewer")
    if recipe.patience and (validation is None or not len(validation)):
        raise UniadFastError(f"a recipe with patience {recipe.patience} needs held-out good images to watch")
    with seeded_generators(seed, criterion.mean.device):
        batches = Batches(
            tokens, recipe.batch_size, seed, together.part, classes if recipe.sampling == "balanced" else None
        )
        run = _Run(criterion, batches, recipe, seed, files)
        try:
            return run.go(validation, after_epoch)
        finally:
            run.release()


class _Run:
    """A training under way."""

    def __init__(
        self,
        criterion: ReconstructionLoss,
        batches: Batches,
        recipe: Recipe,
        seed: int,
        files: RunFiles,
    ) -> None:
        self.criterion, self.batches, self.recipe = criterion, batches, recipe
        self.together, self.quiet = files.together, files.quiet
        self.epochs, self.steps_per_epoch = epochs_and_steps(batches.images, recipe)
        self.total = self.epochs * self.steps_per_epoch
        self.optimizers = optimization.optimizers(criterion.model, recipe)
        self.schedulers = [optimization.scheduler(optimizer, recipe, self.total) for optimizer in self.optimizers]
        self.patience = Patience(recipe.patience)
        identity = _identity(files.run, recipe, seed, batches, criterion.mean.device)
        parts = (criterion.model, self.optimizers, self.schedulers, self.patience, criterion.mean.device)
        self.checkpoint = Checkpoint(files, identity, *parts)
        self.checkpoint_seconds = files.checkpoint_seconds if self.together.is_first else math.inf
        self.step = 0
        # The first process alone knows whether there is something to go on from.
        content = self.together.from_first(lambda: self.checkpoint.read() if files.resume else None)
        if content is not None:
            self.step = self.checkpoint.restore(content)
        self.log = Log(files if self.together.is_first else None, keep_below=self.step)
        self.asked = False
        self.watches = self.together.from_first(lambda: bool(recipe.patience) or self.log.has_events)
        device = criterion.mean.device
        self.on_device: DeviceBatches | None = DeviceBatches(batches, device, self.total)
        self.module: nn.Module = criterion
        if self.together.count > 1:
            self._prepare_alone()
            self.module = nn.parallel.DistributedDataParallel(criterion)
        self.captured: CapturedStep | None = None
        if (graphs := _graphs(device)) is not None and self.together.count == 1:
            self.captured = CapturedStep(self._step_alone, list(criterion.model.parameters()), graphs)

    def go(self, validation: TokenRows | None, after_epoch: Callable[[int], None] | None) -> int:
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
                ended = self.step == self.total or self.patience.ended
                if ended or self.asked or time.monotonic() - saved >= self.checkpoint_seconds:
                    self.log.flush()
                    if self.together.is_first:
                        self.checkpoint.save(self.step)
                    saved = time.monotonic()
                if self.asked and self.step < self.total:
                    stop_if_asked()
                    raise Stopped(signal.SIGTERM)  # another process was asked
        self.criterion.eval()
        return self.step // self.steps_per_epoch

    def _prepare_alone(self) -> None:
        """What one process may take longer for than the others wait for it in a collective: kernels are compiled, or
        found compiled, by a first step that leaves nothing behind.
        """
        assert self.on_device is not None
        failure: Exception | None = None
        try:
            if self.step < self.total:
                self.criterion.train()
                batch = self.on_device.at(self.step)
                with generators.kept(self.criterion.mean.device), part_of_batch(batch.first):
                    self.criterion(batch.tokens).backward()
                self.criterion.model.zero_grad(set_to_none=True)
        except Exception as error:  # the others must not wait for this process
            failure = error
        failed = [rank for rank, has_failed in enumerate(self.together.gather(failure is not None)) if has_failed]
        if failure is not None:
            raise failure
        if failed:
            raise ProcessError(f"process {failed[0]} failed in its first step")

    def release(self) -> None:
        """Let go of what a GPU holds for the training, at once: the graph's calls would keep it alive for a while, and
        gradients its memory.
        """
        self.captured = self.on_device = None
        self.criterion.model.zero_grad(set_to_none=True)

    def _take_step(self, epoch: int) -> None:
        assert self.on_device is not None
        batch = self.on_device.at(self.step)
        if self.together.count == 1:
            step = self._step_alone if self.captured is None else self.captured
            loss, norm = step(batch.tokens).unbind()
            self.asked = asked_to_stop()
        else:
            loss, norm = self._shared_step(batch)
        self.log.check(self.step, loss, batch.rows)
        for optimizer in self.optimizers:
            optimizer.step()
        self.log.add(self.step, epoch, loss, float(self.schedulers[0].get_last_lr()[0]), norm)
        for scheduler in self.schedulers:
            scheduler.step()
        self.step += 1

    def _step_alone(self, tokens: Tensor) -> Tensor:
        """Gradients, clipped; (loss, norm of the gradients before) [2]. Nothing is read back: see `_graphs`."""
        self.criterion.model.zero_grad(set_to_none=True)
        loss = self.module(tokens)
        loss.backward()
        return torch.stack((loss.detach(), self._clipped_norm()))

    def _clipped_norm(self) -> Tensor:
        return nn.utils.clip_grad_norm_(self.criterion.model.parameters(), self.recipe.clip)

    def _shared_step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The whole batch's loss and norm of gradients; finds out whether any process was asked to stop."""
        self.criterion.model.zero_grad(set_to_none=True)
        with part_of_batch(batch.first):
            loss = self.module(batch.tokens)
        # The gradients are averaged over processes, whose parts may differ by an image.
        share_of_loss = len(batch.tokens) / len(batch.rows)
        (loss * share_of_loss * self.together.count).backward()
        told = torch.stack((loss.detach() * share_of_loss, torch.full_like(loss.detach(), float(asked_to_stop()))))
        total, asked = self.together.sum(told)
        # A look at what a GPU has computed waits for it.
        if asked.device.type == "cpu" or self.step % LOG_EVERY == 0:
            self.asked = bool(asked)
        return total, self._clipped_norm()

    def _end_epoch(self, validation: TokenRows | None, after_epoch: Callable[[int], None] | None) -> None:
        self.criterion.eval()
        if validation is not None and len(validation) and self.watches:
            with self.log.paused() if not self.recipe.patience else contextlib.nullcontext():
                loss = _mean_loss(self.criterion, validation, self.together)
            self.log.add_held_out(self.step, loss)
            if self.recipe.patience:
                self.patience.see(loss)
        if after_epoch is not None:
            with self.log.paused():
                after_epoch(self.step // self.steps_per_epoch)
        self.criterion.train()


def _graphs(device: torch.device) -> Graphs | None:
    """Who captures steps on this device, if anybody does."""
    wanted = device.type == "cuda" and os.environ.get("UNIAD_FAST_CUDA_GRAPH") != "0"
    return CudaGraphs(device) if wanted else None


def _identity(run: dict[str, Any], recipe: Recipe, seed: int, batches: Batches, device: torch.device) -> dict[str, Any]:
    """What a checkpoint of this run is recognised by (JSON values)."""
    content = json.loads(json.dumps({**run, "recipe": asdict(recipe), "seed": seed, "images": batches.images}))
    if batches.in_blocks:
        content["order"] = "blocks"
    content |= {"bfloat16": computes_in_bfloat16(recipe.precision, device), "device": device.type}
    return content


@torch.no_grad()
def _mean_loss(criterion: ReconstructionLoss, tokens: TokenRows, together: Processes) -> float:
    """Over images [images, N, C], some at a time, each process its own."""
    total = torch.zeros((), dtype=torch.float64, device=criterion.mean.device)
    begin, end = share(len(tokens), together.part)
    for start in range(begin, end, _VALIDATED_AT_A_TIME):
        rows = np.array(tokens[start : min(start + _VALIDATED_AT_A_TIME, end)])
        total += len(rows) * criterion(torch.from_numpy(rows)).double()
    return together.sum(total).item() / len(tokens)
