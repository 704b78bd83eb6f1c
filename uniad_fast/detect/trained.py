"""A trained detector in a bundle: what of it is written, and how it is put together again."""

import dataclasses
import os
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..errors import UniadFastError
from ..image_size import LARGEST, in_words
from ..models.backbone import Backbone
from ..printable import printable, printable_lines
from ..state_dicts import StateDict, assign, check_state_dict, part_of, without_values
from .bundle import BundleError, read_bundle, read_log, write_bundle
from .calibration import Calibration
from .fitting import new_model, new_pipeline
from .pipeline import Pipeline
from .settings import DetectorSettings

_FEATURES = "backbone.features."
_LISTED = 20
_DIRECTIONS = "residual_score.gaussians.directions"
_RANKS = "residual_score.gaussians.ranks"


@dataclass(frozen=True)
class Recognition:
    """How classes are recognized, of good images by a recognizer that they had no part in.

    Attributes:
        images: of them.
        wrong, unsure: taken for another class, and for none.

    Raises:
        UniadFastError: these are no counts.
    """

    images: int
    wrong: int
    unsure: int

    def __post_init__(self) -> None:
        counts = (self.images, self.wrong, self.unsure)
        if not all(type(n) is int and n >= 0 for n in counts) or self.wrong + self.unsure > self.images:
            raise UniadFastError(f"the counts of recognized images are out of range: {self}")


class Trained(NamedTuple):
    """A trained detector without what belongs to one machine.

    `classes` are their names, by number; none where the detector knows none. `trained_with` says what the settings
    leave to the machine, as it was.
    """

    settings: DetectorSettings
    pipeline: Pipeline
    calibration: Calibration | None = None
    classes: tuple[str, ...] = ()
    recognition: Recognition | None = None
    trained_with: dict[str, str] = {}
    training_log: str = ""

    @property
    def names(self) -> list[str | None]:
        """Of each field's class; the last one of several is no class's."""
        return [*self.classes, None]

    def class_number(self, name: str) -> int:
        """The number of a class; UniadFastError where it is not known."""
        if name not in self.classes:
            listed = ", ".join(map(printable, self.classes[:_LISTED])) or "none"
            more = ", ..." if len(self.classes) > _LISTED else ""
            raise UniadFastError(f"the detector knows no class {printable(name)!r}; it knows {listed}{more}")
        return self.classes.index(name)


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
        "classes": list(trained.classes),
        "calibration": trained.calibration.to_json() if trained.calibration else None,
        "recognition": dataclasses.asdict(trained.recognition) if trained.recognition else None,
        "trained_with": trained.trained_with,
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
    if padded_for is not None and not (type(padded_for) is int and 1 <= padded_for <= LARGEST):
        raise UniadFastError(f"padded_for must be a side in pixels, got {padded_for!r}")
    stride, axes = settings.stride, list(zip((height, width), settings.image_size, strict=True))
    if not all(type(n) is int and 1 <= n <= side for n, side in axes):
        raise UniadFastError(f"feature_size must be (height, width) in tokens, got {config['feature_size']!r}")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UniadFastError(f"classes must be a list of names, got {classes!r}")
    if len(set(classes)) != len(classes):
        raise UniadFastError("classes must have different names")
    trained_with = config["trained_with"]
    if not isinstance(trained_with, dict) or not all(isinstance(text, str) for text in trained_with.values()):
        raise UniadFastError(f"trained_with must be a table of words, got {trained_with!r}")
    # Convolutions round up or down; a map that is off by more is of images of another size.
    if stride is None or any(abs(n * stride - side) >= 2 * stride for n, side in axes):
        size = in_words(settings.image_size)
        raise UniadFastError(f"feature_size {height} x {width} is not of images of {size} pixels at stride {stride}")
    features = part_of(tensors, _FEATURES)
    backbone = Backbone.from_state(
        settings.backbone, settings.image_size, settings.out_indices, features, padded_for, stride
    )
    with without_values():
        model = new_model(settings, backbone, (height, width), impl)
    if any(buffer.is_meta for buffer in model.buffers()):  # sines, which no state dict has
        model = new_model(settings, backbone, (height, width), impl)
    pipeline = new_pipeline(settings, backbone, model, max(1, len(classes)))
    _make_room(pipeline, tensors)
    # The features have theirs, in the memory format that they are fast in.
    rest, own = (
        {name: t for name, t in state.items() if not name.startswith(_FEATURES)}
        for state in (tensors, pipeline.state_dict())
    )
    check_state_dict(rest, own, "the bundle's tensors")
    assign(pipeline, rest)
    gaussians = pipeline.residual_score.gaussians
    if gaussians is not None and not gaussians.is_consistent:
        raise UniadFastError(f"{_RANKS} are not those of its directions")
    stored = config["calibration"]
    calibration = None if stored is None else Calibration.from_json(stored)
    if calibration is not None and len(calibration.images) != pipeline.fields:
        raise UniadFastError(
            f"the calibration is of {len(calibration.images)} fields, the detector of {pipeline.fields}"
        )
    stored = config["recognition"]
    recognition = None if stored is None else Recognition(**stored)
    return Trained(settings, pipeline, calibration, tuple(classes), recognition, trained_with, log)


def _make_room(pipeline: Pipeline, tensors: StateDict) -> None:
    """Let it have what the settings do not say: as many of the Gaussians' directions as stored, and where it looks."""
    if "roi" in tensors:
        pipeline.roi = torch.empty(pipeline.image_size, dtype=torch.bool, device="meta")
    if "places" in tensors and tensors["places"].ndim == 3:
        pipeline.places = torch.empty(pipeline.fields, *tensors["places"].shape[1:], device="meta")
    gaussians, stored = pipeline.residual_score.gaussians, tensors.get(_DIRECTIONS)
    if gaussians is not None and stored is not None and stored.ndim == 3:
        locations, channels = gaussians.directions.shape[0], gaussians.directions.shape[2]
        with torch.device("meta"):
            gaussians.directions = torch.empty(locations, stored.shape[1], channels, dtype=torch.float16)
            gaussians.signs = torch.empty(locations, stored.shape[1])
