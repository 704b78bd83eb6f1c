"""Scores that are appended as they come: JSON lines, and a CSV of the same that follows them. Killed at any moment, no
row is lost, torn or there twice.

The JSON lines are the truth. A row is one write at their end; what a kill has torn off is cut away at the next start,
and rows that the CSV has not got yet are added to it.
"""

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import UniadFastError
from ..files import WATCH_LOCK, locked
from ..printable import table_cell


class Journal:
    """scores.jsonl and scores.csv in a folder, open for appending; one process at a time.

    Args:
        directory: made if missing.
        fields: columns of the CSV; a list in one of them counts as its length.

    Raises:
        UniadFastError: another process has it, or a line before the last is none of its rows.
    """

    def __init__(self, directory: str | os.PathLike, fields: Sequence[str]) -> None:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._fields = tuple(fields)
        self._lock = locked(directory / WATCH_LOCK, wait=False)
        if not self._lock.__enter__():
            raise UniadFastError(f"another process writes into {directory}")
        self._lines, self._table = directory / "scores.jsonl", directory / "scores.csv"
        self.rows = list(self._whole_rows())
        self._repair_table()
        self._descriptors = [os.open(path, os.O_WRONLY | os.O_APPEND) for path in (self._lines, self._table)]

    def add(self, row: dict[str, Any]) -> None:
        """Append a row, a dictionary of JSON values."""
        _append(self._descriptors[0], json.dumps(row, allow_nan=False) + "\n")
        _append(self._descriptors[1], self._cells(row))

    def close(self) -> None:
        """Let another process have it."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._lock.__exit__(None, None, None)

    def _whole_rows(self) -> Iterator[dict[str, Any]]:
        """All rows that are there; a last line that is torn is cut off the file."""
        self._lines.touch()
        with open(self._lines, "r+b") as file:
            content = file.read()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                file.truncate(whole)
        for number, line in enumerate(content[:whole].splitlines(), start=1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise UniadFastError(f"{self._lines}, line {number} is no row of scores: choose another folder")
            yield row

    def _repair_table(self) -> None:
        """Bring the CSV to the rows that are there."""
        wanted = [self._line(self._fields), *map(self._cells, self.rows)]
        text = "".join(wanted)
        self._table.touch()
        with open(self._table, "r+b") as file:
            if file.read() != text.encode():
                file.seek(0)
                file.write(text.encode())
                file.truncate()

    def _cells(self, row: dict[str, Any]) -> str:
        values = [row.get(name) for name in self._fields]
        return self._line([len(value) if isinstance(value, list) else value for value in values])

    @staticmethod
    def _line(cells: Sequence[Any]) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow([table_cell(cell) for cell in cells])
        return text.getvalue()


def _append(descriptor: int, text: str) -> None:
    content = text.encode()
    if os.write(descriptor, content) != len(content):
        raise OSError("the disk is full: a row is torn, and will be cut off")
    os.fsync(descriptor)
