"""Checkpoints of other codebases: recognised by their tensors' names, loaded whole or not at all, and written back.

layout            backbone                             network             pads for
"uniad"           backbone.*, EfficientNet-PyTorch's   reconstruction.*    the size that the backbone was made for
"ader"            net_backbone.*, timm's               net_ad.*            the image
"reconstruction"  none                                 transformer.* ...
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..detect.detector import AnomalyDetector
from ..detect.public_config import IMAGENET, check_stored_network, read_config
from ..detect.settings import DetectorSettings
from ..files import atomic_path, save_tensors
from ..image_size import ImageSize, Size, in_words, size_of
from ..models.architecture import Architecture, read_architecture
from ..models.backbone import Backbone
from ..models.efficientnet import has_public_names, native_size, public_names, recognize
from ..models.timm_features import stage_channels
from ..models.uniad import UniAD
from ..printable import printable
from ..state_dicts import StateDict, WeightsError, check_state_dict, part_of, read_checkpoint
from ..training.build import build_model
from ..training.recipes import PAPER

_PREFIXES = {
    "uniad": ("backbone.", "reconstruction."),
    "ader": ("net_backbone.", "net_ad."),
    "reconstruction": ("", ""),
}
LAYOUTS = tuple(_PREFIXES)
_STRIDE = 16  # of every public configuration's neck


class NotInTensors(NamedTuple):
    """What the tensors of a network do not tell of it.

    nhead: attention heads. neighbor_size: (h, w) of the hidden window; None for half of the grid. grid: (H, W), which
    learned positions do tell; None for a square.
    """

    nhead: int = 8
    neighbor_size: Size | None = None
    grid: Size | None = None


_USUAL = NotInTensors()


def load(
    path: str | os.PathLike,
    *,
    config: str | os.PathLike | Mapping[str, Any] | None = None,
    backbone: str | None = None,
    backbone_weights: str | os.PathLike | None = None,
    image_size: ImageSize | None = None,
    not_in_tensors: NotInTensors = _USUAL,
    device: str | torch.device | None = None,
    impl: str | None = None,
) -> AnomalyDetector:
    """The detector that a checkpoint holds, ready for use.

    That of a training checkpoint of the public UniAD code or of ADer scores images as the original does: L2 norm,
    maximum of the average-pooled map, ImageNet's normalisation, the public backbone's padding. It has no threshold
    until `calibrate` is called with good images. The weights of a network alone give one with `backbone`.

    Sizes and numbers of layers are read off the tensors. Of what the file has beside them, nothing is built.

    Args:
        config: the public code's configuration that belongs to the checkpoint: says heads, window and the like.
        backbone: timm name; needed where the checkpoint's is no EfficientNet, and for a network alone.
        backbone_weights: its weights, if the checkpoint has none; see `Backbone.pretrained`.
        image_size: of the images in pixels, a side or (height, width); None for the feature map's times its stride.
        not_in_tensors: heads and window, where no configuration says them; the grid follows from the image size.
        device, impl: as in `AnomalyDetector`.

    Raises:
        WeightsError: unreadable, of no known layout, no whole detector, or tensors that do not fit, all listed.
        BundleError, ConfigError: a folder that is no bundle, a configuration that can't be followed.
    """
    if Path(path).is_dir():
        return AnomalyDetector.load(path, device, impl)
    found = _read(path)
    if found.layout == "backbone":
        raise WeightsError(f"{path} holds a backbone alone: it is for train --backbone-weights, not for a detector")
    said = read_config(config) if config is not None else None
    seen = image_size or (said.image_size if said else None)
    if seen is not None:
        height, width = size_of(seen)
        not_in_tensors = not_in_tensors._replace(grid=(-(-height // _STRIDE), -(-width // _STRIDE)))
    model, architecture, channels = _network(found, said, not_in_tensors, impl, path)
    name = backbone or (said.backbone if said else None)
    if found.layout == "reconstruction" and name is None:
        raise WeightsError(f"{path} holds a network alone: name the backbone whose features it takes, with --backbone")
    name, grid = name or recognize(found.backbone), model.feature_size
    size = size_of(image_size or (grid[0] * _STRIDE, grid[1] * _STRIDE))
    levels = _levels(name, size, channels, said)
    if found.layout == "reconstruction":
        frozen = Backbone.pretrained(name, size, backbone_weights, levels, _STRIDE)
    else:
        padded_for = native_size(name) if has_public_names(found.backbone) else None
        frozen = Backbone.from_state(name, size, levels, found.backbone, padded_for, _STRIDE)
    frozen.normalize_by(*(said.normalization if said and said.normalization else IMAGENET))
    if (given := frozen.feature_size(size)) != grid:
        raise WeightsError(f"{path} has a grid of {grid}, but images of {in_words(size)} pixels give {given}")
    return AnomalyDetector.from_parts(
        frozen, model, image_size=size, architecture=architecture, device=device, impl=impl
    )


def load_network(path: str | os.PathLike, not_in_tensors: NotInTensors = _USUAL, impl: str | None = None) -> UniAD:
    """The network of a checkpoint, of whatever layout, in evaluation mode.

    Raises:
        WeightsError: unreadable, of no known layout, without a network, or tensors that do not fit, all listed.
    """
    found = _read(path)
    if found.layout == "backbone":
        raise WeightsError(f"{path} holds a backbone, and no network")
    return _network(found, None, not_in_tensors, impl, path)[0].eval()


def load_backbone(
    path: str | os.PathLike, backbone: str | None = None, image_size: ImageSize | None = None
) -> Backbone:
    """The backbone that a file of its own holds.

    Args:
        backbone: timm name; None recognises an EfficientNet.
        image_size: as of `load`; None for that which it was made for.

    Raises:
        WeightsError: unreadable, no backbone, or tensors that do not fit, all listed.
    """
    found = _read(path)
    if found.layout != "backbone":
        raise WeightsError(f"{path} holds more than a backbone")
    name = backbone or recognize(found.backbone)
    return Backbone.from_state(name, image_size or native_size(name) or 224, None, found.backbone)


class _Found(NamedTuple):
    """The tensors of a checkpoint, and the record of its networks beside them, if there is one."""

    layout: str  # one of LAYOUTS, or "backbone"
    backbone: StateDict
    network: StateDict
    stored: Any


def _read(path: str | os.PathLike) -> _Found:
    state, stored = read_checkpoint(path)
    if has_public_names(state) or "conv_stem.weight" in state:
        return _Found("backbone", state, {}, stored)
    layout = _layout_of(state, path)
    backbone, network = (part_of(state, prefix) for prefix in _PREFIXES[layout])
    return _Found(layout, backbone, network, stored)


def _network(
    found: _Found,
    said: DetectorSettings | None,
    not_in_tensors: NotInTensors,
    impl: str | None,
    path: str | os.PathLike,
) -> tuple[UniAD, Architecture, int]:
    """(the network, its architecture, channels of the feature map)."""
    if found.stored is not None:
        check_stored_network(found.stored, path)
    architecture, channels, feature_size = read_architecture(found.network, *not_in_tensors)
    if said is not None:
        architecture = said.architecture
    model = build_model(channels, _STRIDE, feature_size, PAPER, impl, architecture)
    check_state_dict(found.network, model.state_dict(), f"the network's tensors in {path}")
    model.load_state_dict(found.network)
    return model, architecture, channels


def save(detector: AnomalyDetector | UniAD, path: str | os.PathLike, layout: str = "uniad") -> list[str]:
    """Write a detector, or for the layout "reconstruction" a network, under the names of another codebase.

    Features that our training standardises are undone in the two projections. The classifier behind the backbone's
    features is not there; the public code loads without.

    Args:
        path: .safetensors, or any other suffix for a torch file.
        layout: "uniad", "ader" or "reconstruction".

    Returns:
        What will differ there from here, a sentence each; empty if nothing does.

    Raises:
        WeightsError: unknown layout, or one that needs a backbone for a network that has none; a file is there already.
    """
    path = Path(path)
    if path.exists():
        raise WeightsError(f"{path} is there already, and is not overwritten: choose another name")
    if not path.parent.is_dir():
        raise WeightsError(f"{path.parent} is not a folder to write {path.name} to")
    if layout not in LAYOUTS:
        raise WeightsError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    backbone_prefix, prefix = _PREFIXES[layout]
    differs: list[str] = []
    if isinstance(detector, UniAD):
        if layout != "reconstruction":
            raise WeightsError(f"layout {layout!r} holds a backbone, and a UniAD has none: save an AnomalyDetector")
        state = dict(detector.state_dict())
    else:
        state = {f"{prefix}{name}": tensor for name, tensor in _unstandardized(detector).items()}
        frozen = detector.pipeline.backbone
        if layout != "reconstruction":
            own = frozen.features.state_dict()
            names = public_names(own) if layout == "uniad" and "conv_stem.weight" in own else {}
            state |= {f"{backbone_prefix}{names.get(name, name)}": tensor for name, tensor in own.items()}
        differs = _what_differs(detector, layout)
    wrapper = "module." if layout == "uniad" else ""
    state = {f"{wrapper}{name}": tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with atomic_path(path) as partial:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file(state, partial)
        else:
            wrapped = {"uniad": {"state_dict": state, "epoch": 0, "best_metric": 0.0}, "ader": {"net": state}}
            save_tensors(wrapped.get(layout, state), partial)
    return differs


def _layout_of(state: StateDict, path: str | os.PathLike) -> str:
    """By the prefixes of its names."""
    for layout in ("uniad", "ader"):
        prefixes = _PREFIXES[layout]
        if all(part_of(state, prefix) for prefix in prefixes):
            strangers = [name for name in state if not name.startswith(prefixes)]
            if strangers:
                raise WeightsError(
                    f"{path} has {len(strangers)} tensors that are neither the backbone's nor the network's:\n  "
                    + "\n  ".join(f"unexpected {printable(n)} {tuple(state[n].shape)}" for n in strangers[:40])
                )
            return layout
    if "input_proj.weight" in state:
        return "reconstruction"
    some = ", ".join(map(printable, list(state)[:4]))
    raise WeightsError(
        f"{path} is of no known layout: it has neither backbone.* and reconstruction.* (the public UniAD), nor "
        f"net_backbone.* and net_ad.* (ADer), nor a UniAD network's or an EfficientNet's tensors, but {some}, ..."
    )


def _levels(name: str, image_size: Size, channels: int, said: DetectorSettings | None) -> tuple[int, ...]:
    """The feature levels, one after the other, whose channels add up to those of the network."""
    if said is not None and said.out_indices is not None:
        return said.out_indices
    stages = stage_channels(name, image_size)
    for end in range(len(stages), 0, -1):  # the CIFAR-10 configurations take the stage of stride 32 too
        for start in range(end):
            part = stages[start:end]
            if part[-1][1] >= _STRIDE and sum(count for _, _, count in part) == channels:
                return tuple(index for index, _, _ in part)
    counts = ", ".join(str(count) for _, _, count in stages)
    raise WeightsError(f"the network takes {channels} channels, which the stages of {name} ({counts}) do not add up to")


def _unstandardized(detector: AnomalyDetector) -> StateDict:
    """The network's tensors for features as the backbone gives them: mean and deviation go into the projections."""
    pipeline = detector.pipeline
    state, mean, std = dict(pipeline.model.state_dict()), pipeline.mean, pipeline.std
    weight = state["input_proj.weight"] / std
    state["input_proj.bias"] = state["input_proj.bias"] - weight @ mean
    state["input_proj.weight"] = weight
    state["output_proj.weight"] = state["output_proj.weight"] * std[:, None]
    state["output_proj.bias"] = state["output_proj.bias"] * std + mean
    return state


def _what_differs(detector: AnomalyDetector, layout: str) -> list[str]:
    pipeline = detector.pipeline
    frozen, kind = pipeline.backbone, pipeline.residual_score.kind
    differs = []
    if kind != "l2" or not torch.equal(pipeline.std, torch.ones_like(pipeline.std)):
        differs.append(
            "scores: there the L2 norm of the residual of all channels as they are, here "
            + (kind if kind != "l2" else "of standardised ones")
        )
    side = native_size(frozen.name)
    if layout == "uniad" and side is not None and frozen.padded_for is None and (side, side) != pipeline.image_size:
        differs.append(f"features: the public backbone pads for images of {side} pixels, this one for those that come")
    if layout == "ader" and frozen.padded_for is not None:
        differs.append(f"features: ADer's backbone pads for the image that comes, this one for {frozen.padded_for}")
    if frozen.mean.flatten().tolist() != torch.tensor(IMAGENET[0]).tolist():
        differs.append(f"input: normalise images with mean {frozen.mean.flatten().tolist()}, not ImageNet's")
    return differs
