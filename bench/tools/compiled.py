"""Compile the Triton kernels for chips that are not here, and read what came out: registers, spills, instructions."""

import time
from collections import Counter
from dataclasses import dataclass
from itertools import product
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from uniad_fast.kernels.gpu import (
    dropout,
    jitter_project,
    launch_dropout,
    neighbor_masked_attention,
    tiles,
    whole_sequence_attention,
    whole_sequence_gradient,
)
from uniad_fast.kernels.gpu.tiles import TileConfig

from bench.tools.disassembly import innermost_loops, kind, matrix_kind, read_amd, read_nvidia


@dataclass(frozen=True)
class Chip:
    """A target: shared memory a block may have, and registers and warps a multiprocessor has."""

    name: str
    target: GPUTarget
    shared_limit: int
    registers: int = 65536
    max_warps: int = 64
    shared_per_multiprocessor: int = 0


CHIPS = [
    Chip("sm_80", GPUTarget("cuda", 80, 32), 163 * 1024, shared_per_multiprocessor=164 * 1024),
    Chip("sm_86", GPUTarget("cuda", 86, 32), 99 * 1024, max_warps=48, shared_per_multiprocessor=100 * 1024),
    Chip("sm_89", GPUTarget("cuda", 89, 32), 99 * 1024, max_warps=48, shared_per_multiprocessor=100 * 1024),
    Chip("sm_90", GPUTarget("cuda", 90, 32), 227 * 1024, shared_per_multiprocessor=228 * 1024),
    Chip("sm_100", GPUTarget("cuda", 100, 32), 227 * 1024, shared_per_multiprocessor=228 * 1024),
    Chip("sm_120", GPUTarget("cuda", 120, 32), 99 * 1024, max_warps=48, shared_per_multiprocessor=100 * 1024),
    Chip("gfx942", GPUTarget("hip", "gfx942", 64), 64 * 1024, 512 * 4 * 64, 32, 64 * 1024),
]
DTYPES = {"fp32": 4, "bf16": 2, "fp16": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "skip": {"skip": True, "feature_size": (28, 28), "radius": (7, 7)},
    "no window": {"radius": (-1, -1)},
    "unaligned": {"aligned": False},
    "whole blocks": {"feature_size": (16, 16)},
    "64-bit strides": {"long_strides": True},
    "one head": {"one_head": True},
}
"""What a launch may ask for besides the paper's case, by name: fields of a `Build`."""
OF_ATTENTION = tuple(name for name in VARIANTS if name not in ("plain", "unaligned"))
"""Variants that the other ops' kernels do not have."""
ATTENTION_KERNELS = ("forward_kernel", "query_gradient_kernel", "key_value_gradient_kernel")
# Tensors that a launcher takes as they are, by the start of their arguments' names; the others are its own.
_GIVEN = (
    "query_ptr", "query_stride", "key_ptr", "key_stride", "value_ptr", "value_stride", "out_gradient",
    "token_ptr", "weight_ptr", "bias_ptr", "x_ptr", "residual_ptr",
)  # fmt: skip
ATTENTION_MODULES = {
    "whole_sequence_kernel": whole_sequence_attention,
    "whole_sequence_gradient_kernel": whole_sequence_gradient,
}
JITTER_KERNELS = {"forward_kernel": "forward", "weight_gradient_kernel": "weight", "token_gradient_kernel": "tokens"}


@dataclass(frozen=True)
class Build:
    """One kernel to compile: `op` "attention", "jitter" or "dropout", its kernel, dtype, head_dim or channels, tile.

    skip: with the test that leaves out wholly hidden blocks. aligned: what the caller gives begins on 16 bytes, and so
    does each of its rows. long_strides: strides do not fit 32 bits. one_head: the launch's `heads` is 1, which the
    runtime compiles in.
    """

    op: str
    kernel: str
    dtype: str
    width: int
    dropout: bool
    tile: TileConfig
    feature_size: tuple[int, int] = (14, 14)
    radius: tuple[int, int] = (3, 3)
    skip: bool = False
    aligned: bool = True
    long_strides: bool = False
    one_head: bool = False


