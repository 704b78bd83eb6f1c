"""Every target by its name, and running one for so many inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from hypothesis import HealthCheck, given, seed, settings
from hypothesis.strategies import SearchStrategy

from . import data, ops, stored


@dataclass(frozen=True)
class Target:
    """What is drawn, and what must hold of it. share: of a budget, by how cheap and how rich it is."""

    strategy: Callable[[], SearchStrategy[Any]]
    check: Callable[[Any], None]
    share: float


TARGETS = {
    "attention": Target(ops.attention_cases, partial(ops.check_attention, impl="cpu"), 0.2),
    "jitter": Target(ops.jitter_cases, partial(ops.check_jitter, impl="cpu"), 0.1),
    "norm": Target(ops.norm_cases, partial(ops.check_norm, impl="cpu"), 0.1),
    "dropout": Target(ops.dropout_cases, partial(ops.check_dropout, impl="cpu"), 0.1),
    "bad calls": Target(ops.bad_calls, ops.check_bad_call, 0.1),
    "metadata": Target(data.metadata_cases, data.check_metadata, 0.12),
    "folders": Target(data.folder_cases, data.check_folder, 0.06),
    "images": Target(data.image_cases, data.check_image, 0.1),
    "bundles": Target(stored.bundle_cases, stored.check_bundle, 0.03),
    "cache notes": Target(stored.cache_cases, stored.check_cache, 0.05),
    "checkpoints": Target(stored.checkpoint_cases, stored.check_checkpoint, 0.02),
    "configurations": Target(stored.configuration_cases, stored.check_configuration, 0.02),
}
# The interpreter is slow: it is fuzzed apart, a little.
TRITON = {
    "attention": Target(partial(ops.attention_cases, small=True), partial(ops.check_attention, impl="triton"), 0.25),
    "jitter": Target(partial(ops.jitter_cases, small=True), partial(ops.check_jitter, impl="triton"), 0.25),
    "norm": Target(partial(ops.norm_cases, small=True), partial(ops.check_norm, impl="triton"), 0.25),
    "dropout": Target(partial(ops.dropout_cases, small=True), partial(ops.check_dropout, impl="triton"), 0.25),
}


def run(target: Target, examples: int, number: int | None = None) -> int:
    """Check so many inputs, the same ones for a number, others for none; the count of those that were checked."""
    count = 0

    def check(case: Any) -> None:
        nonlocal count
        target.check(case)
        count += 1

    function = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=number is None,
        suppress_health_check=list(HealthCheck),
    )(given(target.strategy())(check))
    if number is not None:
        function = seed(number)(function)
    function()
    return count
