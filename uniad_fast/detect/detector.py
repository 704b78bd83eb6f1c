"""AnomalyDetector: images in, scores, labels and anomaly maps out."""

import contextlib
import dataclasses
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..data.datasets import load_dataset
from ..data.feature_cache import Features, cached_features
from ..data.images import ImageLike, as_image, to_tensor
from ..data.samples import DataError, Dataset, Sample, hold_out
from ..errors import UniadFastError
from ..models.architecture import PAPER_ARCHITECTURE, Architecture, build_model
from ..models.backbone import Backbone, usable_device
from ..models.uniad import UniAD
from ..ops.dispatch import check_impl
from ..printable import printable, printable_lines
from ..state_dicts import StateDict, check_state_dict, part_of
from ..training.loop import Diverged, channel_statistics, seeded_generators, train
from ..training.recipes import RECIPES, Recipe
from . import scoring
from .bundle import BundleError, read_bundle, write_bundle
from .calibration import Calibration, calibrate, fit_score
from .public_config import read_config
from .scoring import Scorer

_BATCH = 32
_SMALLEST, _LARGEST = 32, 4096  # pixels a side
_FEATURES = "backbone.features."
_NOT_CALIBRATED = "this detector has no threshold: call calibrate() with good images"
_NOT_TRAINED = "this detector is not trained: call fit(), or AnomalyDetector.load()"


class Prediction(NamedTuple):
    """What the detector says of one image.

    score: image score, higher is more anomalous. label: True when the score is above the threshold, None where a
    detector has none (see `AnomalyDetector.calibrate`).
    anomaly_map: float32 [image_size, image_size], a score for every pixel of the image as the network saw it.
    """

    score: float
    label: bool | None
    anomaly_map: NDArray


