"""Seeds as the definition draws them, for comparisons on a GPU."""

import contextlib
from collections.abc import Iterator, Sequence
from unittest.mock import patch

import torch
from torch import Tensor

from uniad_fast.models import training_function
from uniad_fast.ops.checks import seed_of


@contextlib.contextmanager
def drawn_singly() -> Iterator[None]:
    """Inside, the transformer in training draws its seeds one by one, as it does layer by layer.

    On a GPU several numbers of one draw are other ones than as many draws give.
    """

    def draw_seeds(device: torch.device, rows: Sequence[int]) -> list[Tensor]:
        found = [seed_of(None, device, r, "triton") for r in rows]
        return [seed for seed in found if isinstance(seed, Tensor)]

    with patch.object(training_function, "draw_seeds", draw_seeds):
        yield
