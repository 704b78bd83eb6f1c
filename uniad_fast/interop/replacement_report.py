"""What `replace_attention` did to a model, and what became of the calls since."""

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass
class Row:
    """One attention of the model: where it is, whether it is replaced, and else why not."""

    path: str
    module: nn.Module
    why_not: str | None

    def state(self) -> tuple[str, str]:
        """What became of it, and of the calls that it has had so far."""
        if self.why_not is not None:
            return "left alone", self.why_not
        calls: Any = getattr(self.module, "uniad_fast", None)
        if calls is None:
            return "restored", ""
        served, left = list(map(str, calls.served)), calls.left
        if served and left:
            return "in part", "; ".join([*served, f"but not where {'; '.join(left)}"])
        if left:
            return "left alone", "; ".join(left)
        return "replaced", "; ".join(served) or "not called yet"


class ReplacementReport:
    """What `replace_attention` did. Printed again after a forward pass, it says which windows it has served."""

    def __init__(self, rows: list[Row], cached_masks: list[str]) -> None:
        self.rows = rows
        self.cached_masks = cached_masks

    @property
    def replaced(self) -> list[str]:
        """Paths of the modules that are replaced."""
        return [row.path for row in self.rows if row.why_not is None]

    @property
    def left_alone(self) -> dict[str, str]:
        """{path: why} of the others."""
        return {row.path: row.why_not for row in self.rows if row.why_not is not None}

    def __str__(self) -> str:
        lines = [(row.path or "(the model)", *row.state()) for row in self.rows]
        width = max((len(path) for path, *_ in lines), default=0)
        table = [f"{path:{width}}  {what:10}  {why}".rstrip() for path, what, why in lines]
        table += [f"{path or '(the model)'}: its masks are built once" for path in self.cached_masks]
        return "\n".join(table) or "no nn.MultiheadAttention in this model"