class AnomalyDetector:
    """Finds and locates defects with one model for many classes, trained from good images only.

    >>> detector = AnomalyDetector(backbone="tf_efficientnet_lite0").fit("path/to/good/images")
    >>> score, label, anomaly_map = detector.predict("path/to/image.png")

    Args:
        backbone: timm model whose frozen features are used; "tf_efficientnet_b4" is the paper's.
        image_size: side in pixels of the square that every image is resized to.
        backbone_weights: weight file, see `Backbone.pretrained`.
        out_indices: feature levels, see `Backbone.pretrained`.
        recipe: "fast", "paper", or a `Recipe`.
        architecture: of the network.
        score: how a residual becomes a number, "l2" (the paper's), "whitened" or "relative"; see
            `uniad_fast.detect.scoring`. None takes the recipe's.
        image_score: how a map becomes a number, "max" (the paper's), "mean" or "std".
        false_alarm_rate: share of good images that may score above the threshold.
        held_out: share of the good images kept from training to set the threshold.
        seed: of initial values, batch order, noise and the held-out choice.
        device: torch device; None takes a GPU if there is one.
        impl: implementation of the model's ops, see `uniad_fast.ops.functional`.
        cache_dir: where features are kept, see `uniad_fast.data.feature_cache`.

    Raises:
        UniadFastError: an argument is out of range, or there is no such device.
    """

    def __init__(
        self,
        backbone: str = "tf_efficientnet_b4",
        image_size: int = 224,
        *,
        backbone_weights: str | os.PathLike | None = None,
        out_indices: Sequence[int] | None = None,
        recipe: str | Recipe = "fast",
        architecture: Architecture = PAPER_ARCHITECTURE,
        score: str | None = None,
        image_score: str = "max",
        false_alarm_rate: float = 0.01,
        held_out: float = 0.1,
        seed: int = 0,
        device: str | torch.device | None = None,
        impl: str | None = None,
        cache_dir: str | os.PathLike | None = None,
    ) -> None:
        if isinstance(recipe, str):
            if recipe not in RECIPES:
                raise UniadFastError(f"recipe must be one of {', '.join(RECIPES)}, got {recipe!r}")
            recipe = RECIPES[recipe]
        score = score or recipe.score
        if score not in scoring.SCORES:
            raise UniadFastError(f"score must be one of {', '.join(scoring.SCORES)}, got {score!r}")
        if image_score not in scoring.IMAGE_SCORES:
            raise UniadFastError(f"image_score must be one of {', '.join(scoring.IMAGE_SCORES)}, got {image_score!r}")
        for name, share in (("false_alarm_rate", false_alarm_rate), ("held_out", held_out)):
            if not isinstance(share, (int, float)) or not 0 < share < 1:
                raise UniadFastError(f"{name} must be in (0, 1), got {share!r}")
        if not _is_int(image_size) or not _SMALLEST <= image_size <= _LARGEST:
            raise UniadFastError(f"image_size must be from {_SMALLEST} to {_LARGEST} pixels, got {image_size!r}")
        if not _is_int(seed) or not 0 <= seed < 2**63:
            raise UniadFastError(f"seed must be an integer from 0 to 2^63 - 1, got {seed!r}")
        if not isinstance(backbone, str):
            raise UniadFastError(f"backbone must be the name of a timm model, got {backbone!r}")
        if out_indices is not None and not all(_is_int(level) and level >= 0 for level in out_indices):
            raise UniadFastError(f"out_indices must be feature levels, got {out_indices!r}")
        self.backbone_name = backbone
        self.image_size = image_size
        self.backbone_weights = backbone_weights
        self.out_indices = None if out_indices is None else tuple(out_indices)
        self.recipe = recipe
        self.architecture = architecture
        self.score = score
        self.image_score = image_score
        self.false_alarm_rate = false_alarm_rate
        self.held_out = held_out
        self.seed = seed
        self.device = usable_device(device)
        self.impl = impl
        self.cache_dir = cache_dir
        self.unreadable: list[str] = []
        """Images that `fit` or `calibrate` left out, one message each."""
        self.notes: list[str] = []
        """Remarks on images that they did not see quite as they are."""
        self._scorer: Scorer | None = None
        self._calibration: Calibration | None = None
        self.classes: list[str] = []
        """Names of the classes it was trained on."""
        self._training_log = ""
        self._normalization: tuple[Sequence[float], Sequence[float]] | None = None
        self._stride: int | None = None

    @classmethod
    def from_config(cls, config: str | os.PathLike | Mapping[str, Any], **options: Any) -> "AnomalyDetector":
        """An untrained detector as a configuration of the public code describes it.

        Args:
            config: its file, or what it holds; see `uniad_fast.detect.public_config`.
            options: other arguments of `AnomalyDetector`, in place of what the configuration says.

        Raises:
            ConfigError: an entry can't be followed.
        """
        read = read_config(config)
        said: dict[str, Any] = {
            "backbone": read.backbone,
            "image_size": read.image_size,
            "out_indices": read.out_indices,
            "recipe": read.recipe,
            "architecture": read.architecture,
            "image_score": read.image_score,
        }
        detector = cls(**(said | options))
        detector._normalization = (read.mean, read.std)
        detector._stride = read.stride
        return detector

    @classmethod
    def from_parts(cls, backbone: Backbone, model: UniAD, **options: Any) -> "AnomalyDetector":
        """A detector of a backbone and a trained network, which scores with the L2 norm and has no threshold yet.

        Args:
            options: other arguments of `AnomalyDetector`; image_size and architecture are the network's.
        """
        detector = cls(backbone.name, out_indices=backbone.out_indices, recipe="paper", score="l2", **options)
        scorer = Scorer(backbone, model, detector.image_size, detector.recipe.precision, "l2")
        detector._scorer = scorer.to(detector.device).eval()
        return detector

    def fit(
        self,
        data: str | os.PathLike | Dataset | Sequence[str | os.PathLike],
        *,
        work_dir: str | os.PathLike | None = None,
        resume: bool = False,
        checkpoint_seconds: float = 60.0,
        quiet: bool = False,
    ) -> "AnomalyDetector":
        """Learn what good looks like; returns self.

        Args:
            data: whatever `load_dataset` takes, a `Dataset`, or a list of image files, all good.
            work_dir: where the log and the checkpoints of this run are kept; None keeps none.
            resume: go on from the checkpoint in `work_dir`.

        Raises:
            DataError: fewer than two readable good images.
            ResumeError: the checkpoint is damaged or of another run.
            Diverged: the loss is not finite any more; names the images of the batch where that was seen.
            UniadFastError: no finite threshold comes out.
        """
        samples = _good_samples(data)
        if len(samples) < 2:
            raise DataError(f"training needs at least two good images, got {len(samples)}")
        kept, held_out = hold_out(samples, self.held_out, self.seed)
        if not held_out:  # classes of one image each
            kept, held_out = kept[:-1], kept[-1:]
        backbone = Backbone.pretrained(
            self.backbone_name, self.image_size, self.backbone_weights, self.out_indices, self._stride
        )
        if self._normalization:
            backbone.normalize_by(*self._normalization)
        backbone.to(self.device)
        good = self._features(backbone, kept, "features of good images", quiet)
        unseen = self._features(backbone, held_out, "features of held-out good images", quiet)
        self.unreadable = good.unreadable + unseen.unreadable
        self.notes = good.notes + unseen.notes
        if not len(good.tokens) or not len(unseen.tokens):
            raise DataError(
                f"training needs at least two readable good images, of {len(samples)} listed "
                f"{len(self.unreadable)} could not be read" + "".join(f"\n  {m}" for m in self.unreadable[:10])
            )
        with seeded_generators(self.seed, self.device):
            scorer = self._new_scorer(backbone)
        if self.recipe.standardize:
            scorer.mean, scorer.std = channel_statistics(good.tokens)
        scorer.to(self.device)
        run = {
            "features": good.key,
            "image_size": self.image_size,
            "architecture": dataclasses.asdict(self.architecture),
        }
        with contextlib.ExitStack() as stack:
            directory = Path(work_dir or stack.enter_context(tempfile.TemporaryDirectory()))
            try:
                train(
                    scorer.model,
                    good.tokens,
                    self.recipe,
                    self.seed,
                    scorer.mean,
                    scorer.std,
                    directory,
                    run,
                    resume=resume,
                    checkpoint_seconds=checkpoint_seconds,
                    quiet=quiet,
                    validation=unseen.tokens,
                )
            except Diverged as error:
                names = [printable(kept[good.used[row]].path) for row in error.rows]
                error.args = (f"{error}, first on a batch of these images:" + "".join(f"\n  {n}" for n in names),)
                raise
            self._training_log = (directory / "log.csv").read_text(encoding="utf-8")
        self._scorer = scorer
        fit_score(scorer, good.tokens)
        self._calibration = calibrate(scorer, unseen.tokens, self.image_score, self.false_alarm_rate)
        self.classes = sorted({sample.class_name for sample in samples})
        return self

    def calibrate(
        self, data: str | os.PathLike | Dataset | Sequence[str | os.PathLike], *, quiet: bool = False
    ) -> "AnomalyDetector":
        """Set the threshold and the colours of heat maps from good images that it was not trained on; returns self.

        Args:
            data: as in `fit`.

        Raises:
            DataError: no readable image.
            UniadFastError: a score is not finite.
        """
        unseen = self._features(self.scorer.backbone, _good_samples(data), "features of good images", quiet)
        self.unreadable, self.notes = unseen.unreadable, unseen.notes
        if not len(unseen.tokens):
            raise DataError("calibration needs a readable good image" + "".join(f"\n  {m}" for m in self.unreadable))
        self._calibration = calibrate(self.scorer, unseen.tokens, self.image_score, self.false_alarm_rate)
        return self

    @property
    def is_calibrated(self) -> bool:
        """Whether there is a threshold; a converted detector has none before `calibrate`."""
        return self._calibration is not None

    @property
    def scorer(self) -> Scorer:
        """The trained pipeline from images to maps; RuntimeError before `fit` or `load`."""
        if self._scorer is None:
            raise RuntimeError(_NOT_TRAINED)
        return self._scorer

    @property
    def calibration(self) -> Calibration:
        """Threshold and colours, from held-out good images; RuntimeError where there are none."""
        if self._calibration is None:
            raise RuntimeError(_NOT_TRAINED if self._scorer is None else _NOT_CALIBRATED)
        return self._calibration

    def predict(self, images: ImageLike | Sequence[ImageLike]) -> Any:
        """Score an image, or a list of them.

        Args:
            images: a path, a Pillow image, an array [height, width] or [height, width, 3] (uint8, or float in
                [0, 1]), a tensor [3, height, width] (likewise), or a list of any of these.

        Returns:
            A `Prediction`, or a list of them.

        Raises:
            UnreadableImage: a file can't be read.
            UniadFastError: an array or tensor of another shape, or a score that is not finite.
        """
        if isinstance(images, (str, os.PathLike, Image.Image, np.ndarray, Tensor)):
            return self.predict([images])[0]
        predictions: list[Prediction] = []
        for start in range(0, len(images), _BATCH):
            batch = [to_tensor(as_image(image), self.image_size) for image in images[start : start + _BATCH]]
            predictions += self.predict_tensors(torch.stack(batch))
        for number, prediction in enumerate(predictions):
            if not math.isfinite(prediction.score):
                raise UniadFastError(f"the score of image {number} is {prediction.score}: no label can be given to it")
        return predictions

    def predict_tensors(self, images: Tensor) -> list[Prediction]:
        """Score a batch [B, 3, image_size, image_size] in [0, 1] that is ready for the backbone.

        A score that is not finite has the label None: it is neither good nor defective, and for the caller to refuse.
        """
        maps = self.scorer(images)
        scores = scoring.image_scores(maps, self.image_score).tolist()
        return [
            Prediction(score, self._label(score), one) for score, one in zip(scores, maps.cpu().numpy(), strict=True)
        ]

    def _label(self, score: float) -> bool | None:
        if not self.is_calibrated or not math.isfinite(score):
            return None
        return score > self.calibration.threshold

    def save(self, directory: str | os.PathLike) -> None:
        """Write a bundle: everything that `load` needs, the backbone too. Replaces a bundle, never another folder.

        Raises:
            BundleError: `directory` exists and is no bundle.
        """
        scorer = self.scorer
        config = {
            "backbone": {
                "name": scorer.backbone.name,
                "out_indices": scorer.backbone.out_indices,
                "padded_for": scorer.backbone.padded_for,
                "stride": scorer.backbone.stride,
            },
            "architecture": dataclasses.asdict(self.architecture),
            "image_size": self.image_size,
            "recipe": dataclasses.asdict(self.recipe),
            "score": self.score,
            "image_score": self.image_score,
            "false_alarm_rate": self.false_alarm_rate,
            "held_out": self.held_out,
            "seed": self.seed,
            "classes": self.classes,
            "calibration": dataclasses.asdict(self._calibration) if self._calibration else None,
        }
        write_bundle(directory, scorer.state_dict(), config, self._training_log)

    @classmethod
    def load(
        cls, directory: str | os.PathLike, device: str | torch.device | None = None, impl: str | None = None
    ) -> "AnomalyDetector":
        """A detector from a bundle.

        Raises:
            BundleError: missing, damaged, or not a bundle; says what is wrong.
            UniadFastError: there is no such device.
        """
        usable_device(device)  # before a bundle is blamed
        check_impl(impl)
        tensors, config = read_bundle(directory)
        try:
            return cls._from_bundle(tensors, config, device, impl)
        except KeyError as error:
            raise BundleError(f"{directory} is a damaged bundle: {error} is missing in its configuration") from error
        except (TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
            raise BundleError(f"{directory} is a damaged bundle: {printable_lines(error)}") from error

    @classmethod
    def _from_bundle(
        cls, tensors: StateDict, config: dict[str, Any], device: str | torch.device | None, impl: str | None
    ) -> "AnomalyDetector":
        detector = cls(
            config["backbone"]["name"],
            config["image_size"],
            out_indices=config["backbone"]["out_indices"],
            recipe=Recipe(**config["recipe"]),
            architecture=Architecture.from_json(config["architecture"]),
            score=config["score"],
            image_score=config["image_score"],
            false_alarm_rate=config["false_alarm_rate"],
            held_out=config["held_out"],
            seed=config["seed"],
            device=device,
            impl=impl,
        )
        padded_for = config["backbone"]["padded_for"]
        if padded_for is not None and (not _is_int(padded_for) or not 1 <= padded_for <= _LARGEST):
            raise UniadFastError(f"padded_for must be a side in pixels, got {padded_for!r}")
        stride = config["backbone"]["stride"]
        if not _is_int(stride) or not 1 <= stride <= detector.image_size:
            raise UniadFastError(f"stride must be a number of pixels, got {stride!r}")
        classes = config["classes"]
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise UniadFastError(f"classes must be a list of names, got {classes!r}")
        backbone = Backbone.from_state(
            detector.backbone_name,
            detector.image_size,
            detector.out_indices,
            part_of(tensors, _FEATURES),
            padded_for,
            stride,
        )
        scorer = detector._new_scorer(backbone)
        check_state_dict(tensors, scorer.state_dict(), "the bundle's tensors")
        scorer.load_state_dict(tensors)
        detector._scorer = scorer.to(detector.device).eval()
        if config["calibration"] is not None:
            detector._calibration = Calibration.from_json(config["calibration"])
        detector.classes = classes
        return detector

    def _features(self, backbone: Backbone, samples: Sequence[Sample], description: str, quiet: bool) -> Features:
        paths = [sample.path for sample in samples]
        return cached_features(backbone, self.image_size, paths, self.cache_dir, description, quiet)

    def _new_scorer(self, backbone: Backbone) -> Scorer:
        grid = backbone.grid(self.image_size)
        model = build_model(backbone.channels, backbone.stride, grid, self.recipe, self.impl, self.architecture)
        return Scorer(backbone, model, self.image_size, self.recipe.precision, self.score)


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _good_samples(data: str | os.PathLike | Dataset | Sequence[str | os.PathLike]) -> list[Sample]:
    if isinstance(data, (str, os.PathLike)):
        data = load_dataset(data)
    samples = data.train if isinstance(data, Dataset) else [Sample(Path(path), "unnamed") for path in data]
    return samples
