"""A training on a GPU whose steps are replayed from a graph, beside the same one whose steps are called."""

import tempfile
import time
import warnings
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from uniad_fast.training import loop, optimization
from uniad_fast.training.build import build_model
from uniad_fast.training.recipes import FAST
from uniad_fast.training.reconstruction_loss import ReconstructionLoss
from uniad_fast.training.run_files import RunFiles


def training_check(device: torch.device) -> str:
    """Twenty steps with dropout and jitter, captured and not: the same weights, to the bit."""
    recipe = replace(FAST, epochs=10, min_steps=0, batch_size=4, dropout=0.1)

    def trained(graph: bool) -> tuple[list[Tensor], float]:
        torch.manual_seed(0)
        net = build_model(24, 16, (7, 9), recipe, "triton").to(device)
        own = torch.zeros(24), torch.ones(24), optimization.loss(recipe), recipe.precision
        start, tokens = time.perf_counter(), np.random.default_rng(0).normal(size=(8, 63, 24)).astype(np.float32)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("error")  # that a step can't be captured is one
            with patch.object(loop, "_graphs", loop._graphs if graph else lambda _: None):
                loop.train(ReconstructionLoss(net, *own), tokens, recipe, 0, RunFiles(folder, {}, quiet=True))
        return list(net.parameters()), time.perf_counter() - start

    (replayed, sooner), (called, later) = trained(True), trained(False)
    assert all(torch.equal(a, b) for a, b in zip(replayed, called, strict=True)), "other weights"
    return f"{sooner:.2f} s, called {later:.2f} s, the first of which compiles"
