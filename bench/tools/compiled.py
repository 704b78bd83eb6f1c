"""Compile the Triton kernels for chips that are not here, and read what came out: registers, spills, instructions."""

import re
import subprocess
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
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
    Chip("sm_90", GPUTarget("cuda", 90, 32), 227 * 1024, shared_per_multiprocessor=228 * 1024),
    Chip("sm_100", GPUTarget("cuda", 100, 32), 227 * 1024, shared_per_multiprocessor=228 * 1024),
    Chip("gfx942", GPUTarget("hip", "gfx942", 64), 64 * 1024, 512 * 4 * 64, 32, 64 * 1024),
]
DTYPES = {"fp32": 4, "bf16": 2, "fp16": 2}
ATTENTION_KERNELS = ("forward_kernel", "query_gradient_kernel", "key_value_gradient_kernel")
ATTENTION_MODULES = {
    "whole_sequence_kernel": whole_sequence_attention,
    "whole_sequence_gradient_kernel": whole_sequence_gradient,
}
JITTER_KERNELS = {"forward_kernel": "forward", "weight_gradient_kernel": "weight", "token_gradient_kernel": "tokens"}


@dataclass(frozen=True)
class Build:
    """One kernel to compile: `op` "attention", "jitter" or "dropout", its kernel, dtype, head_dim or channels, tile.

    aligned: tensors and strides are multiples of 16 bytes and elements, as in practice; a runtime finds out by looking.
    """

    op: str
    kernel: str
    dtype: str
    width: int
    dropout: bool
    tile: TileConfig
    feature_size: tuple[int, int] = (14, 14)
    radius: tuple[int, int] = (3, 3)
    aligned: bool = True


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
    chip: Chip, dtypes: tuple[str, ...], head_dims: tuple[int, ...], dropout: tuple[bool, ...]
) -> list[Build]:
    """Every attention kernel shipped for the chip, for these dtypes and head widths."""
    amd = chip.target.backend == "hip"
    builds = []
    for dtype, head_dim in product(dtypes, head_dims):
        chosen = {kernel: tiles.attention_tile(kernel, DTYPES[dtype], head_dim, amd) for kernel in ATTENTION_KERNELS}
        if whole := tiles.whole_sequence_tile(196, DTYPES[dtype], head_dim, blackwell=chip.name == "sm_100"):
            chosen["whole_sequence_kernel"] = whole
        warpgroups = chip.name in ("sm_90", "sm_100")
        if whole := tiles.whole_sequence_gradient_tile(196, DTYPES[dtype], head_dim, warpgroups):
            chosen["whole_sequence_gradient_kernel"] = whole
        builds += [
            Build("attention", kernel, dtype, head_dim, drop, tile)
            for kernel, tile in chosen.items()
            for drop in dropout
        ]
    return builds


def jitter_builds(dtypes: tuple[str, ...], channels: tuple[int, ...]) -> list[Build]:
    """Every shipped jitter kernel for these dtypes and channels in, to 256 channels out."""
    return [
        Build("jitter", kernel, dtype, width, True, tiles.JITTER[name, DTYPES[dtype]])
        for kernel, name in JITTER_KERNELS.items()
        for dtype in dtypes
        for width in channels
    ]


def dropout_builds(dtypes: tuple[str, ...], widths: tuple[int, ...]) -> list[Build]:
    """Every kernel of the passes between products, with dropout, for rows of these widths."""
    kernels = ("norm_forward_kernel", "norm_backward_kernel", "dropout_forward_kernel", "dropout_backward_kernel")
    tile = {w: (launch_dropout.rows_of_a_tile(w), 0, launch_dropout.warps_of_a_tile(w), 3) for w in widths}
    return [
        Build("dropout", kernel, dtype, width, True, TileConfig(*tile[width]))
        for kernel in kernels
        for dtype in dtypes
        for width in widths
    ]


def compile_for(build: Build, chip: Chip) -> Result:
    """Compile, disassemble, count."""
    function, constants = _function_and_constants(build, chip)
    names = [parameter.name for parameter in function.params]
    signature = {name: "constexpr" if name in constants else _type(name, build.dtype) for name in names}
    hinted = [i for i, n in enumerate(names) if build.aligned and (n.endswith("_ptr") or "_stride_" in n)]
    divisible = {(i,): [["tt.divisibility", 16]] for i in hinted}
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
    read = _read_amd if chip.target.backend == "hip" else _read_nvidia
    registers, spills, instructions = read(compiled)
    shared = compiled.metadata.shared
    return Result(
        registers=registers,
        spills=spills,
        local_accesses=sum(i.startswith(("LDL", "STL", "scratch_")) for _, i in instructions),
        shared=shared,
        blocks_per_multiprocessor=_occupancy(chip, registers, shared, build.tile.num_warps),
        matrix=dict(Counter(m for _, i in instructions if (m := _matrix_kind(i)))),
        loops=[dict(Counter(map(_kind, loop))) for loop in _innermost_loops(instructions)],
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
        } | ({} if tile.whole else {"SKIP": False})  # fmt: skip
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


