"""The public code's configuration (config.yaml): what of it says how a detector is built and trained."""

import dataclasses
import inspect
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UniadFastError
from ..models.architecture import Architecture
from ..models.uniad import UniAD
from ..printable import printable
from ..training.recipes import PAPER, Recipe
from .settings import DetectorSettings

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and deviation of its images' channels, which the public code normalises by."""
_NETWORKS = ("models.reconstructions.UniAD", "uniad_fast.UniAD")
_FOLLOW_FROM_THE_FEATURES = {"inplanes", "instrides", "feature_size"}
_VARIED = ("hflip", "vflip", "rotate", "colorjitter", "random_color")
_DO_NOT_MATTER_HERE = {"save_recon", "initializer"}


class ConfigError(UniadFastError):
    """A configuration that can't be followed; the message says which entry, and why."""


def read_config(source: str | os.PathLike | Mapping[str, Any]) -> DetectorSettings:
    """The settings that a configuration file says, or what it holds, e.g. {"net": [...]}.

    Of `net`, the backbone, the neck and the reconstruction with all its arguments; of `dataset`, input size, batch size
    and normalisation; of `trainer`, epochs, learning rate and its fall, weight decay and clipping; of `evaluator`, how
    maps become numbers. Flips, rotations and colours that a run would vary are refused. What is missing outside of
    `net` is as in the published configuration of MVTec AD.

    Raises:
        ConfigError: no file, no YAML, or an entry that can't be followed.
    """
    config = source if isinstance(source, Mapping) else _read_yaml(Path(source))
    where = "the configuration" if isinstance(source, Mapping) else str(source)
    try:
        return _followed(config)
    except KeyError as error:
        raise ConfigError(f"{where} is not one of the public code's: {error} is missing") from None
    except UniadFastError as error:
        raise ConfigError(f"{where}: {error}") from None


def check_stored_network(stored: Any, path: str | os.PathLike) -> None:
    """Refuse a checkpoint whose own record of the networks, as the public code stores it, names another network.

    Forks of the public code keep its tensors' names and compute something else with them: where the record says so, it
    is believed. A fork that keeps the name of the class as well can't be told.

    Raises:
        ConfigError: it names a network that is not UniAD's, or arguments that UniAD has not.
    """
    parts = stored if isinstance(stored, list) else []
    for part in parts:
        if not isinstance(part, Mapping) or part.get("name") != "reconstruction":
            continue
        kind = part.get("type")
        if kind not in _NETWORKS:
            raise ConfigError(
                f"{path} was trained as {_short(kind)}, which is not UniAD's network: it is not converted"
            )
        kwargs = part.get("kwargs")
        known = {*inspect.signature(UniAD.__init__).parameters, *_FOLLOW_FROM_THE_FEATURES}
        if isinstance(kwargs, Mapping) and (unknown := sorted(set(map(str, kwargs)) - known)):
            raise ConfigError(
                f"{path} was trained with arguments that UniAD has not ({', '.join(map(printable, unknown))}), so by a "
                "fork of it: it is not converted"
            )


