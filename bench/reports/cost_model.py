"""What the compiled kernels should take on chips that are not here. PREDICTIONS from counts, nothing is measured.

    python -m bench.reports.cost_model

A kernel's time is the largest of four: issue slots (instructions of the compiled inner loops, times their rounds),
the special-function unit (exponentials), the matrix unit (whole tiles, padding included) and memory (each tensor
read or written once). Prologues, launches and caches are left out, so it is a floor; it ranks designs, it times none.
The dense-mask row is the same floor for scaled_dot_product_attention with tiles of 64 x 64 and a mask in the query's
dtype: matrix, exponentials and memory alone, since its instructions are not known here. That flatters it.
"""

from dataclasses import dataclass

import torch
from uniad_fast.kernels.gpu.tiles import TileConfig, attention_tile, whole_sequence_gradient_tile, whole_sequence_tile

from bench.tools.cases import ATTENTION, AttentionCase
from bench.tools.compiled import CHIPS, Build, Chip, compile_for
from uniad_fast.ops.geometry import Window, hidden_keys


@dataclass(frozen=True)
class Machine:
    """Published figures: multiprocessors, clock in Hz, memory in bytes/s, dense 16-bit matrix rate in FLOP/s.

    issue: warp instructions a multiprocessor starts in a clock. special: exponentials it does in a clock.
    """

    name: str
    chip: str
    multiprocessors: int
    clock: float
    memory: float
    matrix: float
    issue: float = 4
    special: float = 16


MACHINES = [
    Machine("A100", "sm_80", 108, 1.41e9, 2.04e12, 312e12),
    Machine("H100", "sm_90", 132, 1.76e9, 3.35e12, 989e12),
    Machine("B200", "sm_100", 148, 1.85e9, 8.0e12, 2250e12),
    Machine("MI300X", "gfx942", 304, 2.1e9, 5.3e12, 1307e12, issue=1, special=16),
]
# Matrix products of a kernel, and the [B, H, N, D] tensors it reads and writes.
DOTS = {
    "forward_kernel": 2, "whole_sequence_kernel": 2,
    "query_gradient_kernel": 3, "key_value_gradient_kernel": 4, "whole_sequence_gradient_kernel": 5,
}  # fmt: skip
TENSORS = {
    "forward_kernel": 4, "whole_sequence_kernel": 4,
    "query_gradient_kernel": 6, "key_value_gradient_kernel": 6, "whole_sequence_gradient_kernel": 8,
}  # fmt: skip
# Kernels that walk over blocks of queries for each block of keys.
BY_KEY = ("key_value_gradient_kernel", "whole_sequence_gradient_kernel")


@dataclass(frozen=True)
class Prediction:
    """Seconds by limit; `time` is the largest and `limit` its name. waste: FLOPs done over the least possible."""

    limits: dict[str, float]
    waste: float

    @property
    def time(self) -> float:
        return max(self.limits.values())

    @property
    def limit(self) -> str:
        return max(self.limits, key=self.limits.__getitem__)


