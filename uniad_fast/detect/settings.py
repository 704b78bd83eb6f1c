"""The one list of a detector's choices: keywords build it, a bundle stores it, the command line fills it."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.feature_shards import PRECISIONS
from ..data.tiling import Tiling
from ..errors import UniadFastError
from ..image_size import Size, checked_size, in_json
from ..models.architecture import PAPER_ARCHITECTURE, Architecture
from ..training.recipes import RECIPES, Recipe
from .residual_score import IMAGE_SCORES, RESIDUAL_SCORES

# Of earlier releases, whose detectors were so.
_NOT_YET = {"feature_precision": "float32", "overlap": None, "aligned": False}
Normalization = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class DetectorSettings:
    """What a detector is and how it is trained, without what belongs to one machine (device, folders, implementation).

    Attributes:
        backbone: timm model whose frozen features are used; "tf_efficientnet_b4" is the paper's.
        image_size: (height, width) in pixels that every image is resized to, from 32 to 4096 each; an integer is taken
            for the side of a square.
        out_indices: feature levels, see `Backbone.pretrained`.
        stride: of the grid that all feature levels are resized to; None is the coarsest level's.
        normalization: (mean, deviation) of the channels of images in [0, 1]; None takes the backbone's own.
        recipe: how to train; the name of one is taken for it.
        architecture: of the network.
        residual_score: how a residual becomes a number, "l2" (the paper's), "whitened", "relative" or "gaussian"; see
            `uniad_fast.detect.residual_score`. None takes the recipe's.
        image_score: how a map becomes a number, "max" (the paper's), "mean" or "std".
        false_alarm_rate: share of good images that may score above the threshold, in (0, 1).
        held_out: share of the good images that the network is not trained on, in (0, 1).
        seed: of initial values, batch order, noise and the held-out choice.
        overlap: None resizes a picture to `image_size`; a share from 0 to 0.9 cuts it in tiles of that size at its own
            resolution, which overlap by that share of their sides. Sides are then multiples of 4 pixels.
        aligned: pictures in tiles show the same thing at the same place: a place is judged by what good pictures of the
            class have there.
        feature_precision: in which features of training images are kept, "float32", or at half the size "float16" or
            "bfloat16".

    Raises:
        UniadFastError: a value is out of range; says which.
    """

    backbone: str = "tf_efficientnet_b4"
    image_size: Size = (224, 224)
    out_indices: tuple[int, ...] | None = None
    stride: int | None = None
    normalization: Normalization | None = None
    recipe: Recipe = "fast"  # type: ignore[assignment]  # which the recipe of that name takes the place of
    architecture: Architecture = PAPER_ARCHITECTURE
    residual_score: str = ""
    image_score: str = "max"
    false_alarm_rate: float = 0.01
    held_out: float = 0.1
    seed: int = 0
    feature_precision: str = "float32"
    overlap: float | None = None
    aligned: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.recipe, str):
            if self.recipe not in RECIPES:
                raise UniadFastError(f"recipe must be one of {', '.join(RECIPES)}, got {self.recipe!r}")
            object.__setattr__(self, "recipe", RECIPES[self.recipe])
        if not self.residual_score:
            object.__setattr__(self, "residual_score", self.recipe.residual_score)
        if not isinstance(self.backbone, str):
            raise UniadFastError(f"backbone must be the name of a timm model, got {self.backbone!r}")
        object.__setattr__(self, "image_size", checked_size(self.image_size))
        if self.out_indices is not None:
            levels = self.out_indices
            if isinstance(levels, (str, int)) or not all(_is_int(level) and level >= 0 for level in levels):
                raise UniadFastError(f"out_indices must be feature levels, got {levels!r}")
            object.__setattr__(self, "out_indices", tuple(map(int, levels)))
        if self.stride is not None and (not _is_int(self.stride) or not 1 <= self.stride <= min(self.image_size)):
            raise UniadFastError(f"stride must be a number of pixels, got {self.stride!r}")
        choices = {"residual_score": RESIDUAL_SCORES, "image_score": IMAGE_SCORES, "feature_precision": PRECISIONS}
        for name, words in choices.items():
            if getattr(self, name) not in words:
                raise UniadFastError(f"{name} must be one of {', '.join(words)}, got {getattr(self, name)!r}")
        for name in ("false_alarm_rate", "held_out"):
            share = getattr(self, name)
            if not isinstance(share, (int, float)) or not 0 < share < 1:
                raise UniadFastError(f"{name} must be in (0, 1), got {share!r}")
        if not _is_int(self.seed) or not 0 <= self.seed < 2**63:
            raise UniadFastError(f"seed must be an integer from 0 to 2^63 - 1, got {self.seed!r}")
        object.__setattr__(self, "seed", int(self.seed))  # NumPy's are no JSON
        if not isinstance(self.aligned, bool) or (self.aligned and self.tiling is None):
            raise UniadFastError(
                f"aligned ({self.aligned!r}) is for pictures in tiles: give tiles too (--tile), or leave it out"
                if isinstance(self.aligned, bool)
                else f"aligned must be true or false, got {self.aligned!r}"
            )

    @property
    def tiling(self) -> Tiling | None:
        """How pictures are cut; None where they are resized."""
        return None if self.overlap is None else Tiling(self.image_size, self.overlap)

    def to_json(self) -> dict[str, Any]:
        """As JSON values, for `from_json`; without what earlier releases did not know, where it is as they had it."""
        content = dataclasses.asdict(self) | {"image_size": in_json(self.image_size)}
        content = {name: value for name, value in content.items() if name not in _NOT_YET or value != _NOT_YET[name]}
        if self.recipe.sampling == "all":
            del content["recipe"]["sampling"]
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "DetectorSettings":
        """From what `to_json` gave, after JSON made lists of the tuples.

        Raises:
            UniadFastError: a value is out of range.
            TypeError, KeyError: it is not what `to_json` gives.
        """
        values = dict(content)
        values["recipe"] = Recipe(**content["recipe"])
        values["architecture"] = Architecture.from_json(content["architecture"])
        if content["normalization"] is not None:
            mean, std = content["normalization"]
            values["normalization"] = (tuple(mean), tuple(std))
        names = {field.name for field in dataclasses.fields(cls)}
        if not names - _NOT_YET.keys() <= values.keys() <= names:
            raise KeyError(", ".join(sorted(values.keys() ^ names)))
        return cls(**values)


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
