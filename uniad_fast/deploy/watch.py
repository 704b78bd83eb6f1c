"""A folder that fills: files are scored once they are complete, each once, whatever happens to the process."""

import math
import os
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer
from watchdog.observers.polling import PollingObserver

from ..data.image_files import EXTENSIONS, find_images
from ..detect.detector import AnomalyDetector
from ..detect.picture import draw_picture
from ..detect.results import write_png
from ..detect.score_files import score_files
from ..errors import UniadFastError
from ..printable import printable
from ..signals import asked_to_stop
from .journal import Journal

FIELDS = ("image", "class", "score", "label", "threshold", "heat_map", "regions", "bytes", "modified", "error")
_EVERY = 0.1  # seconds between two looks
_COMMAND_SECONDS = 60
_TRIES = 5  # to read a file that the system does not give
_EMPTY = 10.0  # seconds until a file without a byte is no more taken for one that is being written
_LOOK_AROUND = 60.0  # seconds between two looks at the whole folder


class State(NamedTuple):
    """What tells a file from a later one of its name: bytes, and nanoseconds of its last change."""

    size: int
    modified: int


_GONE = State(-2, -2)


def _state(path: Path) -> State:
    try:
        found = path.stat()
    except OSError:
        return _GONE
    return State(found.st_size, found.st_mtime_ns)


@dataclass(frozen=True)
class WatchOptions:
    """How a folder is watched.

    Attributes:
        settle: seconds that a file must not change to be complete.
        batch: images measured at a time.
        heat_maps: draw a picture of each.
        on_defect: program and arguments that are run with a defective image's path and score.
        poll: look at the whole folder each second, for shares that send no events.
    """

    settle: float = 1.0
    batch: int = 16
    heat_maps: bool = True
    on_defect: tuple[str, ...] = ()
    poll: bool = False


class _Arriving(FileSystemEventHandler):
    """Images below a folder that were seen and are not scored yet, in the order in which they were.

    Args:
        without: a folder that is not looked into.
    """

    def __init__(self, folder: Path, without: Path) -> None:
        self._folder, self._without = folder, without
        self._files: dict[Path, tuple[State, float]] = {}  # state when last looked at, since when
        self._lock = threading.Lock()

    def on_any_event(self, event: FileSystemEvent) -> None:
        if event.is_directory or event.event_type in ("deleted", "opened", "closed_no_write"):
            return
        for name in (event.src_path, event.dest_path):
            if name:
                self.seen(Path(os.fsdecode(name)))

    def seen(self, path: Path, after: float = 0.0) -> None:
        """Something happened to this file; it is not looked at before so many seconds are over."""
        inside = path.relative_to(self._folder)
        is_hidden = any(part.startswith(".") for part in inside.parts)
        if (
            path.suffix.lower() in EXTENSIONS
            and not is_hidden
            and self._without not in Path(os.path.realpath(path)).parents
        ):
            with self._lock:
                self._files.setdefault(path, (State(-1, -1), time.monotonic() + after))

    def complete(self, settle: float, most: int) -> list[tuple[Path, State]]:
        """Some that have not changed for so many seconds; they are forgotten here."""
        ready: list[tuple[Path, State]] = []
        with self._lock:
            waiting = list(self._files.items())
        for path, (before, since) in waiting:
            if len(ready) >= most:
                break
            if time.monotonic() < since:
                continue
            state = _state(path)
            with self._lock:
                if state == _GONE:
                    del self._files[path]
                elif state != before:
                    self._files[path] = (state, time.monotonic())
                elif time.monotonic() - since >= (settle if state.size else max(settle, _EMPTY)):
                    ready.append((path, state))
                    del self._files[path]
        return ready


