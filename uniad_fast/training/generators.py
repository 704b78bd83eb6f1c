"""Torch's generators of a run: the CPU's, and that of the GPU it trains on. Those of other GPUs are left alone."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

States = dict[str, Tensor]
"""The state of each generator, by the type of its device."""


def states(device: torch.device) -> States:
    """Of the generators that a run on `device` draws from."""
    found = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def restore(found: States, device: torch.device) -> None:
    """Set the generators as they were, those of whichever GPU `device` is.

    So a state that one of several processes saved serves all: they draw the same, each on its own GPU.

    Raises:
        KeyError: they are of another type of device.
    """
    torch.set_rng_state(found["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(found["cuda"], device)


@contextlib.contextmanager
def kept(device: torch.device) -> Iterator[None]:
    """The generators afterwards as they were before."""
    before = states(device)
    try:
        yield
    finally:
        restore(before, device)


@contextlib.contextmanager
def seeded_generators(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's generators seeded for a run, and given back as they were."""
    with kept(device):
        torch.default_generator.manual_seed(int(seed))
        if device.type == "cuda":  # torch.manual_seed would seed all GPUs
            with torch.cuda.device(device):
                torch.cuda.manual_seed(int(seed))
        yield