def _followed(config: Mapping[str, Any]) -> DetectorSettings:
    parts = config["net"]
    if not isinstance(parts, list) or not all(
        isinstance(part, Mapping) and isinstance(part.get("name"), str) for part in parts
    ):
        raise ConfigError(f"net must be a list of networks with names, got {_short(parts)}")
    networks = {part["name"]: part for part in parts}
    backbone, out_indices = _backbone(_mapping("net", networks, "backbone"))
    neck = _mapping("neck", _mapping("net", networks, "neck"), "kwargs")
    strides = neck["outstrides"]
    if not isinstance(strides, list) or strides != [16]:
        raise ConfigError(f"neck.outstrides must be [16], got {_short(strides)}")
    architecture, recipe = _reconstruction(_mapping("net", networks, "reconstruction"), _trained(config))
    dataset = _mapping("", config, "dataset", {})
    size = dataset.get("input_size", [224, 224])
    if not isinstance(size, (list, tuple)) or len(size) != 2 or not all(type(n) is int and n > 0 for n in size):
        raise ConfigError(f"dataset.input_size must be [height, width], two integers, got {_short(size)}")
    ignored = sorted(name for name in _VARIED if _is_on(config, name))
    if ignored:
        raise ConfigError(f"dataset.{ignored[0]}: images are learnt as they are, without {', '.join(ignored)}")
    return DetectorSettings(
        backbone,
        (size[0], size[1]),
        out_indices,
        stride=16,
        normalization=(
            _channels("pixel_mean", dataset.get("pixel_mean", IMAGENET[0]), lowest=None),
            _channels("pixel_std", dataset.get("pixel_std", IMAGENET[1]), lowest=1e-6),
        ),
        recipe=recipe,
        architecture=architecture,
        image_score=_image_score(_mapping("", config, "evaluator", {}).get("key_metric")),
    )


def _is_on(config: Mapping[str, Any], name: str) -> bool:
    dataset = config.get("dataset") or {}
    places = [dataset, dataset.get("train") or {}]
    return any(isinstance(place, Mapping) and place.get(name) not in (None, False, 0) for place in places)


def _image_score(key_metric: Any) -> str:
    """How a map becomes a number: "mean" where the configuration is measured by it (CIFAR-10), else the maximum."""
    if key_metric is None:
        return "max"
    kind = str(key_metric).removesuffix("_auc").rpartition("_")[2]
    return kind if kind in ("mean", "std") else "max"


def _mapping(where: str, config: Mapping[str, Any], name: str, missing: Any = None) -> Mapping[str, Any]:
    """config[name], which must be a mapping; `missing` where it is not there, KeyError without one."""
    value = config[name] if missing is None else config.get(name, missing)
    if not isinstance(value, Mapping):
        raise ConfigError(f"{f'{where}.' if where else ''}{name} must be a mapping, got {_short(value)}")
    return value


