"""Each way of doing the same beside the others on a CPU, in turns within one run: what the README's table is made of.

python -m bench.reports.compare [--threads N] [--only TEXT] [--rounds N] [--smoke]

    public  what the public code does        torch  impl="torch"        cpu  impl="cpu"

Ways take turns, round by round, so that whatever else the machine does falls on all of them. With each group goes the
rate of a 2048 x 2048 x 2048 product in that dtype, taking turns with them; a training step's floor is the time of all
its products at that rate. bfloat16 is left out where the processor does not multiply it: torch takes 20 times as long.
"""

import argparse
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from bench.bench_model import build, feature
from bench.bench_neighbor_masked_attention import attention, inputs
from bench.tools.cases import ATTENTION, LARGE, MODEL, AttentionCase, ModelCase
from bench.tools.peak import extra_bytes
from bench.tools.timing import Work, interleaved
from uniad_fast.models.precision import computes_in_bfloat16

WAYS = ("public", "torch", "cpu")
CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32}
if computes_in_bfloat16("auto", CPU):
    DTYPES["bfloat16"] = torch.bfloat16
ROOT = Path(__file__).parents[2]


def square_product(dtype: torch.dtype) -> Work:
    left, right = torch.randn(2, 2048, 2048).to(dtype)
    return lambda: left @ right


def attention_works(case: AttentionCase, dtype: torch.dtype, dropout_p: float | None) -> dict[str, Work]:
    """dropout_p None: forward alone."""
    works: dict[str, Work] = {}
    for way in WAYS:
        run, tensors = attention(way, case, dropout_p or 0.0), inputs(case, CPU, dtype, grad=dropout_p is not None)
        weight = torch.randn_like(tensors[0])

        def work(run=run, tensors=tensors, weight=weight) -> object:
            if dropout_p is None:
                return run(*tensors)
            return torch.autograd.grad(run(*tensors), tensors, weight)

        works[way] = work
    return works


def model_works(case: ModelCase, training: bool) -> dict[str, Work]:
    works: dict[str, Work] = {}
    x = feature(case, CPU)
    for dtype in DTYPES.values():
        for way in WAYS:
            model = build(case, way, CPU).train(training)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=way != "public")

            def work(model=model, optimizer=optimizer, dtype=dtype) -> None:
                with torch.set_grad_enabled(training), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    reconstruction = model({"feature_align": x})["feature_rec"]
                if training:
                    loss = nn.functional.mse_loss(reconstruction.float(), x)
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                    optimizer.step()

            works[f"{way}, {str(dtype)[6:]}"] = work
    return works


def show(title: str, times: dict[str, float], flops: float = 0) -> None:
    """A line each, with how many times as fast as each baseline ours is."""
    print(title)
    products = {name: 2 * 2048**3 / times.pop(name) for name in list(times) if name.startswith("product")}
    for name, seconds in times.items():
        line = f"  {name:18} {seconds * 1e3:10.2f} ms"
        if name.startswith("cpu"):
            others = {n: t / seconds for n, t in times.items() if not n.startswith("cpu")}
            line += "   " + "  ".join(f"{ratio:.2f} x {n}" for n, ratio in others.items())
            for product, rate in products.items():
                if flops and product.split()[-1] == name.split()[-1]:
                    line += f"  {seconds * rate / flops:.2f} x floor"
        print(line)
    rates = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in products.items())
    print(f"  {rates}", flush=True)


def memory(case: AttentionCase, way: str) -> int:
    """Extra bytes at the peak of one forward and backward pass, in a process of its own."""
    code = f"from bench.reports import compare; compare.print_memory({case.name!r}, {way!r}, {torch.get_num_threads()})"
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    return int(out)


def print_memory(name: str, way: str, threads: int) -> None:
    torch.set_num_threads(threads)
    case = next(case for case in (*ATTENTION, *LARGE) if case.name == name)
    small = replace(case, feature_size=(4, 4), neighbor_size=(1, 1))
    for each in (small, case):  # the small one brings in what is loaded once
        run, tensors = attention(way, each, 0.1), inputs(each, CPU, torch.float32, grad=True)
        weight = torch.ones_like(tensors[0])
        extra = extra_bytes(lambda: torch.autograd.grad(run(*tensors), tensors, weight))  # noqa: B023
    print(extra)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", default="", help="groups whose title has this in it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="batch 1, one round: only to see that it runs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rounds = 1 if options.smoke else options.rounds
    small = {"batch": 1} if options.smoke else {}
    print(
        f"{platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{options.threads} threads, torch {torch.__version__}, python {platform.python_version()}, medians of {rounds}"
    )
    for case in (replace(case, **small) for case in (*ATTENTION, LARGE[0])):
        for dropout_p in (None, 0.0, 0.1):
            for name, dtype in DTYPES.items():
                what = "forward" if dropout_p is None else f"forward+backward, dropout {dropout_p}"
                title = f"attention {case.name} {what}, {name}"
                if options.only in title:
                    works = attention_works(case, dtype, dropout_p) | {f"product {name}": square_product(dtype)}
                    show(title, interleaved(works, rounds))
    for case in LARGE[1:]:
        title = f"attention {case.name} forward+backward, extra memory"
        if options.only in title and not options.smoke:
            print(title)
            for way in WAYS:
                print(f"  {way:18} {memory(case, way) / 1e6:10.0f} MB", flush=True)
    for model_case in (replace(case, **small) for case in MODEL):
        for training in (False, True):
            title = f"UniAD {model_case.name} {'training step' if training else 'inference'}"
            if options.only in title:
                products = {f"product {name}": square_product(dtype) for name, dtype in DTYPES.items()}
                flops = model_case.forward_flops * (3 if training else 1)
                show(title, interleaved(model_works(model_case, training) | products, rounds), flops)


if __name__ == "__main__":
    main()
