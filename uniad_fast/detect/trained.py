"""A trained detector in a bundle: what of it is written, and how it is put together again."""

import dataclasses
import os
from typing import Any, NamedTuple

from ..errors import UniadFastError
from ..models.backbone import Backbone
from ..printable import printable_lines
from ..state_dicts import StateDict, assign, check_state_dict, part_of, without_values
from .bundle import BundleError, read_bundle, read_log, write_bundle
from .calibration import Calibration
from .fitting import new_model, new_pipeline
from .pipeline import Pipeline
from .settings import DetectorSettings

_FEATURES = "backbone.features."
_LARGEST = 4096  # pixels a side


class Trained(NamedTuple):
    """A trained detector without what belongs to one machine."""

    settings: DetectorSettings
    pipeline: Pipeline
    calibration: Calibration | None
    classes: list[str]
    training_log: str


def save_trained(directory: str | os.PathLike, trained: Trained) -> None:
    """Write a bundle, replacing one that is there.

    Raises:
        BundleError: `directory` exists and is no bundle.
        UniadFastError: a parameter is not finite.
    """
    backbone = trained.pipeline.backbone
    settings = dataclasses.replace(trained.settings, out_indices=backbone.out_indices, stride=backbone.stride)
    config = {
        "settings": settings.to_json(),
        "padded_for": backbone.padded_for,
        "feature_size": trained.pipeline.model.feature_size,
        "classes": trained.classes,
        "calibration": dataclasses.asdict(trained.calibration) if trained.calibration else None,
    }
    write_bundle(directory, trained.pipeline.state_dict(), config, trained.training_log)


def load_trained(directory: str | os.PathLike, impl: str | None = None) -> Trained:
    """What a bundle holds, on the CPU. Nothing is computed, and nothing initialised that is then overwritten.

    Raises:
        BundleError: missing, damaged, or not a bundle; says what is wrong.
    """
    with read_bundle(directory) as (tensors, config):
        try:
            return _put_together(tensors, config, read_log(directory), impl)
        except KeyError as error:
            raise BundleError(f"{directory} is a damaged bundle: {error} is missing in its configuration") from error
        except (TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
            raise BundleError(f"{directory} is a damaged bundle: {printable_lines(error)}") from error


def _put_together(tensors: StateDict, config: dict[str, Any], log: str, impl: str | None) -> Trained:
    settings = DetectorSettings.from_json(config["settings"])
    padded_for, classes = config["padded_for"], config["classes"]
    height, width = config["feature_size"]
    if padded_for is not None and not (type(padded_for) is int and 1 <= padded_for <= _LARGEST):
        raise UniadFastError(f"padded_for must be a side in pixels, got {padded_for!r}")
    if not all(type(n) is int and 1 <= n <= settings.image_size for n in (height, width)):
        raise UniadFastError(f"feature_size must be (height, width) in tokens, got {config['feature_size']!r}")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UniadFastError(f"classes must be a list of names, got {classes!r}")
    size, stride = settings.image_size, settings.stride
    # Convolutions round up or down; a map that is off by more is of images of another size.
    if stride is None or any(abs(n * stride - size) >= 2 * stride for n in (height, width)):
        raise UniadFastError(f"feature_size {height} x {width} is not of images of {size} pixels at stride {stride}")
    features = part_of(tensors, _FEATURES)
    backbone = Backbone.from_state(settings.backbone, size, settings.out_indices, features, padded_for, stride)
    with without_values():
        model = new_model(settings, backbone, (height, width), impl)
    if any(buffer.is_meta for buffer in model.buffers()):  # sines, which no state dict has
        model = new_model(settings, backbone, (height, width), impl)
    pipeline = new_pipeline(settings, backbone, model)
    # The features have theirs, in the memory format that they are fast in.
    rest, own = (
        {name: t for name, t in state.items() if not name.startswith(_FEATURES)}
        for state in (tensors, pipeline.state_dict())
    )
    check_state_dict(rest, own, "the bundle's tensors")
    assign(pipeline, rest)
    stored = config["calibration"]
    calibration = None if stored is None else Calibration.from_json(stored)
    return Trained(settings, pipeline, calibration, classes, log)