def rounds(case: AttentionCase, tile: TileConfig, transposed: bool) -> tuple[int, int]:
    """(visible, masked) rounds of the inner loops over all programs of one head, as `near_blocks` splits them."""
    (height, width), radius = case.feature_size, case.neighbor_size[0] // 2
    own, other = (tile.block_n, tile.block_m) if transposed else (tile.block_m, tile.block_n)
    tokens, full = height * width, height * width // other
    visible = masked = 0
    for first in range(0, tokens, own):
        last = min(first + own, tokens) - 1
        near_first = max(first // width - radius, 0) * width
        near_last = min(last // width + radius + 1, height) * width
        near = max(0, min(-(-near_last // other), full) - min(near_first // other, full))
        visible += full - near
        masked += near + (tokens % other != 0)
    return visible, masked


def visible_pairs(case: AttentionCase) -> int:
    """Pairs of a query and a key that it sees, in one head."""
    hidden = hidden_keys(Window.of(case.feature_size, case.neighbor_size), torch.device("cpu"))
    return int((~hidden).sum())


def predict(case: AttentionCase, machine: Machine, kernel: str, dropout: bool, tile: TileConfig) -> Prediction:
    """The floor of one bf16 kernel."""
    chip: Chip = next(chip for chip in CHIPS if chip.name == machine.chip)
    radius = (case.neighbor_size[0] // 2, case.neighbor_size[1] // 2)
    build = Build("attention", kernel, "bf16", case.head_dim, dropout, tile, case.feature_size, radius)
    loops = [loop for loop in compile_for(build, chip).loops if "matrix" in loop]
    visible_loop, masked_loop = loops[0], loops[-1]
    heads = case.batch * case.heads
    visible, masked = rounds(case, tile, transposed=kernel in BY_KEY)
    if kernel == "whole_sequence_kernel":
        visible, masked = 0, -(-case.tokens // tile.block_m)
    slots = heads * tile.num_warps * (visible * sum(visible_loop.values()) + masked * sum(masked_loop.values()))
    pairs = heads * (visible + masked) * tile.block_m * tile.block_n
    # 64 keys are too few rows for eight warps: both halves compute the gradients of keys and values.
    repeated = 2 if kernel == "whole_sequence_gradient_kernel" and tile.num_warps == 8 else 0
    speed = machine.multiprocessors * machine.clock
    return Prediction(
        {
            "issue": slots / (machine.issue * speed),
            "special": pairs / (machine.special * speed),
            "matrix": 2 * (DOTS[kernel] + repeated) * pairs * case.head_dim / machine.matrix,
            "memory": TENSORS[kernel] * 2 * heads * case.tokens * case.head_dim / machine.memory,
        },
        waste=pairs / (heads * visible_pairs(case)),
    )


def dense_mask(case: AttentionCase, machine: Machine, backward: bool) -> Prediction:
    """The floor of a pass with a dense mask in 16 bits, tiles of 64 x 64; backward in one kernel, as far as that goes.

    Forward: two products; q, k, v and the output. Backward: five products; those four, their four gradients.
    """
    heads = case.batch * case.heads
    pairs = heads * (-(-case.tokens // 64) * 64) ** 2
    products, tensors = (5, 8) if backward else (2, 4)
    return Prediction(
        {
            "special": pairs / (machine.special * machine.multiprocessors * machine.clock),
            "matrix": 2 * products * pairs * case.head_dim / machine.matrix,
            "memory": (tensors * 2 * heads * case.tokens * case.head_dim + 2 * case.tokens**2) / machine.memory,
        },
        waste=pairs / (heads * visible_pairs(case)),
    )


def shipped(case: AttentionCase, machine: Machine) -> dict[str, TileConfig]:
    """The tile of each kernel that serves the case on that machine."""
    chosen = {
        kernel: attention_tile(kernel, 2, case.head_dim, machine.chip)
        for kernel in ("forward_kernel", "query_gradient_kernel", "key_value_gradient_kernel")
    }
    if whole := whole_sequence_tile(case.tokens, 2, case.head_dim, True, machine.chip):
        del chosen["forward_kernel"]
        chosen = {"whole_sequence_kernel": whole} | chosen
    if whole := whole_sequence_gradient_tile(case.tokens, 2, case.head_dim, machine.chip):
        # The two that it replaces stay in the table, to be compared with.
        chosen["whole_sequence_gradient_kernel"] = whole
    return chosen


def row(name: str, prediction: Prediction) -> str:
    """One line: each limit in microseconds, the largest named, and the waste."""
    limits = "  ".join(f"{limit} {1e6 * seconds:6.1f}" for limit, seconds in prediction.limits.items())
    return f"  {name:34} {limits:62} limit {prediction.limit:8} flops {prediction.waste:.2f} x least"


def main() -> None:
    print("predicted floors in microseconds, bf16; nothing here is measured")
    for case in ATTENTION:
        for machine in MACHINES:
            print(f"{case.name} on {machine.name}")
            for kernel, tile in shipped(case, machine).items():
                for dropout in (False, True):
                    name = kernel.removesuffix("_kernel") + (", dropout" if dropout else "")
                    print(row(name, predict(case, machine, kernel, dropout, tile)), flush=True)
            for backward in (False, True):
                name = f"dense mask, {'backward' if backward else 'forward'}, without issue"
                print(row(name, dense_mask(case, machine, backward)))
    print("\nchoices for the forward pass at 14 x 14: tile/warps, microseconds without / with dropout")
    sizes = ((64, 64, 4, 2), (64, 32, 4, 2), (32, 64, 4, 2), (128, 64, 8, 2), (256, 64, 8, 1))
    choices = [("forward_kernel", TileConfig(*size)) for size in sizes]
    choices += [("whole_sequence_kernel", TileConfig(m, 256, warps, 1, whole=True)) for m, warps in ((64, 4), (64, 8))]
    for machine in MACHINES:
        cells = []
        for kernel, tile in choices:
            times = [predict(ATTENTION[0], machine, kernel, dropout, tile).time * 1e6 for dropout in (False, True)]
            name = f"{'whole ' if tile.whole else ''}{tile.block_m}x{tile.block_n}/{tile.num_warps}"
            cells.append(f"{name} {times[0]:.1f} / {times[1]:.1f}")
        print(f"{machine.name:7} " + "  ".join(cells), flush=True)


if __name__ == "__main__":
    main()
