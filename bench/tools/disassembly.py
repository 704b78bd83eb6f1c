"""What a compiled kernel is made of: registers, bytes spilled, and its instructions, disassembled and told apart."""

import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import triton

Instructions = list[tuple[int, str]]
"""(address, text) of each, a branch's target as an address."""


def read_nvidia(compiled: Any) -> tuple[int, int, Instructions]:
    """Registers, bytes of stack, instructions."""
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


def _sass_instructions(sass: str) -> Instructions:
    """(address, text) of each instruction; a branch's label is replaced by the address it stands for."""
    labels: dict[str, int] = {}
    pending: list[str] = []
    lines: Instructions = []
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


def read_amd(compiled: Any) -> tuple[int, int, Instructions]:
    """Registers, bytes of stack, instructions."""
    text = compiled.asm["amdgcn"]
    number = {
        name: int(value) for name, value in re.findall(r"\.(\w+_count|private_segment_fixed_size):\s+(\d+)", text)
    }
    labels: dict[str, int] = {}
    lines: Instructions = []
    for line in text.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = len(lines)
        elif found := re.match(r"\t([a-z]\w+.*?)(?:\s*;.*)?$", line):
            lines.append((len(lines), found[1]))
    branches = [(a, re.sub(r"\.LBB\w+", lambda m: hex(labels.get(m[0], 1 << 40)), i)) for a, i in lines]
    return number["vgpr_count"], 4 * number["vgpr_spill_count"] + number["private_segment_fixed_size"], branches


def innermost_loops(instructions: Instructions) -> list[list[str]]:
    """Stretches that a backward branch repeats and that hold no other such stretch, in code order."""
    loops = set()
    for address, text in instructions:
        if text.startswith(("BRA", "s_cbranch", "s_branch")) and (target := re.search(r"0x([0-9a-f]+)", text)):
            begin = int(target[1], 16)
            if begin < address:  # a kernel ends in a branch to itself
                loops.add((begin, address))
    inner = sorted(a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops))
    return [[text for address, text in instructions if begin <= address <= end] for begin, end in inner]


def matrix_kind(instruction: str) -> str | None:
    """The matrix instruction's family, None for others."""
    kinds = {"HMMA": "mma.sync", "HGMMA": "wgmma", "UTCHMMA": "tcgen05", "v_mfma": "mfma"}
    return next((name for start, name in kinds.items() if instruction.startswith(start)), None)


def kind(instruction: str) -> str:
    """The unit that an instruction occupies."""
    if matrix_kind(instruction):
        return "matrix"
    name = instruction.split()[0].split(".")[0]
    if name.startswith(("MUFU", "v_exp", "v_log", "v_rcp", "v_sqrt", "v_rsq")):
        return "special"
    if name.startswith(("LDG", "STG", "LDGSTS", "UTMA", "global_", "buffer_")):
        return "global"
    if name.startswith(("LDS", "STS", "LDSM", "LDT", "STT", "ds_", "STSM", "MOVM", "SHFL")):
        return "shared"
    return "other"


@cache
def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends/nvidia/bin" / name)
