"""ONNX Runtime and OpenVINO on this machine's processor: a graph in a file, run with so many threads."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..packages import require


def onnxruntime_session(path: Path, threads: int | None) -> Any:
    """An `onnxruntime.InferenceSession`; None leaves the number of threads to it.

    Raises:
        MissingPackageError: it is not installed.
        Exception: whatever it says of a file that it can't read: its errors share no base.
    """
    require("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    # Threads that wait in a loop for the next call take their cores from what runs in between.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def openvino_model(path: Path) -> Any:
    """An `openvino.Model` of an .xml or .onnx file.

    Raises:
        MissingPackageError: it is not installed.
        RuntimeError: the file can't be read.
    """
    require("openvino")
    import openvino

    return openvino.Core().read_model(path)


def openvino_request(model: Any, threads: int | None, precision: str = "float32") -> Any:
    """An `openvino.InferRequest` of a model; None leaves the number of threads to it.

    precision: "float32" or "bfloat16", whatever the processor would rather take.
    """
    import openvino

    hint = {"float32": "f32", "bfloat16": "bf16"}[precision]
    options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": hint}
    if threads:
        options["INFERENCE_NUM_THREADS"] = threads
    # Where it is compiled, OpenVINO leaves a stack for signals, which goes with the model: a signal that comes to a
    # thread whose stack another one has freed ends the process.
    with ThreadPoolExecutor(1, "openvino") as thread:
        return thread.submit(openvino.Core().compile_model, model, "CPU", options).result().create_infer_request()
