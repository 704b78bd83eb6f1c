"""Every Triton kernel over tiles, warps and stages at the main shapes, beside what ships; for `kernels/gpu/tiles.py`.

python -m bench.reports.tune [--only TEXT] [--budget SECONDS] [--compile SHARD/SHARDS] [--table FILE.json] [--smoke]

The launches are the package's own, recorded and repeated with other constants. Compiling takes most of the time:
--compile does a share of it into Triton's cache, so that several processes may go before the one that times.
--smoke: in Triton's interpreter, two choices a kernel, to see that it runs.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.tools.device import first_line
from uniad_fast import jitter_project, neighbor_masked_attention
from uniad_fast.ops.dropout import dropout, dropout_add_norm

Arguments = dict[str, Any]
SHAPES = {"14x14_window7_batch32": (32, 8, (14, 14), (7, 7)), "64x64_window11_batch4": (4, 3, (64, 64), (11, 11))}
ROWS, CHANNELS, OUT = 32 * 196, 272, 256


class Launch(NamedTuple):
    """A kernel, its grid and its arguments, by keyword."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Arguments

    def __call__(self) -> None:
        self.kernel[self.grid](**self.arguments)


class Recorder:
    """Stands where a launcher finds its kernel, and keeps each kernel's last launch."""

    def __init__(self) -> None:
        self.launches: dict[str, Launch] = {}

    def stand_in(self, module: ModuleType, names: str, prefix: str = "") -> None:
        """For the kernels of these names in a module, called `prefix` and their name."""
        for name in names.split():
            setattr(module, name, _Recorded(self, prefix + name.removesuffix("_kernel"), getattr(module, name)))


class _Recorded(NamedTuple):
    recorder: Recorder
    name: str
    kernel: Any

    def __getitem__(self, grid: Any) -> Any:
        def launch(**arguments: Any) -> None:
            self.recorder.launches[self.name] = Launch(self.kernel, grid, arguments)
            self.recorder.launches[self.name]()

        return launch


def recorded(device: torch.device, smoke: bool) -> Iterator[tuple[str, str, Launch]]:
    """(shape, kernel, launch) of all that the ops launch at the main shapes."""
    from uniad_fast.kernels.gpu import launch, launch_dropout

    recorder = Recorder()
    recorder.stand_in(launch.attention, "forward_kernel query_gradient_kernel key_value_gradient_kernel")
    recorder.stand_in(launch, "whole_sequence_kernel")
    recorder.stand_in(launch.jitter, "forward_kernel weight_gradient_kernel token_gradient_kernel", "jitter ")
    norms = "norm_forward_kernel norm_backward_kernel dropout_forward_kernel dropout_backward_kernel"
    recorder.stand_in(launch_dropout.kernels, norms)
    dtype = torch.float32 if smoke else torch.bfloat16
    shapes = {"3x4": (1, 1, (3, 4), (3, 3))} if smoke else SHAPES
    for (name, shape), p in product(shapes.items(), (0.0, 0.1)):
        recorder.launches = {}
        _attention(shape, p, device, dtype)
        yield from ((f"{name}, dropout {p}", kernel, one) for kernel, one in recorder.launches.items())
    recorder.launches = {}
    rows, channels, out = (7, 16, 32) if smoke else (ROWS, CHANNELS, OUT)
    _row_ops(rows, channels, out, device, dtype)
    yield from ((f"{rows} rows", kernel, one) for kernel, one in recorder.launches.items())


def _attention(shape: tuple, p: float, device: torch.device, dtype: torch.dtype) -> None:
    batch, heads, grid, window = shape
    tokens = torch.randn(batch, grid[0] * grid[1], 3, heads, 32, device=device, dtype=dtype)
    tensors = [tensor.requires_grad_() for tensor in tokens.permute(2, 0, 3, 1, 4)]
    out = neighbor_masked_attention(*tensors, grid, window, dropout_p=p, seed=1, impl="triton")
    torch.autograd.grad(out, tensors, torch.ones_like(out))


def _row_ops(rows: int, channels: int, out: int, device: torch.device, dtype: torch.dtype) -> None:
    def parameter(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=device, dtype=kind).requires_grad_()

    jitter_project(
        parameter(rows, channels), parameter(out, channels), scale=20.0, seed=1, impl="triton"
    ).sum().backward()
    x, affine = parameter(rows, out), [parameter(out, kind=torch.float32) for _ in range(2)]
    dropout_add_norm(x, parameter(rows, out), *affine, dropout_p=0.1, seed=1, impl="triton").sum().backward()
    dropout(x, 0.1, relu=True, seed=1, impl="triton").sum().backward()


def choices(name: str, ships: Launch) -> Iterator[Launch]:
    """What ships, and then the others: the same launch with other tiles, warps and stages."""
    yield ships
    if "BLOCK_M" in ships.arguments:
        yield from _attention_choices(name, ships)
    elif name.startswith("jitter"):
        yield from _jitter_choices(name, ships)
    else:
        yield from _row_choices(name, ships)


