"""Compiles every shipped kernel for every chip and prints what came out. Needs no GPU; nothing here is measured.

python -m bench.reports.compile_report [--chip sm_90 ...] [--dtype bf16 ...] [--head-dim 24 ...] [--variant skip ...]
                                       [--kernel forward ...] [--quick]

A variant is what a launch may ask for besides the paper's case: the test that skips wholly hidden blocks, no window,
tensors that do not begin on 16 bytes, a number of tokens that is a multiple of every block, strides beyond 32 bits, one
head. All but `plain` are compiled at the paper's widths. spill: bytes; local: loads and stores of local memory.
"""

import argparse

from bench.tools.compiled import (
    CHIPS,
    DTYPES,
    OF_ATTENTION,
    VARIANTS,
    Build,
    Chip,
    Result,
    attention_builds,
    compile_for,
    dropout_builds,
    jitter_builds,
)

HEADER = (
    f"{'kernel':34} {'variant':14} {'dtype':5} {'width':>5} {'drop':4} {'tile':>11} {'warps':>5} {'chip':7} "
    f"{'regs':>4} {'spill':>5} {'local':>5} "
    f"{'shared':>7} {'blocks':>6} {'matrix instructions':22} {'largest inner loop, by kind':58} {'s':>5}"
)


def row(build: Build, variant: str, chip: Chip, result: Result) -> str:
    """One line of the table."""
    tile = build.tile
    sizes = [tile.block_m, tile.block_n, *([tile.block_k] if tile.block_k else [])]
    matrix = " ".join(f"{name} {count}" for name, count in result.matrix.items()) or "none"
    largest = max(result.loops, key=lambda kinds: sum(kinds.values()), default={})
    loop = " ".join(f"{kind} {count}" for kind, count in sorted(largest.items())) or "none"
    name = f"{build.op} {build.kernel.removesuffix('_kernel')}"
    return (
        f"{name:34} {variant:14} {build.dtype:5} {build.width:5} {'yes' if build.dropout else 'no':4} "
        f"{'x'.join(map(str, sizes)):>11} {tile.num_warps:5} {chip.name:7} {result.registers:4} {result.spills:5} "
        f"{result.local_accesses:5} {result.shared:7} {result.blocks_per_multiprocessor:6} {matrix:22} {loop:58} "
        f"{result.seconds:5.1f}"
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


def builds(options: argparse.Namespace, chip: Chip) -> list[tuple[str, Build]]:
    """What the options ask for on a chip, each with its variant's name."""
    dtypes = tuple(options.dtype or DTYPES)
    found: list[tuple[str, Build]] = []
    for variant in options.variant or (["plain"] if options.quick else VARIANTS):
        papers = options.quick or variant != "plain"
        head_dims = tuple(options.head_dim or ((32,) if papers else (16, 24, 32, 64, 128)))
        some = attention_builds(chip, dtypes, head_dims, (False, True), variant)
        if variant not in OF_ATTENTION:
            some += jitter_builds(dtypes, (272,) if papers else (192, 272), variant)
            some += dropout_builds(dtypes, (256,) if papers else (96, 256, 1024, 4096), variant)
        found += [(variant, build) for build in some]
    return [one for one in found if not options.kernel or one[1].kernel.removesuffix("_kernel") in options.kernel]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", action="append", choices=[chip.name for chip in CHIPS], help="only these")
    parser.add_argument("--dtype", action="append", choices=list(DTYPES), help="only these")
    parser.add_argument("--head-dim", action="append", type=int, help="only these widths of attention's heads")
    parser.add_argument("--variant", action="append", choices=list(VARIANTS), help="only these")
    parser.add_argument("--kernel", action="append", help="only kernels of these names, as the table has them")
    parser.add_argument("--quick", action="store_true", help="the paper's head width and channels, plain, only")
    options = parser.parse_args()
    print(HEADER)
    unfit = []
    for chip in CHIPS:
        if options.chip and chip.name not in options.chip:
            continue
        for variant, build in builds(options, chip):
            result = compile_for(build, chip)
            print(row(build, variant, chip, result), flush=True)
            unfit += [f"{row(build, variant, chip, result)[:95]}: {p}" for p in problems(build, chip, result)]
    print("\n".join(["", *unfit]) if unfit else "\nall fit: no spill, shared memory within limits, matrix instructions")


if __name__ == "__main__":
    main()
