"""What spoils a file or a value, and a folder to do it in."""

import contextlib
import copy
import os
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 5), st.just(2**70), st.floats(), st.text(max_size=6), st.just([]),
    st.just({}), st.just([1, 2, 3, 4]), st.just({"a": {"b": []}}), st.just(["good", None]), st.just("x" * 300),
)  # fmt: skip


@contextlib.contextmanager
def folder():
    """A folder for a moment, in memory where the system has such a place."""
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory, prefix="fuzz-") as name:
        yield Path(name)


def damaged(draw, content: bytes) -> bytes:
    """The bytes with some of them changed, cut off, put in or doubled."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        how = draw(st.sampled_from(["flip", "cut", "insert", "double", "zero"]))
        if how == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "cut":
            del content[at:]
        elif how == "insert":
            content[at:at] = draw(st.binary(min_size=1, max_size=6))
        elif how == "double":
            content[at:at] = content[at : at + 40]
        else:
            content[at : at + 4] = b"\0" * min(4, len(content) - at)
    return bytes(content)


def changed(draw, content: Any) -> Any:
    """The nested value with one of its parts replaced, removed or added."""
    content = copy.deepcopy(content)
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in items:
            places.append((value, key))
            walk(inner)

    walk(content)
    if not places:
        return content
    parent, key = draw(st.sampled_from(places))
    how = draw(st.sampled_from(["replace", "remove", "add", "nudge"]))
    if how == "remove":
        del parent[key]
    elif how == "add" and isinstance(parent, dict):
        parent[draw(st.text(max_size=4))] = draw(JUNK)
    elif how == "nudge" and isinstance(parent[key], (int, float)) and not isinstance(parent[key], bool):
        parent[key] = draw(st.sampled_from([-1, 0, 1, 2, 10**6, 10**12, 0.5, float("nan"), float("inf"), -parent[key]]))
    else:
        parent[key] = draw(JUNK)
    return content
