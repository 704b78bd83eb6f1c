"""AnomalyDetector: images in, scores, labels and anomaly maps out."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Literal

import torch

from ..data.samples import Sample
from ..image_size import ImageSize, checked_size
from ..models.backbone import Backbone
from ..models.placement import usable_device, usable_impl
from ..models.uniad import UniAD
from .fitting import new_pipeline
from .good_images import GoodImages, good_samples
from .learning import Run, Surroundings, learn, recalibrated
from .public_config import read_config
from .scoring import Scoring
from .settings import DetectorSettings
from .trained import Trained, load_trained, save_trained


class AnomalyDetector(Scoring):
    """Finds and locates defects with one model for many classes, trained from good images only.

    >>> detector = AnomalyDetector(backbone="tf_efficientnet_lite0").fit("path/to/good/images")
    >>> score, label, anomaly_map = detector.predict("path/to/image.png")

    Args:
        backbone: timm model whose frozen features are used; "tf_efficientnet_b4" is the paper's.
        image_size: (height, width) in pixels that every image is resized to, or the side of a square.
        backbone_weights: weight file, see `Backbone.pretrained`.
        device: torch device; None takes a GPU if there is one.
        impl: implementation of the model's ops, see `uniad_fast.ops.neighbor_masked_attention`.
        cache_dir: where features are kept, see `uniad_fast.data.feature_cache`; False keeps none.
        settings: the others of `uniad_fast.detect.settings.DetectorSettings`, such as recipe="paper",
            residual_score="l2", image_score="mean", false_alarm_rate=0.05, held_out=0.2, seed=1.

    Attributes, besides those of `Scoring`:
        unreadable: images that `fit` or `calibrate` left out, one message each.
        notes: remarks on images that they did not see quite as they are.

    Raises:
        UniadFastError: an argument is out of range, or there is no such device.
    """

    def __init__(
        self,
        backbone: str = "tf_efficientnet_b4",
        image_size: ImageSize = 224,
        *,
        backbone_weights: str | os.PathLike | None = None,
        device: str | torch.device | None = None,
        impl: str | None = None,
        cache_dir: str | os.PathLike | Literal[False] | None = None,
        **settings: Any,
    ) -> None:
        self.settings = DetectorSettings(backbone, checked_size(image_size), **settings)
        self.backbone_weights = backbone_weights
        self.device, self.impl = usable_device(device), usable_impl(impl)
        self.cache_dir = cache_dir
        self.unreadable, self.notes = list[str](), list[str]()

    @classmethod
    def from_settings(cls, settings: DetectorSettings, **options: Any) -> "AnomalyDetector":
        """An untrained detector with these settings; options are other arguments of `AnomalyDetector`."""
        return cls(**(vars(settings) | options))

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
        """A detector that scores with the L2 norm and has no threshold yet; options are those of `AnomalyDetector`."""
        detector = cls(backbone.name, out_indices=backbone.out_indices, recipe="paper", residual_score="l2", **options)
        pipeline = new_pipeline(detector.settings, backbone, model)
        detector._trained = Trained(detector.settings, pipeline.to(detector.device).eval())
        return detector

    @classmethod
    def of(cls, trained: Trained, **options: Any) -> "AnomalyDetector":
        """A detector that has learnt this; options are `device`, `impl` and `cache_dir`."""
        detector = cls.from_settings(trained.settings, **options)
        moved = trained.pipeline if detector.device.type == "cpu" else trained.pipeline.to(detector.device)
        detector._trained = trained._replace(pipeline=moved.eval())
        return detector

    def fit(
        self,
        data: GoodImages,
        *,
        work_dir: str | os.PathLike | None = None,
        resume: bool = False,
        checkpoint_seconds: float = 60.0,
        events_dir: str | os.PathLike | None = None,
        quiet: bool = False,
    ) -> "AnomalyDetector":
        """Learn what good looks like; returns self.

        Args:
            data: good images, see `GoodImages`.
            work_dir: where the log and the checkpoints of this run are kept; None keeps none.
            resume: go on from the checkpoint in `work_dir`.
            events_dir: gets events for TensorBoard; None writes none.

        Raises:
            DataError: fewer than two readable good images.
            ResumeError: the checkpoint is damaged or of another run.
            Diverged: the loss is not finite any more; names the images of the batch where that was seen.
            UniadFastError: no finite threshold comes out.
        """
        self._learn(good_samples(data), Run(work_dir, resume, checkpoint_seconds, events_dir), quiet, None)
        return self

    def add(
        self,
        data: GoodImages,
        *,
        work_dir: str | os.PathLike | None = None,
        resume: bool = False,
        checkpoint_seconds: float = 60.0,
        events_dir: str | os.PathLike | None = None,
        quiet: bool = False,
    ) -> "AnomalyDetector":
        """Learn further classes, going on from what is known, in a fifth of the steps of training anew; returns self.

        A network forgets what it is not shown again: `data` has the old classes too, their features are in the cache.

        Args: as of `fit`.

        Raises: as `fit` does; DataError too where a known class has no image in `data`.
        """
        self._learn(good_samples(data), Run(work_dir, resume, checkpoint_seconds, events_dir), quiet, self.trained)
        return self

    def _learn(self, samples: list[Sample], run: Run, quiet: bool, before: Trained | None) -> None:
        self.engine = None  # it would go on with what was known before
        found = learn(self.settings, samples, self._surroundings(quiet), run, before, self._roi)
        self._trained, self.unreadable, self.notes = found

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
        known, where = self.trained._replace(settings=self.settings), self._surroundings(quiet)
        self._trained, found = recalibrated(known, good_samples(data), where)
        self.unreadable, self.notes = found.unreadable, found.notes
        return self

    def save(self, directory: str | os.PathLike) -> None:
        """Write a bundle: everything that `load` needs, the backbone too. Replaces a bundle, never another folder.

        Raises:
            BundleError: `directory` exists and is no bundle.
        """
        save_trained(directory, self.trained)

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
        return cls.of(load_trained(directory, impl), device=device, impl=impl)

    def _surroundings(self, quiet: bool) -> Surroundings:
        return Surroundings(self.device, self.impl, self.cache_dir, self.backbone_weights, quiet)
