"""A small training that torchrun can start: `trained_together.py FOLDER [SECONDS A STEP]`, for tests of processes."""

import os
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from uniad_fast.files import atomic_path
from uniad_fast.models.architecture import Architecture
from uniad_fast.ops import products
from uniad_fast.signals import noted
from uniad_fast.training import optimization, processes
from uniad_fast.training.batches import Batches
from uniad_fast.training.build import build_model
from uniad_fast.training.loop import train
from uniad_fast.training.recipes import FAST
from uniad_fast.training.reconstruction_loss import ReconstructionLoss, channel_statistics
from uniad_fast.training.run_files import RunFiles

RECIPE = replace(FAST, epochs=12, min_steps=0, batch_size=7, precision="float32", dropout=0.1, zero_blocks=False)
TOKENS = np.random.default_rng(0).standard_normal((23, 36, 24)).astype(np.float32)
SMALL = Architecture(hidden_dim=32, nhead=4, num_encoder_layers=1, num_decoder_layers=2, dim_feedforward=64)


@contextmanager
def rounded_alike():
    """One thread and one library, whatever is the fastest for so many rows: other sums differ in last bits, of which
    Adam makes whole steps where a gradient is nothing else.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with patch.object(products, "fastest", lambda *_: products.Ways(*[products.TORCH] * 3)):
            yield
    finally:
        torch.set_num_threads(before)


@rounded_alike()
def main(folder: Path, seconds: float) -> None:
    processes.TIMEOUT = timedelta(seconds=30)
    at = Batches.at
    Batches.at = lambda *args: (time.sleep(seconds), at(*args))[1]
    torch.manual_seed(0)
    model = build_model(24, 16, (6, 6), RECIPE, architecture=SMALL)
    with noted(), processes.joined() as together:
        with atomic_path(folder / f"rank{together.rank}.pid") as path:
            path.write_text(str(os.getpid()))
        criterion = ReconstructionLoss(model, *channel_statistics(TOKENS), optimization.loss(RECIPE))
        files = RunFiles(folder, {}, resume=True, checkpoint_seconds=0.0, together=together, quiet=True)
        train(criterion, TOKENS, RECIPE, 5, files, validation=TOKENS[:5])
        if together.is_first:
            with atomic_path(folder / "weights.pt") as path:
                torch.save(model.state_dict(), path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 0.0)
