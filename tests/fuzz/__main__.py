"""python -m tests.fuzz [--examples N] [--seed S] [--triton] [TARGET ...]: many inputs, with their counts."""

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", help="names of targets; all of them by default")
    parser.add_argument("--examples", type=int, default=100_000, help="inputs over all targets")
    parser.add_argument("--seed", type=int, default=1, help="other seeds draw other inputs")
    parser.add_argument("--triton", action="store_true", help="the Triton kernels, in the interpreter")
    options = parser.parse_args()
    if options.triton:
        os.environ["TRITON_INTERPRET"] = "1"
    from .targets import TARGETS, TRITON, run

    targets = TRITON if options.triton else TARGETS
    chosen = {name: targets[name] for name in options.targets or targets}
    whole, total = sum(target.share for target in chosen.values()), 0
    for name, target in chosen.items():
        started = time.monotonic()
        wanted = max(1, round(options.examples * target.share / whole))
        count = round_number = 0
        while count < wanted:
            # In pieces, since what is drawn is remembered.
            count += run(target, min(2000, wanted - count), options.seed * 100_000 + round_number)
            round_number += 1
            print(f"\r{name}: {count} of {wanted}", end="", flush=True)
        total += count
        seconds = time.monotonic() - started
        print(f"\r{name}: {count} inputs, {seconds:.0f} s, {count / seconds:.0f} a second", flush=True)
    print(f"{total} inputs, none of them wrong")


if __name__ == "__main__":
    main()