def _number(name: str, value: Any) -> float:
    """A number; PyYAML takes 1e-4 for text, which here is a number too."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{name} must be a number, got {_short(value)}") from None


def _integer(name: str, value: Any) -> int:
    if type(value) is not int:
        raise ConfigError(f"{name} must be an integer, got {_short(value)}")
    return value


def _channels(name: str, value: Any, lowest: float | None) -> tuple[float, ...]:
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        raise ConfigError(f"dataset.{name} must be three numbers, got {_short(value)}")
    numbers = tuple(_number(f"dataset.{name}", n) for n in value)
    if not all(math.isfinite(n) and (lowest is None or n >= lowest) for n in numbers):
        raise ConfigError(
            f"dataset.{name} must be finite{'' if lowest is None else ' and above 0'}, got {_short(value)}"
        )
    return numbers


def _short(value: Any) -> str:
    text = repr(value)
    return printable(text[:80]) + ("..." if len(text) > 80 else "")


def _read_yaml(path: Path) -> Mapping[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no configuration file at {path}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else printable(error)
        raise ConfigError(f"{path} is not a YAML file: {reason}") from None
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path} is not one of the public code's configurations: it holds no mapping")
    return content


def _backbone(part: Mapping[str, Any]) -> tuple[str, tuple[int, ...]]:
    """(timm name, feature levels): the public code counts an EfficientNet's stages from 1, a ResNet's layers too."""
    kind = str(part["type"]).rpartition(".")[2]
    layers = _mapping("backbone", part, "kwargs")["outlayers"]
    if not isinstance(layers, list) or not layers or not all(type(n) is int and 1 <= n <= 5 for n in layers):
        raise ConfigError(f"backbone.kwargs.outlayers must be numbers of layers from 1 to 5, got {_short(layers)}")
    if kind.startswith("efficientnet_b"):
        return f"tf_{kind}", tuple(layer - 1 for layer in layers)
    if kind in ("resnet18", "resnet34", "resnet50", "resnet101", "wide_resnet50_2"):
        return kind, tuple(layers)
    raise ConfigError(f"backbone.type {part['type']!r} is not known here")


def _reconstruction(part: Mapping[str, Any], recipe: Recipe) -> tuple[Architecture, Recipe]:
    if part["type"] not in _NETWORKS:
        raise ConfigError(f"reconstruction.type must be one of {', '.join(_NETWORKS)}, got {part['type']!r}")
    given = _mapping("reconstruction", part, "kwargs")
    left_out = _FOLLOW_FROM_THE_FEATURES | _DO_NOT_MATTER_HERE
    kwargs: dict[str, Any] = {name: value for name, value in given.items() if name not in left_out}
    jitter = kwargs.pop("feature_jitter", None) or {"scale": 0.0, "prob": 0.0}
    jitter = _mapping("reconstruction", {"feature_jitter": jitter}, "feature_jitter")
    masked = kwargs.pop("neighbor_mask", None)
    recipe = dataclasses.replace(
        recipe,
        dropout=_number("dropout", kwargs.pop("dropout", 0.1)),
        jitter_scale=_number("feature_jitter.scale", jitter["scale"]),
        jitter_prob=_number("feature_jitter.prob", jitter["prob"]),
    )
    own: dict[str, Any] = {"mask": (False, False, False)}
    if masked:
        masked = _mapping("reconstruction", {"neighbor_mask": masked}, "neighbor_mask")
        size, flags = masked["neighbor_size"], masked["mask"]
        if not isinstance(size, (list, tuple)) or not isinstance(flags, (list, tuple)):
            raise ConfigError(f"neighbor_mask must have lists neighbor_size and mask, got {_short(masked)}")
        own = {"neighbor_size": tuple(size), "mask": tuple(bool(flag) for flag in flags)}
    try:
        return Architecture(**kwargs, **own), recipe
    except TypeError as error:
        raise ConfigError(f"reconstruction.kwargs: {error}") from None


def _trained(config: Mapping[str, Any]) -> Recipe:
    """The paper's recipe with what the configuration says of training."""
    trainer = _mapping("", config, "trainer", {})
    optimizer = _mapping("trainer", trainer, "optimizer", {"type": "AdamW"})
    if optimizer.get("type") != "AdamW":
        raise ConfigError(f"trainer.optimizer.type must be AdamW, got {_short(optimizer.get('type'))}")
    options = _mapping("trainer.optimizer", optimizer, "kwargs", {})
    schedule = _mapping("trainer", trainer, "lr_scheduler", {"type": "StepLR"})
    epochs = _integer("trainer.max_epoch", trainer.get("max_epoch", PAPER.epochs))
    if schedule.get("type") != "StepLR":
        raise ConfigError(f"trainer.lr_scheduler.type must be StepLR, got {_short(schedule.get('type'))}")
    steps = _mapping("trainer.lr_scheduler", schedule, "kwargs", {})
    step_size = _number("step_size", steps.get("step_size", round(0.8 * epochs)))
    gamma = _number("gamma", steps.get("gamma", 0.1))
    falls = step_size < epochs and gamma != 1
    if falls and (abs(step_size - 0.8 * epochs) > 1 or gamma != 0.1):
        raise ConfigError(
            f"trainer.lr_scheduler must divide the rate by 10 after 80% of max_epoch {epochs}, or not within it, got "
            f"step_size {step_size:g} and gamma {gamma:g}"
        )
    return dataclasses.replace(
        PAPER,
        epochs=epochs,
        schedule="step" if falls else "constant",
        clip=_number("trainer.clip_max_norm", trainer.get("clip_max_norm", PAPER.clip)),
        batch_size=_integer(
            "dataset.batch_size", _mapping("", config, "dataset", {}).get("batch_size", PAPER.batch_size)
        ),
        learning_rate=_number("lr", options.get("lr", PAPER.learning_rate)),
        weight_decay=_number("weight_decay", options.get("weight_decay", PAPER.weight_decay)),
    )
