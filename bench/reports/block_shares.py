"""How many key blocks are wholly hidden, wholly visible or mixed, by token order and block size.

    python -m bench.reports.block_shares

Exact, by looking at all pairs of tokens. It decides which order the kernels use: see docs/design/gpu-kernels.md.
"""

import numpy as np

SHAPES = [((14, 14), 7), ((16, 16), 9), ((28, 28), 15), ((56, 56), 29), ((64, 64), 11), ((100, 100), 9)]
# Name, tile of an order (None: row by row), queries and keys in a block.
ORDERS = [
    ("rows 64 x 64", None, 64, 64),
    ("rows 64 x 32", None, 64, 32),
    ("rows 64 x 16", None, 64, 16),
    ("8x8 tiles 64 x 64", 8, 64, 64),
    ("8x8 tiles 64 x 16", 8, 64, 16),
    ("4x4 tiles 16 x 16", 4, 16, 16),
]


def token_order(height: int, width: int, tile: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each token, in the order in which they form blocks."""
    row, col = (axis.ravel() for axis in np.mgrid[:height, :width])
    if tile is not None:
        order = np.lexsort((col, row, col // tile, row // tile))
        row, col = row[order], col[order]
    return row, col


def shares(
    height: int, width: int, window: int, tile: int | None, queries: int, keys: int
) -> tuple[float, float, float]:
    """(hidden, visible, mixed) shares of the blocks."""
    row, col = token_order(height, width, tile)
    radius = window // 2
    counts = np.zeros(3)
    for first in range(0, height * width, queries):
        near_row = np.abs(row[first : first + queries, None] - row) <= radius
        near = near_row & (np.abs(col[first : first + queries, None] - col) <= radius)
        starts = np.arange(0, height * width, keys)
        every = np.logical_and.reduceat(near.all(axis=0), starts)
        some = np.logical_or.reduceat(near.any(axis=0), starts)
        counts += every.sum(), (~some).sum(), (some & ~every).sum()
    return tuple(counts / counts.sum())


def main() -> None:
    print("share of blocks, hidden/visible/mixed, in percent")
    print(f"{'grid, window':16}" + "".join(f"{name:>20}" for name, *_ in ORDERS))
    for (height, width), window in SHAPES:
        line = f"{f'{height}x{width}, {window}':16}"
        for _, tile, queries, keys in ORDERS:
            line += f"{'/'.join(f'{100 * s:.0f}' for s in shares(height, width, window, tile, queries, keys)):>20}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
