"""Where the time of a UniAD training step on a CPU goes, by kind of work, from torch's profiler.

python -m bench.reports.profile_step [--threads N] [--dtype bfloat16|float32] [--case NAME] [--impl IMPL]
"""

import argparse
import statistics
import time
from collections import defaultdict
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

from bench.bench_model import build, feature
from bench.tools.cases import MODEL
from uniad_fast.models.precision import computes_in_bfloat16

# First match wins, by the start of an operator's name. ReLU + dropout is in an FFN's products where those are ours.
KINDS = {
    "linear products": ("aten::mm", "aten::addmm", "aten::bmm", "_Linear", "_FeedForward", "mkldnn::_linear"),
    "attention, forward": ("_Attention", "aten::_scaled_dot", "aten::scaled_dot"),
    "dropout + add + norm": ("_Norm", "aten::native_layer_norm"),
    "ReLU + dropout": ("_Dropout", "aten::bernoulli_", "aten::native_dropout"),
    "jitter and project": ("_Jitter",),
    "optimiser and clipping": (
        "Optimizer.step", "aten::_fused_adam", "aten::_foreach", "aten::linalg_vector_norm", "aten::mul_",
    ),
    "sums (gradients of biases, positions, queries)": ("aten::sum",),
    "additions (positions, gradients that meet)": ("aten::add",),
    "casts, copies, joins": ("aten::copy_", "aten::cat", "aten::_to_copy", "aten::contiguous"),
    "loss and map": ("aten::mse_loss", "aten::upsample", "aten::sub"),
}  # fmt: skip


def kind_of(name: str) -> str:
    if name.startswith("_AttentionBackward") or (name.startswith("aten::_scaled_dot") and "backward" in name):
        return "attention, backward"
    return next((kind for kind, starts in KINDS.items() if name.startswith(starts)), "everything else")


def _usual_dtype() -> str:
    return "bfloat16" if computes_in_bfloat16("auto", torch.device("cpu")) else "float32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default=_usual_dtype())
    parser.add_argument("--case", choices=[case.name for case in MODEL], default=MODEL[0].name)
    parser.add_argument("--impl", default="cpu")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="batch 1: only to see that it runs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    case = next(case for case in MODEL if case.name == options.case)
    if options.smoke:
        case = replace(case, batch=1)
    model, x = build(case, options.impl, torch.device("cpu")).train(), feature(case, torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> float:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=options.dtype == "bfloat16"):
            reconstruction = model({"feature_align": x})["feature_rec"]
        optimizer.zero_grad(set_to_none=True)
        F.mse_loss(reconstruction.float(), x).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        return time.perf_counter() - start

    for _ in range(2):
        step()
    unprofiled = statistics.median(step() for _ in range(options.steps))
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(options.steps):
            step()
    totals: dict[str, float] = defaultdict(float)
    for event in profiled.key_averages():
        totals[kind_of(event.key)] += event.self_cpu_time_total / options.steps / 1e3
    whole = sum(totals.values())
    print(
        f"{case.name}, {options.dtype}, impl={options.impl}, {options.threads} threads, torch {torch.__version__}: "
        f"{unprofiled * 1e3:.0f} ms a step, {whole:.0f} ms under the profiler"
    )
    for kind, milliseconds in sorted(totals.items(), key=lambda item: -item[1]):
        print(f"  {kind:48} {milliseconds:8.1f} ms  {100 * milliseconds / whole:5.1f}%")


if __name__ == "__main__":
    main()
