"""Other people's models before and after `replace_attention`, on a CPU, in turns within one run, float32.

python -m bench.reports.compare_replaced [--threads N] [--rounds N] [--smoke]

The public encoder-decoder at 14 x 14, and one attention of 3 heads on a grid of 100 x 100 with its time and memory.
"""

import argparse
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from bench.bench_model import build, feature
from bench.tools.cases import MODEL
from bench.tools.peak import extra_bytes
from bench.tools.timing import interleaved
from bench.tools.turns import Work
from uniad_fast import replace_attention
from uniad_fast.testing import PublicUniAD

CPU, ROOT = torch.device("cpu"), Path(__file__).parents[2]


class LargeGrid(nn.Module):
    """Sequence first, its mask built in each forward."""

    def __init__(self, feature_size: tuple[int, int]) -> None:
        super().__init__()
        self.feature_size = feature_size
        self.attention = nn.MultiheadAttention(96, 3, dropout=0.1)

    def generate_mask(self, feature_size: tuple[int, int], neighbor_size: tuple[int, int]) -> torch.Tensor:
        return PublicUniAD.generate_mask(self, feature_size, neighbor_size)  # type: ignore[arg-type]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        mask = self.generate_mask(self.feature_size, (9, 9))
        return self.attention(tokens, tokens, tokens, attn_mask=mask)[0]


def encoder_decoder_works(training: bool, batch: int) -> dict[str, Work]:
    case = replace(MODEL[0], batch=batch)
    works: dict[str, Work] = {}
    for name in ("public", "cpu"):
        model, x = build(case, "public", CPU).train(training), feature(case, CPU)
        if name == "cpu":
            replace_attention(model, impl="cpu")

        def work(model=model, x=x) -> None:
            model.zero_grad(set_to_none=True)
            with torch.set_grad_enabled(training):
                out = model({"feature_align": x})["feature_rec"]
            if training:
                nn.functional.mse_loss(out, x).backward()

        works[name] = work
    return works


def print_large_grid(way: str, threads: int, side: int) -> None:
    """Seconds and extra bytes at the peak of one forward and backward pass; a second one is timed."""
    torch.set_num_threads(threads)
    model = LargeGrid((side, side))
    if way == "cpu":
        replace_attention(model, impl="cpu")
    tokens = torch.randn(side * side, 1, 96)

    def step() -> None:
        model(tokens).sum().backward()

    step()  # what is loaded once
    peak = extra_bytes(step)
    start = time.perf_counter()
    step()
    print(time.perf_counter() - start, peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="small and once: only to see that it runs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rounds, batch, side = (1, 1, 20) if options.smoke else (options.rounds, MODEL[0].batch, 100)
    for training in (False, True):
        title = f"public UniAD 14x14_batch{batch}, {'training' if training else 'inference'}; cpu: attention replaced"
        print(title)
        times = interleaved(encoder_decoder_works(training, batch), rounds)
        for way, seconds in times.items():
            print(f"  {way:18} {seconds * 1e3:10.0f} ms  {times['public'] / seconds:8.2f} x public", flush=True)
    print(f"one attention, {side}x{side}, 3 heads x 32, window 9x9, forward + backward, dropout 0.1")
    for way in ("public", "cpu"):
        code = (
            "from bench.reports import compare_replaced; "
            f"compare_replaced.print_large_grid({way!r}, {options.threads}, {side})"
        )
        command = [sys.executable, "-c", code]
        out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
        seconds, peak = map(float, out.split())
        print(f"  {way:18} {seconds * 1e3:10.0f} ms  {peak / 1e6:8.0f} MB more", flush=True)


if __name__ == "__main__":
    main()