def _type(name: str, dtype: str) -> str:
    if name == "seed_ptr":
        return "*i64"
    if name in ("delta_ptr", "deviation_ptr", "part_ptr", "bias_part_ptr", "stats_ptr"):
        return "*fp32"
    if name.endswith("_ptr"):
        return f"*{dtype}"
    return "fp32" if name in ("scale", "scale_log2", "keep_scale", "scale_by_channels", "eps") else "i32"


def _read_nvidia(compiled: Any) -> tuple[int, int, list[tuple[int, str]]]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run(
            [_tool("cuobjdump"), "--dump-resource-usage", str(cubin)], capture_output=True, text=True, check=True
        ).stdout
        sass = subprocess.run([_tool("nvdisasm"), "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return int(found[1]), int(found[2]), _sass_instructions(sass)


def _sass_instructions(sass: str) -> list[tuple[int, str]]:
    """(address, text) of each instruction; a branch's label is replaced by the address it stands for."""
    labels: dict[str, int] = {}
    pending: list[str] = []
    lines: list[tuple[int, str]] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            pending.append(label[1])
        elif found := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(.*?);", line):
            address = int(found[1], 16)
            labels |= dict.fromkeys(pending, address)
            pending.clear()
            lines.append((address, found[2].strip()))
    return [
        (address, re.sub(r"`\((\.L_x_\d+)\)", lambda m: hex(labels.get(m[1], 1 << 40)), text))
        for address, text in lines
    ]


def _read_amd(compiled: Any) -> tuple[int, int, list[tuple[int, str]]]:
    text = compiled.asm["amdgcn"]
    number = {
        name: int(value) for name, value in re.findall(r"\.(\w+_count|private_segment_fixed_size):\s+(\d+)", text)
    }
    labels: dict[str, int] = {}
    lines: list[tuple[int, str]] = []
    for line in text.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = len(lines)
        elif found := re.match(r"\t([a-z]\w+.*?)(?:\s*;.*)?$", line):
            lines.append((len(lines), found[1]))
    branches = [(a, re.sub(r"\.LBB\w+", lambda m: hex(labels.get(m[0], 1 << 40)), i)) for a, i in lines]
    return number["vgpr_count"], 4 * number["vgpr_spill_count"] + number["private_segment_fixed_size"], branches


def _innermost_loops(instructions: list[tuple[int, str]]) -> list[list[str]]:
    """Stretches that a backward branch repeats and that hold no other such stretch, in code order."""
    loops = set()
    for address, text in instructions:
        if text.startswith(("BRA", "s_cbranch", "s_branch")) and (target := re.search(r"0x([0-9a-f]+)", text)):
            begin = int(target[1], 16)
            if begin < address:  # a kernel ends in a branch to itself
                loops.add((begin, address))
    inner = sorted(a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops))
    return [[text for address, text in instructions if begin <= address <= end] for begin, end in inner]


def _matrix_kind(instruction: str) -> str | None:
    kinds = {"HMMA": "mma.sync", "HGMMA": "wgmma", "UTCHMMA": "tcgen05", "v_mfma": "mfma"}
    return next((name for start, name in kinds.items() if instruction.startswith(start)), None)


def _kind(instruction: str) -> str:
    """The unit that an instruction occupies."""
    if _matrix_kind(instruction):
        return "matrix"
    name = instruction.split()[0].split(".")[0]
    if name.startswith(("MUFU", "v_exp", "v_log", "v_rcp", "v_sqrt", "v_rsq")):
        return "special"
    if name.startswith(("LDG", "STG", "LDGSTS", "UTMA", "global_", "buffer_")):
        return "global"
    if name.startswith(("LDS", "STS", "LDSM", "LDT", "STT", "ds_", "STSM", "MOVM", "SHFL")):
        return "shared"
    return "other"


def _occupancy(chip: Chip, registers: int, shared: int, warps: int) -> int:
    """Blocks that fit a multiprocessor, by registers, shared memory and warps."""
    lanes = chip.target.warp_size
    by_registers = chip.registers // max(1, -(-registers // 8) * 8 * lanes * warps)
    return max(0, min(by_registers, chip.max_warps // warps, chip.shared_per_multiprocessor // max(shared, 1)))


@cache
def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends/nvidia/bin" / name)
