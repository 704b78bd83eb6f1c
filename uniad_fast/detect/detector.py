"""AnomalyDetector: images in, scores, labels and anomaly maps out."""

import contextlib
import dataclasses
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.feature_cache import Features, cached_features
from ..data.image_batches import read_batches
from ..data.images import ImageLike, UnreadableImage
from ..data.samples import DataError, Sample
from ..errors import UniadFastError
from ..models.backbone import Backbone
from ..models.placement import usable_device, usable_impl
from ..models.uniad import UniAD
from ..training.loop import seeded_generators
from ..training.run_files import Diverged, RunFiles
from .calibration import Calibration, calibrate
from .fitting import fit_residual_score, new_backbone, new_model, new_pipeline, train_pipeline
from .good_images import GoodImages, good_samples, training_split
from .pipeline import Pipeline
from .prediction import Prediction, judge_maps
from .public_config import read_config
from .settings import DetectorSettings
from .trained import Trained, load_trained, save_trained

_NOT_CALIBRATED = "this detector has no threshold: call calibrate() with good images"
_NOT_TRAINED = "this detector is not trained: call fit(), or AnomalyDetector.load()"


class AnomalyDetector:
    """Finds and locates defects with one model for many classes, trained from good images only.

    >>> detector = AnomalyDetector(backbone="tf_efficientnet_lite0").fit("path/to/good/images")
    >>> score, label, anomaly_map = detector.predict("path/to/image.png")

    Args:
        backbone: timm model whose frozen features are used; "tf_efficientnet_b4" is the paper's.
        image_size: side in pixels of the square that every image is resized to.
        backbone_weights: weight file, see `Backbone.pretrained`.
        device: torch device; None takes a GPU if there is one.
        impl: implementation of the model's ops, see `uniad_fast.ops.neighbor_masked_attention`.
        cache_dir: where features are kept, see `uniad_fast.data.feature_cache`.
        settings: the others of `uniad_fast.detect.settings.DetectorSettings`, such as recipe="paper",
            residual_score="l2", image_score="mean", false_alarm_rate=0.05, held_out=0.2, seed=1.

    Attributes:
        settings: all choices, with their defaults.
        classes: names of the classes it was trained on.
        unreadable: images that `fit` or `calibrate` left out, one message each.
        notes: remarks on images that they did not see quite as they are.

    Raises:
        UniadFastError: an argument is out of range, or there is no such device.
    """

    def __init__(
        self,
        backbone: str = "tf_efficientnet_b4",
        image_size: int = 224,
        *,
        backbone_weights: str | os.PathLike | None = None,
        device: str | torch.device | None = None,
        impl: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        **settings: Any,
    ) -> None:
        self.settings = DetectorSettings(backbone, image_size, **settings)
        self.backbone_weights = backbone_weights
        self.device = usable_device(device)
        self.impl = usable_impl(impl)
        self.cache_dir = cache_dir
        self.classes: list[str] = []
        self.unreadable: list[str] = []
        self.notes: list[str] = []
        self._pipeline: Pipeline | None = None
        self._calibration: Calibration | None = None
        self._training_log = ""

    @classmethod
    def from_settings(cls, settings: DetectorSettings, **options: Any) -> "AnomalyDetector":
        """An untrained detector with these settings.

        Args:
            options: other arguments of `AnomalyDetector`.
        """
        values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
        return cls(**(values | options))

    @classmethod
    def from_config(cls, config: str | os.PathLike | Mapping[str, Any], **options: Any) -> "AnomalyDetector":
        """An untrained detector as a configuration of the public code describes it.

        Args:
            config: its file, or what it holds; see `uniad_fast.detect.public_config`.
            options: other arguments of `AnomalyDetector`, in place of what the configuration says.

        Raises:
            ConfigError: an entry can't be followed.
        """
        return cls.from_settings(read_config(config), **options)

    @classmethod
    def from_parts(cls, backbone: Backbone, model: UniAD, **options: Any) -> "AnomalyDetector":
        """A detector of a backbone and a trained network, which scores with the L2 norm and has no threshold yet.

        Args:
            options: other arguments of `AnomalyDetector`; image_size and architecture are the network's.
        """
        detector = cls(backbone.name, out_indices=backbone.out_indices, recipe="paper", residual_score="l2", **options)
        detector._pipeline = new_pipeline(detector.settings, backbone, model).to(detector.device).eval()
        return detector

    def fit(
        self,
        data: GoodImages,
        *,
        work_dir: str | os.PathLike | None = None,
        resume: bool = False,
        checkpoint_seconds: float = 60.0,
        quiet: bool = False,
    ) -> "AnomalyDetector":
        """Learn what good looks like; returns self.

        Args:
            data: good images, see `GoodImages`.
            work_dir: where the log and the checkpoints of this run are kept; None keeps none.
            resume: go on from the checkpoint in `work_dir`.

        Raises:
            DataError: fewer than two readable good images.
            ResumeError: the checkpoint is damaged or of another run.
            Diverged: the loss is not finite any more; names the images of the batch where that was seen.
            UniadFastError: no finite threshold comes out.
        """
        settings = self.settings
        samples = good_samples(data)
        kept, held_out = training_split(samples, settings.held_out, settings.seed)
        backbone = new_backbone(settings, self.backbone_weights).to(self.device)
        good = self._features(backbone, kept, "features of good images", quiet)
        unseen = self._features(backbone, held_out, "features of held-out good images", quiet)
        self.unreadable = good.unreadable + unseen.unreadable
        self.notes = good.notes + unseen.notes
        if not len(good.tokens) or not len(unseen.tokens):
            raise DataError(
                f"training needs at least two readable good images, of {len(samples)} listed "
                f"{len(self.unreadable)} could not be read" + "".join(f"\n  {m}" for m in self.unreadable[:10])
            )
        feature_size = backbone.feature_size(settings.image_size)
        with seeded_generators(settings.seed, self.device):
            model = new_model(settings, backbone, feature_size, self.impl)
        pipeline = new_pipeline(settings, backbone, model).to(self.device)
        architecture = dataclasses.asdict(settings.architecture)
        run = {"features": good.key, "image_size": settings.image_size, "architecture": architecture}
        with contextlib.ExitStack() as stack:
            directory = work_dir or stack.enter_context(tempfile.TemporaryDirectory())
            files = RunFiles(directory, run, resume, checkpoint_seconds)
            options: dict[str, Any] = {"validation": unseen.tokens, "quiet": quiet}
            try:
                train_pipeline(pipeline, good.tokens, settings.recipe, settings.seed, files, **options)
            except Diverged as error:
                raise error.with_names([kept[good.used[row]].path for row in error.rows]) from None
            self._training_log = files.path("log.csv").read_text(encoding="utf-8")
        fit_residual_score(pipeline, good.tokens)
        self._pipeline = pipeline
        self._calibrate(unseen)
        self.classes = sorted({sample.class_name for sample in samples})
        return self

    def calibrate(
        self, data: GoodImages, *, false_alarm_rate: float | None = None, quiet: bool = False
    ) -> "AnomalyDetector":
        """Set the threshold and the colours of heat maps from good images that it was not trained on; returns self.

        Args:
            data: good images, see `GoodImages`.
            false_alarm_rate: share of good images that may score above the threshold; None leaves the setting.

        Raises:
            DataError: no readable image.
            UniadFastError: a score is not finite, or the rate is not in (0, 1).
        """
        if false_alarm_rate is not None:
            self.settings = dataclasses.replace(self.settings, false_alarm_rate=false_alarm_rate)
        unseen = self._features(self.pipeline.backbone, good_samples(data), "features of good images", quiet)
        self.unreadable, self.notes = unseen.unreadable, unseen.notes
        if not len(unseen.tokens):
            raise DataError("calibration needs a readable good image" + "".join(f"\n  {m}" for m in self.unreadable))
        self._calibrate(unseen)
        return self

    @property
    def is_calibrated(self) -> bool:
        """Whether there is a threshold; a converted detector has none before `calibrate`."""
        return self._calibration is not None

    @property
    def pipeline(self) -> Pipeline:
        """The trained module from images to maps; RuntimeError before `fit` or `load`."""
        if self._pipeline is None:
            raise RuntimeError(_NOT_TRAINED)
        return self._pipeline

    @property
    def calibration(self) -> Calibration:
        """Threshold and colours, from held-out good images; RuntimeError where there are none."""
        if self._calibration is None:
            raise RuntimeError(_NOT_TRAINED if self._pipeline is None else _NOT_CALIBRATED)
        return self._calibration

    @overload
    def predict(self, images: ImageLike) -> Prediction: ...  # type: ignore[overload-overlap]  # a str is a sequence
    @overload
    def predict(self, images: Sequence[ImageLike]) -> list[Prediction]: ...
    def predict(self, images: ImageLike | Sequence[ImageLike]) -> Prediction | list[Prediction]:
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
        for batch in read_batches(images, self.settings.image_size):
            if batch.failures:
                raise UnreadableImage(batch.failures[0].message(images[len(predictions) :]))
            predictions += self.judge(self.pipeline(batch.images), sizes=batch.sizes)
        for number, prediction in enumerate(predictions):
            if not math.isfinite(prediction.score):
                raise UniadFastError(f"the score of image {number} is {prediction.score}: no label can be given to it")
        return predictions

    def judge(
        self, maps: Tensor, threshold: float | None = None, sizes: Sequence[tuple[int, int]] | None = None
    ) -> list[Prediction]:
        """What anomaly maps [B, S, S] say of their images; a score that is not finite is for the caller to refuse.

        Args:
            threshold: image score above which an image is defective; None takes the detector's own, if it has one.
            sizes: (height, width) of each image in pixels; None for (S, S).
        """
        return judge_maps(maps, self.settings.image_score, self._calibration, threshold, sizes)

    def save(self, directory: str | os.PathLike) -> None:
        """Write a bundle: everything that `load` needs, the backbone too. Replaces a bundle, never another folder.

        Raises:
            BundleError: `directory` exists and is no bundle.
        """
        content = (self.settings, self.pipeline, self._calibration, self.classes, self._training_log)
        save_trained(directory, Trained(*content))

    @classmethod
    def load(
        cls, directory: str | os.PathLike, device: str | torch.device | None = None, impl: str | None = None
    ) -> "AnomalyDetector":
        """A detector from a bundle.

        Raises:
            BundleError: missing, damaged, or not a bundle; says what is wrong.
            UniadFastError: there is no such device, or no such implementation.
        """
        usable_device(device)  # before a bundle is blamed
        usable_impl(impl)
        trained = load_trained(directory, impl)
        detector = cls.from_settings(trained.settings, device=device, impl=impl)
        moved = trained.pipeline if detector.device.type == "cpu" else trained.pipeline.to(detector.device)
        detector._pipeline, detector._calibration = moved.eval(), trained.calibration
        detector.classes, detector._training_log = trained.classes, trained.training_log
        return detector

    def _calibrate(self, unseen: Features) -> None:
        settings = self.settings
        self._calibration = calibrate(self.pipeline, unseen.tokens, settings.image_score, settings.false_alarm_rate)

    def _features(self, backbone: Backbone, samples: Sequence[Sample], description: str, quiet: bool) -> Features:
        paths = [sample.path for sample in samples]
        return cached_features(backbone, self.settings.image_size, paths, self.cache_dir, description, quiet)