def watch(
    detector: AnomalyDetector,
    folder: Path,
    output: Path,
    options: WatchOptions,
    say: Callable[[str], object],
) -> int:
    """Score what is in the folder and what arrives, into `output`, until a signal asks to stop.

    A file is scored again only if it has changed. One that can't be read gets a row with its error.

    Args:
        say: is told a line for each image.

    Returns:
        How many images were scored.

    Raises:
        UniadFastError: another process watches into `output`, or that holds the folder.
    """
    folder, inside = folder.absolute(), Path(os.path.realpath(output))  # whatever links lead there
    if Path(os.path.realpath(folder)).is_relative_to(inside):
        raise UniadFastError(f"{output} holds {folder}: write to a folder in it, or elsewhere")
    journal = Journal(output, FIELDS)
    known = {(row.get("image"), row.get("bytes"), row.get("modified")) for row in journal.rows}
    journal.rows.clear()
    arriving, tries = _Arriving(folder, inside), Counter[Path]()
    observer = (PollingObserver if options.poll else Observer)()
    observer.schedule(arriving, str(folder), recursive=True)
    observer.start()
    scored, look = 0, 0.0
    try:
        while not asked_to_stop():
            if time.monotonic() >= look:  # events can be lost, where there are too many at once
                for path in find_images(folder, inside).images:
                    if (str(path), *_state(path)) not in known:
                        arriving.seen(path)
                look = time.monotonic() + _LOOK_AROUND
            ready = arriving.complete(options.settle, options.batch)
            new = [(path, state) for path, state in ready if (str(path), *state) not in known]
            if not new:
                time.sleep(_EVERY)
                continue
            for row in _rows(detector, new, output, folder, options, say):
                path = Path(row["image"])
                tries[path] += 1
                if row.get("error") and not os.access(path, os.R_OK) and tries[path] < _TRIES:
                    arriving.seen(path, after=tries[path] * 2.0)  # it may be given to us yet
                    continue
                del tries[path]
                journal.add(row)
                known.add((row["image"], row["bytes"], row["modified"]))
                scored += 1
                _tell(row, options, say)
    finally:
        observer.stop()
        observer.join()
        journal.close()
    return scored


def _rows(
    detector: AnomalyDetector,
    new: list[tuple[Path, State]],
    output: Path,
    folder: Path,
    options: WatchOptions,
    say: Callable[[str], object],
) -> list[dict[str, Any]]:
    rows: dict[int, dict[str, Any]] = {}
    threshold = detector.calibration.threshold.value
    failed: list[str] = []
    for batch in score_files(
        detector, [path for path, _ in new], batch_size=options.batch, keep_pictures=options.heat_maps, quiet=True
    ):
        failed += batch.unreadable
        for note in batch.notes:
            say(f"note: {note}")
        for image in batch.images:
            prediction = image.prediction
            if not math.isfinite(prediction.score):
                failed.append(f"{printable(image.path)}: its score is {prediction.score}")
                continue
            drawn = None
            if image.picture is not None:
                try:
                    picture = draw_picture(image.picture, prediction, detector.calibration)
                    drawn = str(write_png(picture, output / "heatmaps" / _name_of(image.path.relative_to(folder))))
                except (OSError, MemoryError) as problem:  # which costs no verdict
                    say(f"not drawn: {printable(image.path)}: {printable(problem)}")
            rows[image.number] = {
                "class": prediction.class_name,
                "score": prediction.score,
                "label": int(bool(prediction.label)),
                "threshold": threshold,
                "heat_map": drawn,
                "regions": [region.to_json() for region in prediction.regions],
            }
    found = []
    for number, (path, state) in enumerate(new):
        start = f"{printable(path)}: "
        error = next((message.removeprefix(start) for message in failed if message.startswith(start)), None)
        nothing: dict[str, Any] = dict.fromkeys(FIELDS[1:7], None) | {"regions": []}
        own = rows.get(number, nothing | {"error": error or "it could not be read"})
        found.append({"image": str(path)} | own | {"bytes": state.size, "modified": state.modified})
    return found


def _name_of(inside: Path) -> Path:
    """Of an image's picture: its own, with .png after another suffix or several: a.png, a.jpg and a.jpg.png have one
    each.
    """
    alone = inside.suffix == ".png" and Path(inside.stem).suffix.lower() not in EXTENSIONS
    return inside if alone else inside.with_name(f"{inside.name}.png")


def _tell(row: dict[str, Any], options: WatchOptions, say: Callable[[str], object]) -> None:
    name = printable(row["image"])
    if row.get("error"):
        say(f"left out: {name}: {row['error']}")
        return
    say(f"{row['score']:10.4f}  {'DEFECTIVE' if row['label'] else 'good':9}  {printable(row['class'] or '?')}  {name}")
    if row["label"] and options.on_defect:
        command = [*options.on_defect, row["image"], f"{row['score']:.6g}"]
        try:
            done = subprocess.run(command, timeout=_COMMAND_SECONDS, stdin=subprocess.DEVNULL)
            problem = f"it ended with {done.returncode}" if done.returncode else None
        except (OSError, subprocess.TimeoutExpired) as error:
            problem = printable(error)
        if problem:
            say(f"note: the command for {name} failed: {problem}")
