"""Options of the benchmarks, and ratios against the public way printed at the end."""

import platform
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version

import pytest
import torch

from bench.tools.cases import AttentionCase, ModelCase

Case = AttentionCase | ModelCase


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to measure")
    parser.addoption("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the inputs")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return getattr(torch, request.config.getoption("--dtype"))


@pytest.fixture
def sized(request: pytest.FixtureRequest) -> Callable[[Case], Case]:
    """A case as it is, or of batch 1 under --benchmark-disable, where each benchmark is only seen to run."""
    smoke = request.config.getoption("--benchmark-disable")
    return lambda case: replace(case, batch=1) if smoke else case


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Medians of every group and how many times as fast as the group's `public` they are."""
    session = getattr(config, "_benchmarksession", None)
    groups: dict[str, dict[str, float]] = {}
    device_figures: dict[tuple[str, str], str] = {}
    for bench in session.benchmarks if session is not None else []:
        if bench.stats.rounds and "ways" in bench.extra_info:
            groups[f"{bench.group}, an image"] = bench.extra_info["ways"]
    for bench in session.benchmarks if session is not None else []:
        if bench.stats.rounds and "implementation" in bench.extra_info:
            implementation = bench.extra_info["implementation"]
            groups.setdefault(bench.group, {})[implementation] = bench.stats.median
            if "device_ms" in bench.extra_info:
                megabytes = bench.extra_info["peak_bytes"] / 2**20
                figures = f"  device {bench.extra_info['device_ms']:.3f} ms, peak {megabytes:.0f} MiB"
                device_figures[bench.group, implementation] = figures
    if not groups:
        return
    write = terminalreporter.write_line
    device = config.getoption("--device")
    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or platform.machine()
    write(
        f"medians on {device} ({name}), {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"timm {version('timm')}, python {platform.python_version()}, {config.getoption('--dtype')}"
    )
    for group, medians in groups.items():
        for implementation, median in medians.items():
            ratio = f"{medians['public'] / median:6.2f} x public" if "public" in medians else ""
            figures = device_figures.get((group, implementation), "")
            write(f"  {group:55} {implementation:32} {median * 1e3:10.2f} ms {ratio}{figures}")
