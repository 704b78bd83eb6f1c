"""How many kernels a GPU would be told to run in one training step, counted on a CPU. Nothing is measured.

    python -m bench.reports.launches

A step is forward, backward, clipping and the optimizer's step, with dropout and jitter. The launchers are the real
ones, their Triton kernels stand-ins that count; of torch's operators those count that compute or fill: views and
allocations launch nothing, and an operator over lists of tensors launches as often as CUDA's has to split the lists.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import uniad_fast.kernels.gpu.launch as launch
import uniad_fast.kernels.gpu.launch_dropout as launch_dropout
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from uniad_fast.models import training_pass
from uniad_fast.models.architecture import Architecture
from uniad_fast.ops import dispatch, linear, packed_heads, tracing
from uniad_fast.training import optimization
from uniad_fast.training.build import build_model
from uniad_fast.training.recipes import PAPER
from uniad_fast.training.reconstruction_loss import ReconstructionLoss

GRID, CHANNELS = (6, 6), 24
SMALL = Architecture(hidden_dim=32, nhead=2, dim_feedforward=48)
"""The paper's layers, narrow: what is launched depends on their number."""

FREE = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "detach_", "diagonal", "empty", "empty_like",
    "empty_strided", "expand", "lift_fresh", "new_empty", "new_empty_strided", "permute", "resize_", "select", "slice",
    "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unfold", "unsqueeze", "view",
    "_record_function_enter_new", "_record_function_exit",
}  # fmt: skip
"""Operators that launch nothing: views, allocations, questions."""
# Those that launch more than one: zeros and a copy into them; a gradient of the input, and those of weight and bias.
_SEVERAL = {"slice_backward": 2, "select_backward": 2, "native_layer_norm_backward": 2}
_TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}  # that CUDA's kernels over so many lists take at once
_KINDS = {
    "product": ("mm", "addmm", "bmm", "baddbmm", "addmm_", "baddbmm_"),
    "cast": ("_to_copy",),
    "sum": ("sum", "mean"),
    "addition": ("add", "add_"),
    "copy": ("cat", "stack", "copy_", "clone", "slice_backward", "select_backward", "_foreach_copy_"),
    "fill": ("zeros", "zeros_like", "new_zeros", "full", "full_like", "fill_", "zero_", "ones_like"),
    "draw": ("randint", "random_"),
    "kernel": ("kernel",),
}
_KIND_OF = {name: kind for kind, names in _KINDS.items() for name in names}


class Launches(TorchDispatchMode):
    """Counts what is launched inside, by kind and by operator; all of a `phase` is of one kind, which it names."""

    def __init__(self) -> None:
        super().__init__()
        self.by_kind: Counter[str] = Counter()
        self.by_name: Counter[str] = Counter()
        self.phase: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        if name not in FREE:
            self.add(name, _launches(name, args))
        return func(*args, **(kwargs or {}))

    def add(self, name: str, count: int = 1) -> None:
        self.by_name[name] += count
        self.by_kind[self.phase or _KIND_OF.get(name, "other")] += count


def _launches(name: str, args: Sequence[Any]) -> int:
    if not name.startswith(("_foreach", "_fused")):
        return _SEVERAL.get(name, 1)
    lists = [a for a in args if isinstance(a, list | tuple) and a and isinstance(a[0], Tensor)]
    # The steps of a fused optimizer ride along, and a norm writes another list.
    depth = min(len(lists) - name.startswith("_fused"), 4) or 1
    return -(-len(lists[0]) // _TENSORS[depth])


class _Counted:
    """Stands for a Triton kernel: launched, it leaves memory as it is."""

    def __init__(self, launches: Launches) -> None:
        self._launches = launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda **_: self._launches.add("kernel")


@contextlib.contextmanager
def _stand_ins(launches: Launches) -> Iterator[None]:
    """Kernels that count, on tensors on a CPU that are taken for a GPU's."""
    with contextlib.ExitStack() as stack:
        for module in (launch.attention, launch.jitter, launch_dropout.kernels):
            for name in [n for n in vars(module) if n.endswith("_kernel")]:
                stack.enter_context(patch.object(module, name, _Counted(launches)))
        stack.enter_context(patch.object(launch, "whole_sequence_kernel", _Counted(launches)))
        stack.enter_context(patch.object(dispatch, "kernel_problem", lambda *_: None))
        # Counting is a mode of torch's, under which the ops would be operators.
        for module in (tracing, linear, training_pass, packed_heads):
            stack.enter_context(patch.object(module, "is_traced", lambda: False))
        yield


def count(precision: str) -> Launches:
    """Of one step, the second one: an optimizer's first makes its state."""
    recipe = replace(PAPER, precision=precision)
    model = build_model(CHANNELS, 16, GRID, recipe, "triton", SMALL)
    criterion = ReconstructionLoss(
        model, torch.zeros(CHANNELS), torch.ones(CHANNELS), optimization.loss(recipe), precision
    ).train()
    optimizers = optimization.optimizers(model, recipe)
    tokens = torch.randn(4, GRID[0] * GRID[1], CHANNELS)
    for _ in range(2):
        launches = Launches()
        with _stand_ins(launches), launches:
            model.zero_grad(set_to_none=True)
            criterion(tokens).backward()
            launches.phase = "clip"
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            launches.phase = "optimizer"
            for optimizer in optimizers:
                optimizer.step()
    return launches


def main() -> None:
    found = {precision: count(precision).by_kind for precision in ("float32", "bfloat16")}
    print(f"{'launches of a step':20}" + "".join(f"{precision:>10}" for precision in found))
    for kind in (*_KINDS, "clip", "optimizer", "other"):
        print(f"{kind:20}" + "".join(f"{kinds[kind]:10}" for kinds in found.values()))
    print(f"{'all':20}" + "".join(f"{kinds.total():10}" for kinds in found.values()))
    # The batch is copied, the graph replayed, its numbers copied; see `uniad_fast.training.captured_step`.
    print(f"{'with a CUDA graph':20}" + "".join(f"{3 + kinds['optimizer']:10}" for kinds in found.values()))


if __name__ == "__main__":
    main()
