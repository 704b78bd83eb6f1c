"""What is kept of engines on this machine: a detector's graphs for them, and how fast each of them was.

A folder a detector, in the user's cache: `network.onnx` and `features.onnx` with their checksums in `graphs.json`, and
a table of measurements for each machine (processor, threads, versions) that has measured.
"""

import contextlib
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..data.feature_cache import CacheError, default_cache_dir
from ..detect.detector import AnomalyDetector
from ..files import atomic_path, locked, sha256_of_file
from ..image_size import in_json, in_words
from ..models.precision import computes_in_bfloat16
from ..state_dicts import hash_of_state_dict
from .export import onnx_model, quiet
from .graph import ResidualGraph

PARTS = ("features", "network")
"""How far an engine goes: to the backbone's features, or to the network's residuals."""
_OUTPUTS = ("tokens", "residual")
_FOLDER = "engines"
_SUMS = "graphs.json"
_KEPT = 8  # detectors; b4's graphs are 55 MB


class EngineFiles:
    """The folder of one detector; nothing is made before it is needed.

    Args:
        cache_dir: in which `engines/` is; None is the user's cache.
    """

    def __init__(self, detector: AnomalyDetector, cache_dir: str | os.PathLike | None = None) -> None:
        self._detector, self._cache_dir = detector, cache_dir
        self._pipeline = detector.pipeline

    @cached_property
    def folder(self) -> Path:
        """Named after all that a graph hangs on: tensors, what leaves no trace in them, and what writes graphs.

        Raises:
            CacheError: there is no home folder to keep it in.
        """
        state = {name: tensor for name, tensor in self._pipeline.state_dict().items() if name != "roi"}
        settings = self._detector.settings.to_json()
        told: dict[str, Any] = {
            name: settings[name] for name in ("backbone", "image_size", "architecture", "recipe", "residual_score")
        }
        backbone, size = self._pipeline.backbone, in_json(self._pipeline.image_size)
        told["levels"] = [backbone.out_indices, backbone.stride, backbone.padded_for]
        told["sizes"] = [size, self._pipeline.model.feature_size, self._pipeline.precision]
        told["bfloat16"] = computes_in_bfloat16(self._pipeline.precision, self._detector.device)
        told["versions"] = {name: _version(name) for name in ("torch", "onnx", "onnxscript")} | {"own": __version__}
        text = f"{hash_of_state_dict(state)} {json.dumps(told, sort_keys=True, default=str)}"
        return _home(self._cache_dir) / hashlib.sha256(text.encode()).hexdigest()[:32]

    def graph(self, part: str) -> Path:
        """The ONNX file of a part of `PARTS`, `images` -> "tokens" and, of "network", "residual"."""
        target = self.folder / f"{part}.onnx"
        if not self._is_whole(target):
            self.folder.mkdir(parents=True, exist_ok=True)
            with locked(self.folder / ".lock"):
                if not self._is_whole(target):
                    self._write_graphs()
        return target

    def table(self) -> list[dict[str, Any]]:
        """What `remember` was given on this machine; nothing where that can't be read."""
        try:
            return _read(self._table_file())
        except CacheError:
            return []

    def remember(self, rows: list[dict[str, Any]]) -> None:
        """Keep these rows for this machine as it is, if there is a place for them."""
        content: dict[str, Any] = {"machine": machine(), "rows": rows, "backbone": self._pipeline.backbone.name}
        content["size"] = in_words(self._pipeline.image_size)
        with contextlib.suppress(OSError, CacheError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_path(self._table_file()) as partial:
                partial.write_text(json.dumps(content, indent=2) + "\n")
            _forget_oldest(self.folder.parent, self.folder)

    def _table_file(self) -> Path:
        return self.folder / f"table-{_id_of_machine()}.json"

    def _is_whole(self, path: Path) -> bool:
        try:
            sums = json.loads((self.folder / _SUMS).read_text())
            return bool(sums[path.name] == sha256_of_file(path))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return False

    def _write_graphs(self) -> None:
        import onnx

        example = torch.zeros(2, 3, *self._pipeline.image_size)
        batch = {"images": {0: torch.export.Dim("batch")}}
        with torch.no_grad(), quiet():
            program = torch.export.export(ResidualGraph(self._pipeline).eval(), (example,), dynamic_shapes=batch)
        model = onnx_model(program, example, _OUTPUTS)
        features = onnx.utils.Extractor(model).extract_model(["images"], [_OUTPUTS[0]])
        sums = {}
        for part, graph in zip(PARTS, (features, model), strict=True):
            target = self.folder / f"{part}.onnx"
            with atomic_path(target) as partial:
                onnx.save(graph, str(partial))
            sums[target.name] = sha256_of_file(target)
        with atomic_path(self.folder / _SUMS) as partial:
            partial.write_text(json.dumps(sums))


def all_tables(cache_dir: str | os.PathLike | None = None) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """What all detectors remember of this machine as it is: (words about the detector, rows)."""
    with contextlib.suppress(OSError, CacheError):
        for path in sorted(_home(cache_dir).glob(f"*/table-{_id_of_machine()}.json")):
            if rows := _read(path):
                with contextlib.suppress(OSError, ValueError, KeyError):
                    content = json.loads(path.read_text())
                    yield f"{content['backbone']} at {content['size']} pixels", rows


def machine() -> dict[str, Any]:
    """What a measurement hangs on."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "uniad_fast": __version__,
        **{name: _version(name) for name in ("torch", "onnx", "onnxscript", "onnxruntime", "openvino")},
    }


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(path.read_text())["rows"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _id_of_machine() -> str:
    return hashlib.sha256(json.dumps(machine(), sort_keys=True).encode()).hexdigest()[:16]


def _home(cache_dir: str | os.PathLike | None) -> Path:
    return Path(cache_dir if cache_dir is not None else default_cache_dir(), _FOLDER)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _forget_oldest(home: Path, but: Path) -> None:
    """Leave the folders that were measured last."""
    folders = [path for path in home.iterdir() if path.is_dir() and path != but]
    for path in sorted(folders, key=lambda path: path.stat().st_mtime)[: -(_KEPT - 1)]:
        shutil.rmtree(path, ignore_errors=True)
