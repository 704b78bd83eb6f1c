"""What a trained detector does: read images, measure and judge them."""

import copy
import math
import os
from collections.abc import Callable, Generator, Sequence
from typing import Any, Self, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..data.image_batches import BATCH, ImageBatch, read_batches
from ..data.images import ImageLike, UnreadableImage
from ..data.masks import read_roi
from ..errors import UniadFastError
from ..image_size import Size
from .calibration import Calibration
from .pace import Pace
from .pipeline import Measured, Pipeline
from .prediction import Prediction
from .settings import DetectorSettings
from .trained import Trained
from .verdicts import Verdicts, judged, verdicts


class Scoring:
    """A detector with what it has learnt, or without yet: `AnomalyDetector`, but for how it comes to be.

    Attributes:
        settings: all choices, with their defaults.
        device: where it computes.
        engine: what `predict` measures images with in place of the pipeline, see `uniad_fast.deploy.engines`.
    """

    settings: DetectorSettings
    device: torch.device
    engine: Callable[[Tensor, Sequence[int | None] | None], Measured] | None = None
    _trained: Trained | None = None
    _roi: Tensor | None = None

    @property
    def is_calibrated(self) -> bool:
        """Whether it has a threshold; a converted detector has none before `calibrate`."""
        return self._trained is not None and self._trained.calibration is not None

    @property
    def pipeline(self) -> Pipeline:
        """The trained module from images to raw maps; RuntimeError before `fit` or `load`."""
        return self.trained.pipeline

    @property
    def calibration(self) -> Calibration:
        """Scales, threshold and colours, from good images; RuntimeError where there are none."""
        found = self.trained.calibration
        if found is None:
            raise RuntimeError("this detector has no threshold: call calibrate() with good images")
        return found

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes that it was trained on, none before."""
        return self._trained.classes if self._trained is not None else ()

    @overload
    def predict(self, images: ImageLike, class_name: str | None = None) -> Prediction: ...  # type: ignore[overload-overlap]  # a str is a sequence
    @overload
    def predict(self, images: Sequence[ImageLike], class_name: str | None = None) -> list[Prediction]: ...
    def predict(
        self, images: ImageLike | Sequence[ImageLike], class_name: str | None = None
    ) -> Prediction | list[Prediction]:
        """Score an image, or a list of them: a `Prediction`, or a list of these.

        Args:
            images: a path, a Pillow image, an array [height, width] or [height, width, 3] (uint8, or float in
                [0, 1]), a tensor [3, height, width] (likewise), or a list of any of these.
            class_name: of all of them, one of `classes`; None recognizes it image by image.

        Raises:
            UnreadableImage: a file can't be read.
            UniadFastError: an array or tensor of another shape, a score that is not finite, or no such class.
        """
        if isinstance(images, (str, os.PathLike, Image.Image, np.ndarray, Tensor)):
            return self.predict([images], class_name)[0]
        told = None if class_name is None else self.trained.class_number(class_name)
        predictions: list[Prediction] = []
        for batch in self.read(images):
            if batch.failures:
                raise UnreadableImage(batch.failures[0].message(images[len(predictions) :]))
            predictions += self.verdicts(batch, [told] * len(batch.used)).predictions
        for number, prediction in enumerate(predictions):
            if not math.isfinite(prediction.score):
                raise UniadFastError(f"the score of image {number} is {prediction.score}: no label can be given to it")
        return predictions

    def measure(self, images: Tensor, told: Sequence[int | None] | None = None) -> Measured:
        """images [B, 3, h, w] in [0, 1] by the engine that is set, as `Pipeline.measure` does it."""
        return (self.engine or self.pipeline.measure)(images, told)

    def read(
        self, images: Sequence[ImageLike], batch_size: int = BATCH, keep_pictures: bool = False
    ) -> Generator[ImageBatch, None, None]:
        """Images in batches for `verdicts`, as `read_batches` reads them; of a detector that looks at tiles one by one,
        with their pictures.
        """
        if self.settings.overlap is None:
            return read_batches(images, self.settings.image_size, batch_size, keep_pictures=keep_pictures)
        return read_batches(images, None, 1, keep_pictures=True)

    def verdicts(
        self,
        batch: ImageBatch,
        told: Sequence[int | None],
        threshold: float | None = None,
        pace: Pace | None = None,
    ) -> Verdicts:
        """What a batch that `read` gave is like, as `uniad_fast.detect.verdicts` has it."""
        return verdicts(self.measure, self.trained, batch, told, threshold, pace)

    def judge(
        self,
        maps: Tensor,
        fields: Tensor | None = None,
        threshold: float | None = None,
        sizes: Sequence[Size] | None = None,
    ) -> list[Prediction]:
        """What raw anomaly maps [B, h, w] say of their images; a score that is not finite is for the caller to refuse.

        Args: as of `judge_maps`, but fields may be None for the last, and a threshold of None is the detector's own.
        """
        return judged(self.trained, maps, fields, sizes, threshold)

    def look_at(self, roi: str | os.PathLike | NDArray) -> Self:
        """Look at a part of each image alone, from now on, as `read_roi` takes it; returns self."""
        self._roi = torch.from_numpy(read_roi(roi, self.settings.image_size))
        if self._trained is not None:
            self.pipeline.roi = self._roi.to(self.device)
        return self

    @property
    def trained(self) -> Trained:
        """What it has learnt; RuntimeError before `fit` or `load`."""
        if self._trained is None:
            raise RuntimeError("this detector is not trained: call fit(), or AnomalyDetector.load()")
        return self._trained

    def export(self, path: str | os.PathLike, format: str = "onnx", **options: Any) -> dict[str, Any]:
        """Write the detector, resize to verdict, as one file for another engine; returns the metadata in it.

        Args: as of `uniad_fast.deploy.export.export_detector`: format "onnx", "openvino" or "torch"; precision, images,
            good.

        Raises:
            ExportError: no threshold, or a choice that the format has not.
            MissingPackageError: a package that the format needs is not installed.
        """
        from ..deploy.export import export_detector  # the way down to what is built on detectors, for this call alone

        trained = self.trained
        if self.device.type != "cpu":
            trained = trained._replace(pipeline=copy.deepcopy(trained.pipeline).cpu())
        return export_detector(trained, path, format, **options)
