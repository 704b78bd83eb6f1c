"""A detector as one file for another engine: ONNX, OpenVINO's IR or torch.export's archive, with metadata inside.

Every file takes images [batch, 3, height, width] of any size, uint8, or float in [0, 1], and gives `graph.OUTPUTS`.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..detect.trained import Trained
from ..errors import UniadFastError
from ..files import atomic_path
from ..image_size import in_json
from ..packages import require
from ..signals import stop_if_asked
from ..state_dicts import hash_of_state_dict
from .graph import INNER, OUTPUTS, DetectorGraph
from .quantize import quantized

SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}
"""{format: ending of its file}; an OpenVINO model has its weights in a .bin beside it."""
PRECISIONS = ("float32", "float16", "int8")
METADATA = "uniad_fast"
VERSION = 1
_OPSET = 18  # the first with what is used; onnxruntime 1.14 and newer run it


class ExportError(UniadFastError):
    """A detector that can't be exported so, or a file that is no exported detector; says what is wrong."""


def export_detector(
    trained: Trained,
    path: str | os.PathLike,
    format: str,
    precision: str = "float32",
    images: str = "uint8",
    good: Sequence[str | os.PathLike] = (),
) -> dict[str, Any]:
    """Write the file, whole or not at all; returns the metadata in it.

    Args:
        trained: a calibrated detector on a CPU.
        path: ends as `SUFFIXES` say.
        format: a key of `SUFFIXES`.
        precision: of the weights in an OpenVINO model, or with "int8" of backbone and network; the others are float32.
        images: "uint8" or "float32", the dtype of the input.
        good: image files that "int8" is calibrated on.

    Raises:
        ExportError: no threshold, or no such format, precision, dtype or ending, or nothing to calibrate on.
        MissingPackageError: a package that the format needs is not installed.
    """
    path = Path(path)
    _check_choices(trained, path, format, precision, images, bool(good))
    graph = DetectorGraph(trained, inner=precision == "int8").eval()
    size = trained.settings.image_size
    example = torch.zeros(2, 3, size[0] + 3, size[1] + 5)
    if images == "uint8":
        example = example.to(torch.uint8)
    any_size = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    with torch.no_grad(), quiet():
        program = torch.export.export(graph, (example,), dynamic_shapes={"images": any_size})
    metadata = _metadata(trained, precision, images)
    text = json.dumps(metadata)
    if format == "torch":
        with atomic_path(path) as partial, open(partial, "wb") as file:
            torch.export.save(program, file, extra_files={METADATA: text})
    elif format == "onnx":
        with atomic_path(path) as partial:
            _write_onnx(program, example, partial, OUTPUTS, text)
    else:
        with _as_openvino(program, example, path, precision) as model:
            if precision == "int8":
                with quiet():
                    model = quantized(model, size, good)
            _write_openvino(model, path, text, precision)
    return metadata


def _check_choices(trained: Trained, path: Path, format: str, precision: str, images: str, is_calibrated: bool) -> None:
    if format not in SUFFIXES:
        raise ExportError(f"format must be one of {', '.join(SUFFIXES)}, got {format!r}")
    if path.suffix != SUFFIXES[format]:
        raise ExportError(f"an {format} file ends in {SUFFIXES[format]}, got {path.name!r}")
    if precision not in PRECISIONS or (precision != "float32" and format != "openvino"):
        raise ExportError(f"precision must be float32, or float16 or int8 for openvino, got {precision!r} for {format}")
    if images not in ("uint8", "float32"):
        raise ExportError(f"images must be uint8 or float32, got {images!r}")
    if trained.settings.tiling is not None:
        raise ExportError("a detector that looks at tiles is no single graph: it cuts pictures, and blends their maps")
    if trained.calibration is None:
        raise ExportError("this detector has no threshold: set one first with uniad-fast calibrate")
    require(*{"onnx": ("onnx", "onnxscript"), "openvino": ("onnx", "onnxscript", "openvino"), "torch": ()}[format])
    if precision == "int8":
        require("nncf")
        if not is_calibrated:
            raise ExportError("int8 has to be calibrated: give good images")


def hash_of(trained: Trained) -> str:
    """Of a calibrated detector: of all that its verdicts hang on."""
    assert trained.calibration is not None
    # No score map hangs on where the detector looks.
    state = {name: tensor for name, tensor in trained.pipeline.state_dict().items() if name != "roi"}
    weights, backbone = hash_of_state_dict(state), trained.pipeline.backbone
    settings = dataclasses.replace(trained.settings, out_indices=backbone.out_indices, stride=backbone.stride)
    choices = json.dumps([settings.to_json(), trained.calibration.to_json(), trained.names], default=str)
    return hashlib.sha256(f"{weights}{choices}".encode()).hexdigest()


def _metadata(trained: Trained, precision: str, images: str) -> dict[str, Any]:
    calibration = trained.calibration
    assert calibration is not None
    return {
        "format": METADATA,
        "version": VERSION,
        "uniad_fast": __version__,
        "bundle": hash_of(trained),
        "classes": list(trained.names),
        "image_size": in_json(trained.settings.image_size),
        "threshold": calibration.threshold.value,
        "false_alarm_rate": calibration.threshold.rate,
        "pixel_threshold": calibration.pixel_threshold,
        "color_range": list(calibration.color_range),
        "precision": precision,
        "images": images,
        "outputs": list(OUTPUTS),
    }


def onnx_model(program: torch.export.ExportedProgram, example: torch.Tensor, outputs: Sequence[str]) -> Any:
    """An `onnx.ModelProto` of a program that takes `images`."""
    options: dict[str, Any] = {"opset_version": _OPSET, "input_names": ["images"], "output_names": list(outputs)}
    with quiet():
        found = torch.onnx.export(program, (example,), dynamo=True, verbose=False, **options)
    assert found is not None
    return found.model_proto


def _write_onnx(
    program: torch.export.ExportedProgram, example: torch.Tensor, path: Path, outputs: Sequence[str], metadata: str
) -> None:
    import onnx

    model = onnx_model(program, example, outputs)
    stop_if_asked()
    onnx.helper.set_model_props(model, {METADATA: metadata})
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


@contextlib.contextmanager
def _as_openvino(
    program: torch.export.ExportedProgram, example: torch.Tensor, path: Path, precision: str
) -> Iterator[Any]:
    """The program as an `openvino.Model`, which lies beside `path` meanwhile."""
    # By way of ONNX: OpenVINO's own reader of exported programs knows no sizes that are computed.
    import openvino

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".exporting-") as folder:
        file = Path(folder, "model.onnx")
        _write_onnx(program, example, file, OUTPUTS + INNER if precision == "int8" else OUTPUTS, "")
        yield openvino.convert_model(file)


def _write_openvino(model: Any, path: Path, metadata: str, precision: str) -> None:
    import openvino

    model.set_rt_info(metadata, METADATA)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".exporting-") as folder:
        made = Path(folder, path.name)
        openvino.save_model(model, made, compress_to_fp16=precision == "float16")
        # The weights first: what is found without them is refused, not misread.
        os.replace(made.with_suffix(".bin"), path.with_suffix(".bin"))
        os.replace(made, path)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' remarks about their own insides."""
    loggers = [
        logging.getLogger(name)
        for name in ("torch.onnx", "torch.export", "torch.utils.cpp_extension", "onnxscript", "nncf")
    ]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
