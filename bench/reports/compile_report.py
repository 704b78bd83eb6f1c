"""Compiles every shipped kernel for every chip and prints what came out. Needs no GPU; nothing here is measured.

python -m bench.reports.compile_report [--chip sm_90 ...] [--dtype bf16 ...] [--quick]
"""

import argparse

from bench.tools.compiled import (
    CHIPS,
    Build,
    Chip,
    Result,
    attention_builds,
    compile_for,
    dropout_builds,
    jitter_builds,
)

HEADER = (
    f"{'kernel':34} {'dtype':5} {'width':>5} {'drop':4} {'tile':>11} {'warps':>5} {'chip':7} {'regs':>4} {'spill':>5} "
    f"{'shared':>7} {'blocks':>6} {'matrix instructions':22} {'largest inner loop, by kind':58} {'s':>5}"
)


def row(build: Build, chip: Chip, result: Result) -> str:
    """One line of the table."""
    tile = build.tile
    sizes = [tile.block_m, tile.block_n, *([tile.block_k] if tile.block_k else [])]
    matrix = " ".join(f"{name} {count}" for name, count in result.matrix.items()) or "none"
    largest = max(result.loops, key=lambda kinds: sum(kinds.values()), default={})
    loop = " ".join(f"{kind} {count}" for kind, count in sorted(largest.items())) or "none"
    return (
        f"{build.op + ' ' + build.kernel.removesuffix('_kernel'):34} {build.dtype:5} {build.width:5} "
        f"{'yes' if build.dropout else 'no':4} {'x'.join(map(str, sizes)):>11} {tile.num_warps:5} {chip.name:7} "
        f"{result.registers:4} {result.spills:5} {result.shared:7} {result.blocks_per_multiprocessor:6} {matrix:22} "
        f"{loop:58} {result.seconds:5.1f}"
    )


def problems(build: Build, chip: Chip, result: Result) -> list[str]:
    """What makes a shipped kernel unfit."""
    found = []
    if result.spills or result.local_accesses:
        found.append(f"{result.spills} bytes spilled, {result.local_accesses} local loads and stores")
    if result.shared > chip.shared_limit:
        found.append(f"{result.shared} bytes of shared memory, the chip has {chip.shared_limit}")
    if build.op != "dropout" and build.dtype != "fp32" and not result.matrix:
        found.append("no matrix instruction")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", action="append", choices=[chip.name for chip in CHIPS], help="only these")
    parser.add_argument("--dtype", action="append", choices=["fp32", "bf16", "fp16"], help="only these")
    parser.add_argument("--quick", action="store_true", help="the paper's head width and channels only")
    options = parser.parse_args()
    dtypes, widths = tuple(options.dtype or ("fp32", "bf16", "fp16")), (32,) if options.quick else (16, 32, 64, 128)
    print(HEADER)
    unfit = []
    for chip in CHIPS:
        if options.chip and chip.name not in options.chip:
            continue
        builds = attention_builds(chip, dtypes, widths, (False, True))
        builds += jitter_builds(dtypes, (272,) if options.quick else (192, 272))
        builds += dropout_builds(dtypes, (256,) if options.quick else (96, 256, 1024, 4096))
        for build in builds:
            result = compile_for(build, chip)
            print(row(build, chip, result), flush=True)
            unfit += [f"{row(build, chip, result)[:80]}: {p}" for p in problems(build, chip, result)]
    print("\n".join(["", *unfit]) if unfit else "\nall fit: no spill, shared memory within limits, matrix instructions")


if __name__ == "__main__":
    main()
