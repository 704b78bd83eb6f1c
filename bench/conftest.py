"""Options of the benchmarks, which cases a run selects, and the table at its end."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench.tools.competitors import ONLY_ON_A_GPU
from bench.tools.harness import Run, Turns
from bench.tools.marks import MARKS, is_left_out, weight_of, why_not_here
from bench.tools.table import as_json, environment, markdown
from bench.tools.turns import Budget, Replay
from uniad_fast.ops.checks import multiplies_bfloat16

SECONDS, SECONDS_OF_LARGE = 290, 1800
RUN = pytest.StashKey[Run]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("uniad_fast's benchmarks")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to measure")
    group.addoption(
        "--dtype",
        action="append",
        choices=["float32", "bfloat16", "float16"],
        help="of the inputs, once for each; float32, and bfloat16 where the device multiplies it, if not given",
    )
    group.addoption("--threads", type=int, help="of torch")
    group.addoption("--large", action="store_true", help="large and slow cases too, and every engine")
    group.addoption(
        "--budget",
        type=float,
        help=f"seconds that rounds are planned for, {SECONDS} or {SECONDS_OF_LARGE} with --large if not given",
    )
    group.addoption("--table", type=Path, metavar="FILE.json", help="where to write the table too")


def pytest_configure(config: pytest.Config) -> None:
    for mark, meaning in MARKS.items():
        config.addinivalue_line("markers", f"{mark}: {meaning}.")
    option = config.getoption
    if option("--threads"):
        torch.set_num_threads(option("--threads"))
    device, large = torch.device(option("--device")), option("--large")
    dtypes = option("--dtype") or ["float32"] + ["bfloat16"] * multiplies_bfloat16(device.type)
    config.stash[RUN] = Run(
        device=device,
        dtypes=[getattr(torch, name) for name in dtypes],
        smoke=option("--benchmark-disable"),
        large=large,
        budget=Budget(option("--budget") or (SECONDS_OF_LARGE if large else SECONDS)),
        replay=Replay(),
        say=lambda line: _say(config, line),
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    run = config.stash[RUN]
    kept: dict[bool, list[pytest.Item]] = {True: [], False: []}
    for item in items:
        marks = [mark.name for mark in item.iter_markers()]
        kept[run.smoke or not is_left_out(marks, run.large)].append(item)
        if why := why_not_here(marks, run.device.type):
            item.add_marker(pytest.mark.skip(reason=why))
        item.add_marker(pytest.mark.benchmark(timer=run.replay))
    items[:] = sorted(kept[True], key=_weight)
    if kept[False]:
        config.hook.pytest_deselected(items=kept[False])


def pytest_collection_finish(session: pytest.Session) -> None:
    """Only now is it known what -k leaves."""
    run = session.config.stash[RUN]
    measured = [item for item in session.items if item.get_closest_marker("skip") is None]
    run.groups, run.budget.weight_to_come = len(measured), sum(map(_weight, measured))


@pytest.fixture
def run(request: pytest.FixtureRequest) -> Run:
    return request.config.stash[RUN]


@pytest.fixture
def turns(run: Run, benchmark, request: pytest.FixtureRequest) -> Iterator[Turns]:
    weight = _weight(request.node)
    yield Turns(run, benchmark, weight)
    run.done += 1
    run.budget.weight_to_come -= weight
    if run.device.type == "cuda":
        torch.compiler.reset()  # a case is a recompilation of the same function, and dynamo stops after some
        torch.cuda.empty_cache()


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info |= environment(config.stash[RUN].device)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    run = config.stash[RUN]
    if not run.rows:
        return
    about = environment(run.device)
    terminalreporter.write_line("\n" + markdown(run.rows, about))
    if run.device.type != "cuda":
        terminalreporter.write_line(f"\nOn a GPU alone: {'; '.join(ONLY_ON_A_GPU)}.")
    if path := config.getoption("--table"):
        path.write_text(as_json(run.rows, about))


def _weight(item: pytest.Item) -> int:
    return weight_of(mark.name for mark in item.iter_markers())


def _say(config: pytest.Config, line: str) -> None:
    """A line at once, past pytest's capture."""
    reporter, capture = (config.pluginmanager.get_plugin(name) for name in ("terminalreporter", "capturemanager"))
    with capture.global_and_fixture_disabled():
        reporter.ensure_newline()
        reporter.write_line(line)