@dataclass(frozen=True)
class Result:
    """What the compiler made of it. spills: bytes of stack; loops: inner loops in code order, instructions by kind."""

    registers: int
    spills: int
    local_accesses: int
    shared: int
    blocks_per_multiprocessor: int
    matrix: dict[str, int]
    loops: list[dict[str, int]]
    seconds: float


def attention_builds(
    chip: Chip, dtypes: tuple[str, ...], head_dims: tuple[int, ...], dropout: tuple[bool, ...], variant: str = "plain"
) -> list[Build]:
    """Every attention kernel that a launch may choose on the chip, for these dtypes and head widths."""
    fields = VARIANTS[variant]
    height, width = fields.get("feature_size", Build.feature_size)
    builds = []
    for dtype, head_dim in product(dtypes, head_dims):
        size = DTYPES[dtype]
        chosen = {kernel: tiles.attention_tile(kernel, size, head_dim, chip.name) for kernel in ATTENTION_KERNELS}
        windowed = min(fields.get("radius", Build.radius)) >= 0
        if whole := tiles.whole_sequence_tile(height * width, size, head_dim, windowed, chip.name):
            chosen["whole_sequence_kernel"] = whole
        # Launches have it for aligned tensors with strides of 32 bits alone.
        simple = fields.get("aligned", True) and not fields.get("long_strides", False)
        if simple and (whole := tiles.whole_sequence_gradient_tile(height * width, size, head_dim, chip.name)):
            chosen["whole_sequence_gradient_kernel"] = whole
        builds += [
            Build("attention", kernel, dtype, head_dim, drop, tile, **fields)
            for kernel, tile in chosen.items()
            for drop in dropout
        ]
    return builds


def jitter_builds(dtypes: tuple[str, ...], channels: tuple[int, ...], variant: str = "plain") -> list[Build]:
    """Every shipped jitter kernel for these dtypes and channels in, to 256 channels out."""
    return [
        Build("jitter", kernel, dtype, width, True, tiles.JITTER[name, DTYPES[dtype]], **VARIANTS[variant])
        for kernel, name in JITTER_KERNELS.items()
        for dtype in dtypes
        for width in channels
    ]


def dropout_builds(dtypes: tuple[str, ...], widths: tuple[int, ...], variant: str = "plain") -> list[Build]:
    """Every kernel of the passes between products, with dropout, for rows of these widths."""
    kernels = ("norm_forward_kernel", "norm_backward_kernel", "dropout_forward_kernel", "dropout_backward_kernel")
    tile = {w: (launch_dropout.rows_of_a_tile(w), 0, launch_dropout.warps_of_a_tile(w), 3) for w in widths}
    return [
        Build("dropout", kernel, dtype, width, True, TileConfig(*tile[width]), **VARIANTS[variant])
        for kernel in kernels
        for dtype in dtypes
        for width in widths
    ]


