"""AnomalyDetector: images in, scores, labels and anomaly maps out."""

import contextlib
import dataclasses
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

from . import scoring
from .architecture import PAPER_ARCHITECTURE, Architecture, build_model
from .backbone import Backbone
from .bundle import BundleError, read_bundle, write_bundle
from .calibration import Calibration, calibrate, fit_score
from .data import DataError, Dataset, Sample, hold_out, load_dataset
from .features import Features, cached_features
from .images import ImageLike, as_image, to_tensor
from .model import UniAD
from .public_config import read_config
from .recipes import RECIPES, Recipe
from .scoring import Scorer
from .state_dicts import check_state_dict, part_of
from .training import channel_statistics, seeded_generators, train

_BATCH = 32
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
            `uniad_fast.scoring`. None takes the recipe's.
        image_score: how a map becomes a number, "max" (the paper's), "mean" or "std".
        false_alarm_rate: share of good images that may score above the threshold.
        held_out: share of the good images kept from training to set the threshold.
        seed: of initial values, batch order, noise and the held-out choice.
        device: torch device; None takes a GPU if there is one.
        impl: implementation of the model's ops, see `uniad_fast.functional`.
        cache_dir: where features are kept, see `uniad_fast.features`.

    Raises:
        ValueError: an argument is out of range.
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
                raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {recipe!r}")
            recipe = RECIPES[recipe]
        score = score or recipe.score
        if score not in scoring.SCORES:
            raise ValueError(f"score must be one of {', '.join(scoring.SCORES)}, got {score!r}")
        if image_score not in scoring.IMAGE_SCORES:
            raise ValueError(f"image_score must be one of {', '.join(scoring.IMAGE_SCORES)}, got {image_score!r}")
        if not 0 < false_alarm_rate < 1:
            raise ValueError(f"false_alarm_rate must be in (0, 1), got {false_alarm_rate}")
        if not 0 < held_out < 1:
            raise ValueError(f"held_out must be in (0, 1), got {held_out}")
        if image_size < 32:
            raise ValueError(f"image_size must be at least 32 pixels, got {image_size}")
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
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.impl = impl
        self.cache_dir = cache_dir
        self.unreadable: list[str] = []
        """Images that `fit` left out, one message each."""
        self._scorer: Scorer | None = None
        self._calibration: Calibration | None = None
        self.classes: list[str] = []
        """Names of the classes it was trained on."""
        self._training_log = ""
        self._normalization: tuple[Sequence[float], Sequence[float]] | None = None

    @classmethod
    def from_config(cls, config: str | os.PathLike | Mapping[str, Any], **options: Any) -> "AnomalyDetector":
        """An untrained detector as a configuration of the public code describes it.

        Args:
            config: its file, or what it holds; see `uniad_fast.public_config`.
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
        }
        detector = cls(**(said | options))
        detector._normalization = (read.mean, read.std)
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
            ResumeError: the checkpoint is of another run.
        """
        samples = _good_samples(data)
        if len(samples) < 2:
            raise DataError(f"training needs at least two good images, got {len(samples)}")
        kept, held_out = hold_out(samples, self.held_out, self.seed)
        if not held_out:  # classes of one image each
            kept, held_out = kept[:-1], kept[-1:]
        backbone = Backbone.pretrained(self.backbone_name, self.image_size, self.backbone_weights, self.out_indices)
        if self._normalization:
            backbone.normalize_by(*self._normalization)
        backbone.to(self.device)
        good = self._features(backbone, kept, "features of good images", quiet)
        unseen = self._features(backbone, held_out, "features of held-out good images", quiet)
        self.unreadable = good.unreadable + unseen.unreadable
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
        run = {"features": good.key, "image_size": self.image_size}
        with contextlib.ExitStack() as stack:
            directory = Path(work_dir or stack.enter_context(tempfile.TemporaryDirectory()))
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
            self._training_log = (directory / "log.csv").read_text()
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
        """
        unseen = self._features(self.scorer.backbone, _good_samples(data), "features of good images", quiet)
        self.unreadable = unseen.unreadable
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
            ValueError: an array or tensor of another shape.
        """
        if isinstance(images, (str, os.PathLike, Image.Image, np.ndarray, Tensor)):
            return self.predict([images])[0]
        predictions: list[Prediction] = []
        for start in range(0, len(images), _BATCH):
            batch = [to_tensor(as_image(image), self.image_size) for image in images[start : start + _BATCH]]
            predictions += self.predict_tensors(torch.stack(batch))
        return predictions

    def predict_tensors(self, images: Tensor) -> list[Prediction]:
        """Score a batch [B, 3, image_size, image_size] in [0, 1] that is ready for the backbone."""
        maps = self.scorer(images)
        scores = scoring.image_scores(maps, self.image_score).tolist()
        return [
            Prediction(score, score > self.calibration.threshold if self.is_calibrated else None, one)
            for score, one in zip(scores, maps.cpu().numpy(), strict=True)
        ]

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
        """
        tensors, config = read_bundle(directory)
        try:
            recipe = Recipe(**config["recipe"])
            detector = cls(
                config["backbone"]["name"],
                config["image_size"],
                out_indices=config["backbone"]["out_indices"],
                recipe=recipe,
                architecture=Architecture.from_json(config.get("architecture", {})),
                score=config["score"],
                image_score=config["image_score"],
                false_alarm_rate=config["false_alarm_rate"],
                held_out=config["held_out"],
                seed=config["seed"],
                device=device,
                impl=impl,
            )
            backbone = Backbone.from_state(
                detector.backbone_name,
                detector.image_size,
                detector.out_indices,
                part_of(tensors, _FEATURES),
                config["backbone"].get("padded_for"),
            )
            scorer = detector._new_scorer(backbone)
            check_state_dict(tensors, scorer.state_dict(), "the bundle's tensors")
            scorer.load_state_dict(tensors)
            detector._scorer = scorer.to(detector.device).eval()
            if config["calibration"] is not None:
                detector._calibration = Calibration.from_json(config["calibration"])
            detector.classes = list(config["classes"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise BundleError(f"{directory} is a damaged bundle: {type(error).__name__}: {error}") from error
        return detector

    def _features(self, backbone: Backbone, samples: Sequence[Sample], description: str, quiet: bool) -> Features:
        paths = [sample.path for sample in samples]
        return cached_features(backbone, self.image_size, paths, self.cache_dir, description, quiet)

    def _new_scorer(self, backbone: Backbone) -> Scorer:
        grid = backbone.grid(self.image_size)
        model = build_model(backbone.channels, backbone.stride, grid, self.recipe, self.impl, self.architecture)
        return Scorer(backbone, model, self.image_size, self.recipe.precision, self.score)


def _good_samples(data: str | os.PathLike | Dataset | Sequence[str | os.PathLike]) -> list[Sample]:
    if isinstance(data, (str, os.PathLike)):
        data = load_dataset(data)
    samples = data.train if isinstance(data, Dataset) else [Sample(Path(path), "unnamed") for path in data]
    return samples
