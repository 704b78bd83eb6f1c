"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

    python -m tests.sanitized [--examples N] [PATH ...]

For every instruction set of this processor (or those named): the ops in all dtypes, shapes that hurt, every layout of
every argument, extreme values, whole networks, and N drawn inputs. The first wrong access or undefined operation ends
it.
"""

import argparse
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS))


def sanitizer() -> str | None:
    """Why the compiler here can't do it, or None."""
    from uniad_fast.kernels.cpu import build

    source = "int main() { return 0; }"
    with tempfile.TemporaryDirectory() as folder:
        command = [os.environ.get("CXX", "c++"), "-x", "c++", "-", "-fsanitize=address,undefined", "-o", f"{folder}/a"]
        try:
            done = subprocess.run(command, input=source, capture_output=True, text=True)
        except OSError as error:
            return f"no C++ compiler here: {error}"
    if done.returncode:
        return f"the compiler has no sanitizers: {done.stderr.strip().splitlines()[-1]}"
    return None if build.problem() is None else build.problem()


def run(path: str, examples: int, wrong: bool = False) -> subprocess.CompletedProcess:
    """Everything for one instruction set, in a process of its own that starts with the sanitizer.

    wrong: read beside a tensor on purpose, instead, to see that it would be noticed.
    """
    compiler = os.environ.get("CXX", "c++")
    libraries = [
        subprocess.run([compiler, f"-print-file-name=lib{name}.so"], capture_output=True, text=True).stdout.strip()
        for name in ("asan", "ubsan")
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        # What Python and torch leave behind is not looked for.
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:exitcode=99:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.sanitized", "--inside", path, "--examples", str(examples)]
    command += ["--wrong"] if wrong else []
    return subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True)


def inside(path: str, examples: int, wrong: bool) -> None:
    """What the process with the sanitizer does."""
    import torch
    from op_cases import OPS, layouts
    from test_launch_linear import SHAPES, all_products, made
    from test_whole_network import CASES, make, tokens_for, whole
    from uniad_fast.kernels.cpu import build, launch_linear, launch_reconstruct
    from uniad_fast.kernels.cpu import launch as cpu

    from tests.fuzz.targets import TARGETS
    from tests.fuzz.targets import run as fuzz
    from uniad_fast import neighbor_masked_attention

    library = build.load(path, build.SANITIZED)
    cpu.load = launch_reconstruct.load = launch_linear.load = lambda: library
    build.problem = lambda: None
    build.remembered = lambda *_: None  # how fast this library is says nothing about the one without a sanitizer
    if wrong:
        x = torch.zeros(2, 64)
        rows = cpu._rows(torch.empty(9, 64, device="meta"), 1, 0.0, 0.0, None)
        return cpu._call(library.uniad_dropout_forward, x.dtype, rows, 0, x, torch.zeros(9, 64))
    ran = 0
    quick = examples < 100
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for case in OPS if not quick or dtype == torch.bfloat16 else []:
            plain = case.make(dtype=dtype)
            case.run("cpu", {name: t.requires_grad_() for name, t in plain.items()})
            for argument in plain:
                for _, tensor in layouts(plain[argument].detach()):
                    case.run("cpu", {n: t.detach().requires_grad_() for n, t in (plain | {argument: tensor}).items()})
                    ran += 1
        for size, window in (
            ((1, 1), (1, 1)),
            ((1, 7), (1, 3)),
            ((5, 25), (3, 5)),
            ((14, 14), (7, 7)),
            ((34, 33), (9, 9)),
        ):
            for head_dim in (1, 17, 32, 80):
                for factor in (1.0, 1e15):
                    shape = (1, 1, math.prod(size), head_dim)
                    tensors = [(torch.randn(shape) * factor).to(dtype).requires_grad_() for _ in range(3)]
                    out = neighbor_masked_attention(*tensors, size, window, dropout_p=0.1, seed=1, impl="cpu")
                    torch.autograd.grad(out.float().sum(), tensors)
                    ran += 1
    for changes in CASES.values():
        model = make(**changes)
        for batch in (1, 3):
            whole(model, tokens_for(model, batch))
            ran += 1
    for shape in SHAPES:
        all_products("own", *made(*shape))
        ran += 1
    for name in ("attention", "jitter", "norm", "dropout"):
        ran += fuzz(TARGETS[name], max(1, examples // 4), 5)
    print(f"{path}: {ran} calls forward and backward, nothing found")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.sanitized")
    parser.add_argument("paths", nargs="*", help="instruction sets; all of this processor by default")
    parser.add_argument("--examples", type=int, default=2000, help="drawn inputs for each")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    parser.add_argument("--wrong", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        return inside(options.inside, options.examples, options.wrong)
    if problem := sanitizer():
        sys.exit(problem)
    from uniad_fast.kernels.cpu import build

    for path in options.paths or build.paths():
        done = run(path, options.examples)
        print(done.stdout, end="")
        if done.returncode:
            sys.exit(f"{path}: exit code {done.returncode}\n{done.stderr[-8000:]}")
    return None


if __name__ == "__main__":
    main()