def compile_for(build: Build, chip: Chip) -> Result:
    """Compile, disassemble, count."""
    function, constants = _function_and_constants(build, chip)
    names = [parameter.name for parameter in function.params]
    if build.one_head and "heads" in names:  # the runtime compiles in an integer that is 1
        constants["heads"] = 1
    signature = {name: "constexpr" if name in constants else _type(name, build) for name in names}
    divisible = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if _is_divisible(name, build)}
    indexed = {(names.index(name),): value for name, value in constants.items()}
    options = {"num_warps": build.tile.num_warps, "num_stages": build.tile.num_stages}
    start = time.perf_counter()
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):  # constants by name, hints in a class of their own
        from triton.backends.compiler import AttrsDescriptor

        hints = {"arg_properties": {"tt.divisibility": [i for (i,) in divisible], "tt.equal_to": []}}
        attributes = AttrsDescriptor.from_dict(hints | {"cls": "AttrsDescriptor"})
        source = ASTSource(function, {n: t for n, t in signature.items() if t != "constexpr"}, constants, attributes)
    else:
        source = ASTSource(function, signature, indexed, divisible)
    compiled = triton.compile(source, target=chip.target, options=options)
    seconds = time.perf_counter() - start
    read = read_amd if chip.target.backend == "hip" else read_nvidia
    registers, spills, instructions = read(compiled)
    shared = compiled.metadata.shared
    return Result(
        registers=registers,
        spills=spills,
        local_accesses=sum(i.startswith(("LDL", "STL", "scratch_")) for _, i in instructions),
        shared=shared,
        blocks_per_multiprocessor=_occupancy(chip, registers, shared, build.tile.num_warps),
        matrix=dict(Counter(m for _, i in instructions if (m := matrix_kind(i)))),
        loops=[dict(Counter(map(kind, loop))) for loop in innermost_loops(instructions)],
        seconds=seconds,
    )


def _function_and_constants(build: Build, chip: Chip) -> tuple[Any, dict[str, Any]]:
    tile = build.tile
    precision = "ieee" if chip.target.backend == "hip" else tile.precision
    if build.op == "attention":
        (height, width), (radius_row, radius_col) = build.feature_size, build.radius
        constants = {
            "HEIGHT": height, "WIDTH": width, "RADIUS_ROW": radius_row, "RADIUS_COL": radius_col,
            "HEAD_DIM": build.width, "BLOCK_D": max(16, triton.next_power_of_2(build.width)),
            "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "DROPOUT": build.dropout, "PART": False,
            "PRECISION": precision,
        } | ({} if tile.whole else {"SKIP": build.skip})  # fmt: skip
        return getattr(ATTENTION_MODULES.get(build.kernel, neighbor_masked_attention), build.kernel), constants
    if build.op == "dropout":
        columns = max(16, triton.next_power_of_2(build.width))
        constants = {
            "WIDTH": build.width, "BLOCK_R": tile.block_m, "BLOCK_C": columns,
            "DROPOUT": True, "RELU": False, "PART": False,
        }  # fmt: skip
        function = getattr(dropout, build.kernel)
        return function, {name: constants[name] for name in (p.name for p in function.params) if name in constants}
    constants = {
        "CHANNELS": build.width, "OUT": 256, "BLOCK_T": tile.block_m, "BLOCK_O": tile.block_n, "BLOCK_C": tile.block_k,
        "BIAS": True, "SOME": False, "PART": False, "PRECISION": precision,
    }  # fmt: skip
    function = getattr(jitter_project, build.kernel)
    return function, {name: constants[name] for name in (p.name for p in function.params) if name in constants}


def _is_divisible(name: str, build: Build) -> bool:
    """Whether the runtime, which looks, finds a multiple of 16: bytes of a tensor's address, elements of its stride.

    It does in practice, and always where the launcher made the tensor.
    """
    if not name.endswith("_ptr") and "_stride_" not in name:
        return False
    return build.aligned or not name.startswith(_GIVEN)


def _type(name: str, build: Build) -> str:
    dtype = build.dtype
    if name == "seed_ptr":
        return "*i64"
    if name in ("delta_ptr", "deviation_ptr", "part_ptr", "stats_ptr"):
        return "*fp32"
    if name.endswith("_ptr"):
        return f"*{dtype}"
    if "_stride_" in name and build.long_strides:
        return "i64"
    return "fp32" if name in ("scale", "scale_log2", "keep_scale", "scale_by_channels", "eps") else "i32"


def _occupancy(chip: Chip, registers: int, shared: int, warps: int) -> int:
    """Blocks that fit a multiprocessor, by registers, shared memory and warps."""
    lanes = chip.target.warp_size
    by_registers = chip.registers // max(1, -(-registers // 8) * 8 * lanes * warps)
    return max(0, min(by_registers, chip.max_warps // warps, chip.shared_per_multiprocessor // max(shared, 1)))
