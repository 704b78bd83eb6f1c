"""Ways to measure images on this machine's processor: which engine runs how much of a detector, in which precision."""

import threading
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..detect.pipeline import Measured, Pipeline
from ..models.precision import has_bfloat16
from ..models.prepared import prepared
from .engine_files import EngineFiles
from .runtimes import onnxruntime_session, openvino_model, openvino_request

Measure = Callable[[Tensor, Sequence[int | None] | None], Measured]


class Plan(NamedTuple):
    """A way to measure images: by which engine, how far it goes ("features", "network"), and in which precision."""

    engine: str
    part: str
    precision: str

    def __str__(self) -> str:
        own = " + own network" if self.part == "features" else ""
        return f"{self.engine} {self.precision}{own}"


def plans_here() -> list[Plan]:
    """All ways to measure images on this machine's processor, with what is installed."""
    precisions = ["float32"] + ["bfloat16"] * has_bfloat16(torch.device("cpu"))
    plans = [Plan("torch", "features", precision) for precision in precisions]
    if find_spec("onnx") is None or find_spec("onnxscript") is None:
        return plans
    if find_spec("openvino") is not None:
        plans += [Plan("openvino", part, precision) for part in ("features", "network") for precision in precisions]
    if find_spec("onnxruntime") is not None:
        plans += [Plan("onnxruntime", part, "float32") for part in ("features", "network")]
    return plans


def runner(plan: Plan, pipeline: Pipeline, files: EngineFiles) -> Measure:
    """Measures images [B, 3, h, w] in [0, 1] as `Pipeline.measure` does, by the plan."""
    if plan.engine == "torch":
        backbone = prepared(pipeline.backbone, plan.precision)
        run = lambda images: [backbone(images).flatten(2).transpose(1, 2)]  # noqa: E731
    else:
        run = _run_of(plan, files.graph(plan.part))
    size = pipeline.model.feature_size

    def measure(images: Tensor, told: Sequence[int | None] | None = None) -> Measured:
        tokens, *rest = run(images)
        residual = rest[0].transpose(1, 2).unflatten(2, size) if rest else pipeline.residual(tokens)
        return pipeline.measure_residual(tokens, residual, told)

    return measure


def _run_of(plan: Plan, path: Path) -> Callable[[Tensor], list[Tensor]]:
    """The engine's graph: images -> tokens, and the residual where it goes that far."""
    threads = torch.get_num_threads()
    if plan.engine == "onnxruntime":
        session = onnxruntime_session(path, threads)
        return lambda images: [torch.from_numpy(one) for one in session.run(None, {"images": images.numpy()})]
    request = openvino_request(openvino_model(path), threads, plan.precision)
    count, lock = len(request.model_outputs), threading.Lock()

    def run(images: Tensor) -> list[Tensor]:
        with lock:  # its memory is used again by the next call
            request.infer({"images": images.contiguous().numpy()}, share_inputs=True)
            return [torch.from_numpy(np.array(request.get_output_tensor(k).data, np.float32)) for k in range(count)]

    return run
