"""Files that are whole or not there: written beside their place, then renamed into it.

What is being written is called .NAME.HOST-PID-RANDOM.partial. A process that is killed leaves it; the next one that
writes NAME on the same host sweeps away what no living process is at.
"""

import contextlib
import ctypes
import hashlib
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

_PARTIAL = re.compile(r"\.(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{8}\.partial$")
_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
_NAME_BYTES = 150  # of a name in another: file systems take 255
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
_HERE = -100  # AT_FDCWD


@contextlib.contextmanager
def atomic_path(target: str | os.PathLike) -> Iterator[Path]:
    """A path beside `target` to write a file to; on leaving without an error it is renamed over `target`.

    The file gets the mode that the user's umask gives to any other, whatever made it.
    """
    target = Path(target)
    sweep(target)
    partial = _beside(target)
    try:
        yield partial
        _settle(partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(target: str | os.PathLike) -> Iterator[Path]:
    """A new directory beside `target` to fill; on leaving without an error it takes `target`'s place.

    A directory that is there is exchanged for it in one step where the system can (Linux), and goes last.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target)
    partial = _beside(target)
    partial.mkdir()
    try:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                _settle(file)
        if not target.exists():
            partial.rename(target)
        elif not _exchanged(partial, target):
            old = target.with_name(f"{_hidden(target)}{uuid.uuid4().hex[:8]}.old")
            target.rename(old)
            try:
                partial.rename(target)
            except BaseException:
                old.rename(target)
                raise
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sweep(target: str | os.PathLike) -> None:
    """Remove what killed processes of this host left half-written for `target`."""
    target = Path(target)
    with contextlib.suppress(OSError):
        for path in target.parent.glob(f"{_literal(_hidden(target))}*.partial"):
            match = _PARTIAL.search(path.name)
            if match and match["host"] == _HOST and not _lives(int(match["pid"])):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)


WATCH_LOCK = ".watch.lock"
"""In the folder that a watch writes into, held by it."""


@contextlib.contextmanager
def locked(path: str | os.PathLike, wait: bool = True) -> Iterator[bool]:
    """Hold an exclusive lock on the file `path`, made if missing, and give True.

    Where another process has it: waits for it, or without `wait` gives False. It is let go when its process dies.
    """
    from filelock import FileLock, Timeout  # whose import takes as long as this package's own

    lock = FileLock(path, mode=0o666)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def save_tensors(content: object, path: Path) -> None:
    """`torch.save`, whose error of a full disk names the disk.

    Raises:
        OSError: it can't be written.
    """
    import torch

    try:
        with open(path, "wb") as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError) and cause.errno is not None:
            raise OSError(cause.errno, os.strerror(cause.errno), str(path)) from None
        raise


def sha256_of_file(path: str | os.PathLike) -> str:
    """Hex SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _beside(target: Path) -> Path:
    return target.with_name(f"{_hidden(target)}{_HOST}-{os.getpid()}-{uuid.uuid4().hex[:8]}.partial")


def _hidden(target: Path) -> str:
    """What the names of half-written files for `target` begin with: its own name, or a hash where that is long."""
    encoded = os.fsencode(target.name)
    return f".{target.name if len(encoded) <= _NAME_BYTES else hashlib.sha256(encoded).hexdigest()[:32]}."


def _literal(name: str) -> str:
    """The name as a glob pattern of itself."""
    return re.sub(r"([*?[])", r"[\1]", name)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _exchanged(first: Path, second: Path) -> bool:
    """Whether the two have changed places, in one step: not every system and file system can."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    return renameat2(_HERE, os.fsencode(first), _HERE, os.fsencode(second), _EXCHANGE) == 0


def _settle(path: Path) -> None:
    """On the disk, and with the mode of an ordinary new file."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    with contextlib.suppress(OSError):  # file systems without modes
        path.chmod(0o666 & ~_umask())


def _umask() -> int:
    """Of this process, read where reading does not set it for other threads, if the system says."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("Umask:")).split()[1], 8)
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
