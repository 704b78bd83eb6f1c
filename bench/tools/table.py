"""The table of a run: a row a way, its median and how many times as fast as the baselines it is; Markdown and JSON."""

import json
import platform
import statistics
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version

import torch

from bench.tools.turns import Way
from uniad_fast.deploy.engine_files import machine

BASELINES = ("public", "torch")
PRODUCT = "product 2048"
"""The way that is no way of doing the same: a square product, whose rate is what the device has to give."""


@dataclass(frozen=True)
class Row:
    """A way in its group: seconds of one unit of work, one a round, and whatever else is known of it.

    figures: further columns by name. note: why a number is missing.
    """

    group: str
    way: Way
    seconds: list[float]
    figures: dict[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None


def ratios(row: Row, rows: list[Row]) -> dict[str, float]:
    """How many times as fast as each baseline of its group: in its own dtype, or where there is none, in float32."""
    found: dict[str, float] = {}
    for name in BASELINES if row.way.name != PRODUCT else ():
        others = {r.way.dtype: r.median for r in rows if r.group == row.group and r.way.name == name}
        other = others.get(row.way.dtype) or others.get("float32")
        if other and row.median and row.way.name != name:
            found[name] = other / row.median
    return found


def environment(device: torch.device) -> dict[str, str | int]:
    """What a time hangs on, besides the code."""
    found = {"date": date.today().isoformat(), **machine(), "python": platform.python_version()}
    if device.type == "cuda":
        found |= {"GPU": torch.cuda.get_device_name(device), "triton": version("triton")}
    return {name: value for name, value in found.items() if value is not None}


def as_json(rows: list[Row], about: dict[str, str | int]) -> str:
    """{"environment": ..., "rows": [...]}, times in seconds."""
    content = [
        {
            "group": row.group,
            "way": row.way.name,
            "dtype": row.way.dtype,
            "median": row.median,
            "seconds": row.seconds,
            "times": ratios(row, rows),
            "figures": row.figures,
            "note": row.note,
        }
        for row in rows
    ]
    return json.dumps({"environment": about, "rows": content}, indent=1, allow_nan=False) + "\n"


def markdown(rows: list[Row], about: dict[str, str | int]) -> str:
    """The same for people; columns that no row has anything in are left out."""
    extra = list(dict.fromkeys(name for row in rows for name in row.figures))
    notes = any(row.note for row in rows)
    header = ["", "way", "dtype", "ms", *(f"times {name}" for name in BASELINES), "rounds", *extra, *["note"] * notes]
    lines = [
        ", ".join(f"{name} {value}" for name, value in about.items()) + ". Medians; the ways of a group took turns.",
        "",
        _line(header),
        "|" + "---|" * len(header),
    ]
    last = ""
    for row in rows:
        found = ratios(row, rows)
        lines.append(
            _line(
                [
                    "" if row.group == last else row.group,
                    row.way.name,
                    row.way.dtype,
                    "" if row.median is None else _short(row.median * 1e3),
                    *(f"{found[name]:.2f}" if name in found else "" for name in BASELINES),
                    str(len(row.seconds) or ""),
                    *(_short(row.figures[name]) if name in row.figures else "" for name in extra),
                    *[row.note.replace("|", "/")] * notes,
                ]
            )
        )
        last = row.group
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _short(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
