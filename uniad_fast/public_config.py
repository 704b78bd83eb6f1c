"""The public code's configuration (config.yaml): what of it says how a detector is built and trained."""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .architecture import Architecture
from .recipes import PAPER, Recipe

_NETWORKS = ("models.reconstructions.UniAD", "uniad_fast.UniAD")
_FOLLOW_FROM_THE_FEATURES = {"inplanes", "instrides", "feature_size"}
_DO_NOT_MATTER_HERE = {"save_recon", "initializer"}


class ConfigError(ValueError):
    """A configuration that can't be followed; the message says which entry, and why."""


@dataclass(frozen=True)
class PublicConfig:
    """What `read_config` found. mean, std: of the channels of images in [0, 1]."""

    backbone: str
    out_indices: tuple[int, ...]
    image_size: int
    architecture: Architecture
    recipe: Recipe
    mean: tuple[float, ...]
    std: tuple[float, ...]


def read_config(source: str | os.PathLike | Mapping[str, Any]) -> PublicConfig:
    """A configuration file, or what it holds, e.g. {"net": [...]}.

    Of `net`, the backbone, the neck and the reconstruction with all its arguments; of `dataset`, input size, batch size
    and normalisation; of `trainer`, epochs, learning rate, weight decay and clipping. What is missing outside of `net`
    is as in the published configuration of MVTec AD.

    Raises:
        ConfigError: no file, no YAML, or an entry that can't be followed.
    """
    config = source if isinstance(source, Mapping) else _read_yaml(Path(source))
    where = "the configuration" if isinstance(source, Mapping) else str(source)
    try:
        networks = {part["name"]: part for part in config["net"]}
        backbone, out_indices = _backbone(networks["backbone"])
        strides = networks["neck"]["kwargs"]["outstrides"]
        architecture, recipe = _reconstruction(networks["reconstruction"], _trained(config))
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{where} is not one of the public code's: {error} is missing or malformed") from None
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    if list(strides) != [16]:
        raise ConfigError(f"{where}: neck.outstrides must be [16], got {strides}")
    dataset = config.get("dataset", {})
    height, width = dataset.get("input_size", (224, 224))
    if height != width:
        raise ConfigError(f"{where}: dataset.input_size must be square, got {height} x {width}")
    mean = tuple(dataset.get("pixel_mean", (0.485, 0.456, 0.406)))
    std = tuple(dataset.get("pixel_std", (0.229, 0.224, 0.225)))
    return PublicConfig(backbone, out_indices, height, architecture, recipe, mean, std)


def _read_yaml(path: Path) -> Mapping[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no configuration file at {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a YAML file: {error}") from None
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path} is not one of the public code's configurations: it holds no mapping")
    return content


def _backbone(part: Mapping[str, Any]) -> tuple[str, tuple[int, ...]]:
    """(timm name, feature levels): the public code counts an EfficientNet's stages from 1, a ResNet's layers too."""
    kind = part["type"].rpartition(".")[2]
    layers = part["kwargs"]["outlayers"]
    if kind.startswith("efficientnet_b"):
        return f"tf_{kind}", tuple(layer - 1 for layer in layers)
    if kind in ("resnet18", "resnet34", "resnet50", "resnet101", "wide_resnet50_2"):
        return kind, tuple(layers)
    raise ConfigError(f"backbone.type {part['type']!r} is not known here")


def _reconstruction(part: Mapping[str, Any], recipe: Recipe) -> tuple[Architecture, Recipe]:
    if part["type"] not in _NETWORKS:
        raise ConfigError(f"reconstruction.type must be one of {', '.join(_NETWORKS)}, got {part['type']!r}")
    kwargs = {k: v for k, v in part["kwargs"].items() if k not in _FOLLOW_FROM_THE_FEATURES | _DO_NOT_MATTER_HERE}
    jitter = kwargs.pop("feature_jitter", None) or {"scale": 0.0, "prob": 0.0}
    masked = kwargs.pop("neighbor_mask", None)
    recipe = dataclasses.replace(
        recipe,
        dropout=kwargs.pop("dropout", 0.1),
        jitter_scale=float(jitter["scale"]),
        jitter_prob=float(jitter["prob"]),
    )
    own: dict[str, Any] = {"mask": (False, False, False)}
    if masked:
        own = {"neighbor_size": tuple(masked["neighbor_size"]), "mask": tuple(masked["mask"])}
    try:
        return Architecture(**kwargs, **own), recipe
    except TypeError as error:
        raise ConfigError(f"reconstruction.kwargs: {error}") from None


def _trained(config: Mapping[str, Any]) -> Recipe:
    """The paper's recipe with what the configuration says of training."""
    trainer = config.get("trainer", {})
    optimizer = trainer.get("optimizer", {"type": "AdamW"})
    if optimizer["type"] != "AdamW":
        raise ConfigError(f"trainer.optimizer.type must be AdamW, got {optimizer['type']!r}")
    options = optimizer.get("kwargs", {})
    return dataclasses.replace(
        PAPER,
        epochs=trainer.get("max_epoch", PAPER.epochs),
        clip=trainer.get("clip_max_norm", PAPER.clip),
        batch_size=config.get("dataset", {}).get("batch_size", PAPER.batch_size),
        learning_rate=options.get("lr", PAPER.learning_rate),
        weight_decay=options.get("weight_decay", PAPER.weight_decay),
    )