def _attention_choices(name: str, ships: Launch) -> Iterator[Launch]:
    old, whole = ships.arguments, name == "whole_sequence"
    tokens, own = old["HEIGHT"] * old["WIDTH"], "BLOCK_N" if name == "key_value_gradient" else "BLOCK_M"
    planes = ships.grid[0] if whole else ships.grid[0] // _blocks(tokens, old[own])
    sides = (16, 32, 64, 128)
    for m, n, warps, stages in product(sides, (old["BLOCK_N"],) if whole else sides, (4, 8), (1, 2, 3)):
        # Smaller ones leave the matrix unit idle, larger ones do not fit the registers; few elements fill no 8 warps.
        if whole or (1024 <= m * n <= 8192 and (warps == 4 or m * n >= 4096)):
            new = old | {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}
            yield Launch(ships.kernel, (planes * (1 if whole else _blocks(tokens, new[own])),), new)


def _blocks(count: int, size: int) -> int:
    return -(-count // size)


def _jitter_choices(name: str, ships: Launch) -> Iterator[Launch]:
    old = ships.arguments
    count, out, channels = old["tokens"], old["OUT"], old["CHANNELS"]
    for t, o, c, warps, stages in product((32, 64, 128), (64, 128, 256), (16, 32, 64), (4, 8), (1, 2, 3)):
        new = old | {"BLOCK_T": t, "BLOCK_O": o, "BLOCK_C": c, "num_warps": warps, "num_stages": stages}
        if name == "jitter forward":
            yield Launch(ships.kernel, (_blocks(count, t) * _blocks(out, o),), new)
        elif name == "jitter token_gradient":
            yield Launch(ships.kernel, (_blocks(count, t),), new)
        elif t < 128 and o < 256:
            splits = old["part_ptr"].shape[0]
            new["tokens_per_split"] = _blocks(_blocks(count, splits), t) * t
            yield Launch(ships.kernel, (splits * _blocks(out, o) * _blocks(channels, c),), new)


def _row_choices(name: str, ships: Launch) -> Iterator[Launch]:
    old = ships.arguments
    for rows, warps in product((4, 8, 16, 32), (2, 4, 8)):
        new = old | {"BLOCK_R": rows, "num_warps": warps}
        if name != "norm_backward":
            yield Launch(ships.kernel, (_blocks(old["rows"], rows),), new)
            continue
        for programs in (128, 256, 512, 1024):
            parts = torch.zeros(programs, 2, old["WIDTH"], device=old["part_ptr"].device)
            each = _blocks(_blocks(old["rows"], programs), rows) * rows
            yield Launch(ships.kernel, (programs,), new | {"part_ptr": parts, "rows_per_program": each})


def tile_of(launch: Launch) -> str:
    """What is chosen, in short."""
    chosen = [name for name in launch.arguments if name.startswith(("BLOCK_", "num_")) and name != "BLOCK_D"]
    chosen += [name for name in ("rows_per_program",) if name in launch.arguments]
    return " ".join(f"{name.removeprefix('BLOCK_')}={launch.arguments[name]}" for name in chosen)


def microseconds(launch: Launch, smoke: bool) -> float:
    """Median with the L2 cache emptied before each call."""
    if smoke:
        start = time.perf_counter()
        launch()
        return 1e6 * (time.perf_counter() - start)
    from triton.testing import do_bench

    return 1e3 * do_bench(launch, warmup=10, rep=60, return_mode="median")


def compile_share(share: str, jobs: list[tuple[str, str, Launch]]) -> None:
    """SHARD/SHARDS of all choices, into Triton's cache."""
    shard, shards = map(int, share.split("/"))
    every = [choice for _, name, ships in jobs for choice in choices(name, ships)][shard::shards]
    for choice in every:
        try:
            choice.kernel.warmup(grid=(1,), **choice.arguments)
        except Exception as problem:  # a tile that does not fit is no news: timing notes it
            print(tile_of(choice), first_line(problem))
    print(f"shard {shard}: {len(every)} choices")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="kernels and shapes that have this in them")
    parser.add_argument("--budget", type=float, default=600, help="seconds after which no other choice is timed")
    parser.add_argument("--compile", metavar="SHARD/SHARDS", help="compile a share, time nothing")
    parser.add_argument("--table", type=Path, metavar="FILE.json", help="where to write all that was timed")
    parser.add_argument("--smoke", action="store_true", help="in Triton's interpreter, on a CPU")
    options = parser.parse_args()
    if options.smoke:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported, with the kernels
    elif not torch.cuda.is_available():
        sys.exit("no GPU: --smoke runs this in Triton's interpreter")
    device, end = torch.device("cpu" if options.smoke else "cuda"), time.monotonic() + options.budget
    jobs = [job for job in recorded(device, options.smoke) if options.only in f"{job[0]} {job[1]}"]
    if options.compile:
        compile_share(options.compile, jobs)
        return
    table = []
    for shape, name, ships in jobs:
        timed: list[tuple[float, str]] = []
        failed: dict[str, str] = {}
        for number, choice in enumerate(choices(name, ships)):
            if (timed and time.monotonic() > end) or (options.smoke and number > 1):
                break
            try:
                timed.append((microseconds(choice, options.smoke), tile_of(choice)))
            except Exception as problem:
                if number == 0 or "CUDA error" in str(problem):
                    raise  # what ships must run; after an error of the device nothing means anything
                failed[tile_of(choice)] = first_line(problem)
        row = {"shape": shape, "kernel": name, "ships": timed[0], "best": sorted(timed)[:3], "failed": failed}
        table.append(row | {"tried": len(timed)})
        (now, tile), (best, other) = timed[0], min(timed)
        print(
            f"{shape:36} {name:22} ships {now:8.1f} us ({tile}), best {best:8.1f} us ({other}), of {len(timed)}",
            flush=True,
        )
        if options.table:
            options.table.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
