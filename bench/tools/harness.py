"""Groups of ways within one run of pytest-benchmark: time is shared, turns are taken, all of it ends in one table."""

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from bench.tools.device import device_figures
from bench.tools.table import PRODUCT, Row
from bench.tools.turns import Budget, Replay, Way, Work, synchronized_clock, take_turns

_SIDE = 2048


@dataclass
class Run:
    """What all groups of a run share. smoke: each way is only seen to run, on tiny shapes; nothing is measured."""

    device: torch.device
    dtypes: list[torch.dtype]
    smoke: bool
    large: bool
    budget: Budget
    replay: Replay
    say: Callable[[str], None]
    groups: int = 0
    done: int = 0
    rows: list[Row] = field(default_factory=list)

    def sized(self, case: Any) -> Any:
        """The case, or its tiny likeness."""
        return case.tiny if self.smoke else case


@dataclass
class Turns:
    """One group's: measures its ways, keeps the rows, and lets pytest-benchmark have them as its own."""

    run: Run
    benchmark: Any
    weight: int

    def __call__(
        self,
        group: str,
        works: Mapping[Way, Work],
        *,
        units: int = 1,
        flops: float = 0,
        capturable: Collection[Way] = (),
        missing: Mapping[Way, str] | None = None,
    ) -> dict[Way, object]:
        """What each way gave at its first call.

        Args:
            units: how many of what the table counts one call does.
            flops: of one call's products; with a way called `PRODUCT` for the rate, the column `times floor`.
            capturable: ways that a CUDA graph can hold.
            missing: ways that can't be measured, and why.
        """
        if self.run.smoke:
            self.tell(group, [])
            return {way: work() for way, work in works.items()}
        measured = take_turns(works, self.run.budget, weight=self.weight, clock=synchronized_clock)
        rows = []
        for way, work in works.items():
            figures, note = {}, "its first call" * measured.cold
            if self.run.device.type == "cuda" and way.name != PRODUCT and not measured.cold:
                figures, note = device_figures(work, way in capturable)
            rows.append(Row(group, way, [s / units for s in measured.seconds[way]], figures, note))
        if flops:
            rows = [_beside_floor(row, rows, flops / units) for row in rows]
        self.tell(group, rows + [Row(group, way, [], note=why) for way, why in (missing or {}).items()])
        return measured.first

    def tell(self, group: str, rows: list[Row]) -> None:
        """Keeps rows that were measured, passes them on, and says how far the run has come."""
        run, budget = self.run, self.run.budget
        if run.smoke:
            self.benchmark.pedantic(lambda: None)
            return
        run.rows += rows
        timed = [row for row in rows if row.seconds]
        # pytest-benchmark's fixture serves one way; the copies are made while it is unused.
        for row, one in zip(timed, [self.benchmark, *(copy.copy(self.benchmark) for _ in timed[1:])], strict=False):
            one.group = group
            one.name, one.fullname = f"{one.name} {row.way}", f"{one.fullname} {row.way}"
            one.extra_info = {"way": row.way.name, "dtype": row.way.dtype, **row.figures}
            run.replay.tell(row.seconds)
            one.pedantic(lambda: None, rounds=len(row.seconds))
        rounds = max((len(row.seconds) for row in timed), default=0)
        run.say(
            f"{run.done + 1}/{run.groups} {group}: {len(timed)} ways, {rounds} rounds; "
            f"{clock_time(budget.elapsed)} elapsed, {clock_time(budget.left)} left"
        )


def products(dtypes: list[torch.dtype], device: torch.device) -> dict[Way, Work]:
    """A square product in each dtype: its rate is what the device has to give."""
    works: dict[Way, Work] = {}
    for dtype in dtypes:
        left, right = torch.randn(2, _SIDE, _SIDE, device=device).to(dtype)
        works[Way(PRODUCT, name_of(dtype))] = lambda left=left, right=right: left @ right
    return works


def name_of(dtype: torch.dtype) -> str:
    """torch.float32 -> float32."""
    return str(dtype).removeprefix("torch.")


def clock_time(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def _beside_floor(row: Row, rows: list[Row], flops: float) -> Row:
    """With its time as a multiple of its products' at the square one's rate; the square one with that rate."""
    square = next((r.median for r in rows if r.way == (PRODUCT, row.way.dtype)), None)
    if not square or not row.median:
        return row
    rate = 2 * _SIDE**3 / square
    figures = {"GFLOP/s": rate / 1e9} if row.way.name == PRODUCT else {"times floor": row.median * rate / flops}
    return replace(row, figures=row.figures | figures)
