"""Being asked to stop: a signal is noted, and long work ends at its next safe place."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_asked: list[int] = []


class Stopped(BaseException):
    """Work ended at a safe place, because a signal asked for it. Like KeyboardInterrupt, it is no Exception."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}"


@contextlib.contextmanager
def noted() -> Iterator[None]:
    """Inside, a first SIGINT, SIGTERM or SIGHUP is noted for `stop_if_asked`; a second one acts at once, as ever.

    Programs that handle signals themselves do not use this, and nothing changes for them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's alone
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    # One that is ignored, as nohup and scripts' background jobs do it, stays ignored.
    ours = [number for number in _SIGNALS if before[number] not in (signal.SIG_IGN, None)]

    def note(number: int, _frame: FrameType | None) -> None:
        _asked.append(number)
        for each in ours:
            signal.signal(each, before[each])

    _asked.clear()
    for number in ours:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])
        _asked.clear()


def asked_to_stop() -> bool:
    """Whether a signal has been noted."""
    return bool(_asked)


def stop_if_asked() -> None:
    """Raise `Stopped` if a signal has been noted: called where nothing would be lost."""
    if _asked:
        raise Stopped(_asked[0])
