"""Progress with rate and time left: a bar on a terminal, a line now and then in a log."""

import sys

from tqdm import tqdm


def progress(description: str, total: int, initial: int = 0, unit: str = "image", quiet: bool = False) -> tqdm:
    """A tqdm bar on stderr, to be used in a `with` and moved by `.update(n)`."""
    on_terminal = sys.stderr is not None and sys.stderr.isatty()  # it is None where it was closed
    return tqdm(
        desc=description,
        total=total,
        initial=initial,
        unit=unit,
        disable=quiet or sys.stderr is None,
        dynamic_ncols=True,
        mininterval=0.2 if on_terminal else 20,
        ascii=None if on_terminal else True,
    )
