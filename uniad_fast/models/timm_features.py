"""Feature extractors of timm: made by name, with real tensors or without, and what is known of them beforehand."""

import contextlib
import difflib
import logging
from collections.abc import Iterator
from typing import Any

import torch

from ..errors import UniadFastError
from ..image_size import ImageSize, size_of
from ..printable import printable
from ..state_dicts import StateDict, without_values

_COARSEST_STRIDE = 16


def create(name: str, image_size: ImageSize, out_indices: tuple[int, ...] | None, **options: Any) -> Any:
    import timm

    if not timm.is_model(name):
        known = timm.list_models()
        close = [n for n in known if name and name in n][:5] or difflib.get_close_matches(name, known, 5)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise UniadFastError(f"timm has no model {printable(name)!r}{hint}")
    if out_indices is not None:
        options["out_indices"] = out_indices
    with _quiet("timm.models._builder"):
        try:
            return timm.create_model(name, features_only=True, **_size_options(name, image_size), **options)
        except (IndexError, AssertionError, RuntimeError) as error:
            if out_indices is not None and "pretrained" not in options:
                raise UniadFastError(f"{name} has no feature levels {out_indices}: {error or 'too high'}") from error
            raise


def create_without_values(name: str, image_size: ImageSize, out_indices: tuple[int, ...] | None) -> Any:
    """The extractor with tensors that have no memory, for a state dict to be assigned to; None where that can't be.

    Some models compute with what they make, or keep tensors that no state dict has: those are made for real.
    """
    import timm  # noqa: F401  here, for on the device below torch 2.6 can't import what timm imports

    try:
        with without_values():
            features = create(name, image_size, out_indices)
    except (NotImplementedError, RuntimeError):
        return None
    stored = features.state_dict()
    whole = all(n in stored for n, _ in (*features.named_parameters(), *features.named_buffers()))
    return features if whole else None


def tensors_of_whole(name: str, image_size: ImageSize) -> StateDict:
    """The state dict of the classifier that the features are of: names and shapes, no values.

    Without the counters of batches, which only training reads and which some files leave out.
    """
    import timm

    with torch.device("meta"):
        state = timm.create_model(name, **_size_options(name, image_size)).state_dict()
    return {n: t for n, t in state.items() if not n.endswith("num_batches_tracked")}


def _size_options(name: str, image_size: ImageSize) -> dict[str, Any]:
    """`img_size` for those models that are built for one input size."""
    import timm

    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if config is None or not config.fixed_input_size:
        return {}
    height, width = size_of(image_size)
    return {"img_size": height if height == width else (height, width)}  # some models take a side alone


def stage_channels(name: str, image_size: ImageSize) -> list[tuple[int, int, int]]:
    """(feature level, stride, channels) of all that a timm model has."""
    import timm  # noqa: F401  here, for on the device below torch 2.6 can't import what timm imports

    with torch.device("meta"):
        info = create(name, image_size, None).feature_info
    return list(zip(info.out_indices, info.reduction(), info.channels(), strict=True))


def default_out_indices(name: str, image_size: ImageSize) -> tuple[int, ...]:
    levels = tuple(index for index, stride, _ in stage_channels(name, image_size) if stride <= _COARSEST_STRIDE)
    if not levels:
        raise UniadFastError(f"{name} has no features of stride {_COARSEST_STRIDE} or finer: pass out_indices")
    return levels


@contextlib.contextmanager
def _quiet(logger_name: str) -> Iterator[None]:
    """No warnings from that logger: timm's says that a feature extractor leaves out the classifier, as it must."""
    logger = logging.getLogger(logger_name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
