"""Exported detectors run again: one call for all engines, images in, arrays out."""

import json
import os
import threading
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..detect.detector import AnomalyDetector
from ..detect.pipeline import Measured
from ..packages import require
from .export import METADATA, SUFFIXES, VERSION, ExportError, hash_of
from .graph import OUTPUTS
from .runtimes import onnxruntime_session, openvino_model, openvino_request

Arrays = dict[str, NDArray]
"""{name of `OUTPUTS`: array}."""


class ExportedDetector:
    """An exported detector.

    Attributes:
        engine: "onnxruntime", "openvino" or "torch".
        metadata: of the file.
    """

    def __init__(self, engine: str, metadata: dict[str, Any], run: Callable[[NDArray], list[NDArray]]) -> None:
        self.engine = engine
        self.metadata = metadata
        self._run = run

    def __call__(self, images: NDArray) -> Arrays:
        """images uint8 [B, 3, height, width] -> `OUTPUTS`, as float32, bool and int64 arrays."""
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be uint8 [B, 3, height, width], got {images.dtype} {images.shape}")
        given = images if self.metadata["images"] == "uint8" else images.astype(np.float32) / 255
        return dict(zip(OUTPUTS, self._run(np.ascontiguousarray(given)), strict=True))


def load_exported(path: str | os.PathLike, threads: int | None = None, trusted: bool = False) -> ExportedDetector:
    """The detector in an exported file, run by the engine of its format.

    Args:
        threads: of the engine; None is its own choice, for "torch" this process's.
        trusted: a torch.export archive may hold pickles, which run whatever they say: it is opened only where this is
            True.

    Raises:
        ExportError: missing, damaged, or no exported detector, or of a version that is not read.
        MissingPackageError: its engine is not installed.
    """
    path = Path(path)
    loaders = {".onnx": _load_onnx, ".xml": _load_openvino, ".pt2": _load_torch}
    if path.suffix == ".pt2" and not trusted:
        raise ExportError(f"{path} may hold pickles, which run whatever they say: open it with torch.export.load")
    if path.suffix not in loaders:
        raise ExportError(f"{path}: an exported detector ends in {', '.join(SUFFIXES.values())}")
    if not path.is_file():
        raise ExportError(f"{path} is not there")
    return loaders[path.suffix](path, threads)


def measured_by_file(
    detector: AnomalyDetector, path: str | os.PathLike
) -> Callable[[Tensor, Sequence[int | None] | None], Measured]:
    """What measures images as `Pipeline.measure` does, but for their features, by a file the detector was exported to.

    Raises: as `load_exported` does, and ExportError where the file is another detector's.
    """
    file = load_exported(path, torch.get_num_threads())
    trained = detector.trained
    if trained.calibration is None or file.metadata["bundle"] != hash_of(trained):
        raise ExportError(f"{path} was exported from another detector, or before this one was calibrated anew")
    scale, last = trained.calibration.maps, trained.pipeline.fields - 1

    def measure(images: Tensor, told: Sequence[int | None] | None = None) -> Measured:
        if any(number is not None for number in told or ()):
            raise ExportError(f"{path} recognizes the class of an image by itself: it can't be told")
        found = file(images.mul(255).round().to(torch.uint8).cpu().numpy())
        fields = torch.from_numpy(np.where(found["class"] < 0, last, found["class"]))
        centers, spreads = (torch.tensor(part)[fields][:, None, None] for part in (scale.centers, scale.spreads))
        raw = (torch.from_numpy(found["score_map"]) * spreads + centers).float()
        return Measured(images.new_zeros(0, 0, 0), raw, fields)

    return measure


def _load_onnx(path: Path, threads: int | None) -> ExportedDetector:
    require("onnxruntime")
    try:
        session = onnxruntime_session(path, threads)
    except Exception as error:  # the runtime's own classes of errors share no base
        raise _damaged(path, error) from None
    metadata = _checked(path, session.get_modelmeta().custom_metadata_map.get(METADATA))
    return ExportedDetector("onnxruntime", metadata, lambda images: session.run(list(OUTPUTS), {"images": images}))


def _load_openvino(path: Path, threads: int | None) -> ExportedDetector:
    require("openvino")
    if not path.with_suffix(".bin").is_file():
        raise ExportError(f"{path} has no weights: {path.with_suffix('.bin').name} is not beside it")
    try:
        model = openvino_model(path)
        metadata = _checked(path, model.get_rt_info(METADATA).astype(str) if model.has_rt_info(METADATA) else None)
        request = openvino_request(model, threads)
    except RuntimeError as error:
        raise _damaged(path, error) from None

    lock = threading.Lock()

    def run(images: NDArray) -> list[NDArray]:
        with lock:  # its memory is used again by the next call
            found = request.infer({"images": images})
            return [np.array(found[name]) for name in OUTPUTS]

    return ExportedDetector("openvino", metadata, run)


def _load_torch(path: Path, threads: int | None) -> ExportedDetector:
    extra = {METADATA: ""}
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise ExportError(f"{path} is damaged")
        module = torch.export.load(str(path), extra_files=extra).module()
    except (zipfile.BadZipFile, RuntimeError, ValueError, KeyError, OSError) as error:
        raise _damaged(path, error) from None
    metadata = _checked(path, extra[METADATA])

    def run(images: NDArray) -> list[NDArray]:
        with torch.inference_mode():
            return [part.numpy() for part in module(torch.from_numpy(images))]

    return ExportedDetector("torch", metadata, run)


def _checked(path: Path, text: str | None) -> dict[str, Any]:
    try:
        metadata = json.loads(text or "")
        known = metadata["format"] == METADATA
    except (ValueError, KeyError, TypeError, RecursionError):
        known = False
    if not known:
        raise ExportError(f"{path} was not exported by uniad_fast: it says nothing of a detector")
    if metadata.get("version") != VERSION or metadata.get("outputs") != list(OUTPUTS):
        raise ExportError(
            f"{path} is of version {metadata.get('version')!r} and this reads {VERSION}: export the bundle again"
        )
    return metadata


def _damaged(path: Path, error: Exception) -> ExportError:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return ExportError(f"{path} can't be read: it is damaged, or something else ({reason[0][:200]})")
