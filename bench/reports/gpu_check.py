"""What only a GPU tells of the Triton kernels: errors against float64, draws to the bit, graphs, torch.compile, memory.

python -m bench.reports.gpu_check [--only TEXT] [--small] [--smoke]

Every check is a line; the exit code is 1 if one failed. --small: a few small calls alone, for compute-sanitizer.
--smoke: in Triton's interpreter, which needs no GPU and shows that the checks run.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product

import torch
from torch import Tensor

from bench.tools.device import captured, first_line, peak_mib
from bench.tools.replayed_training import training_check
from bench.tools.seeds import drawn_singly
from uniad_fast import UniAD, jitter_project, neighbor_masked_attention
from uniad_fast.ops import noise
from uniad_fast.ops.dropout import dropout, dropout_add_norm
from uniad_fast.ops.geometry import Size, Window, hidden_keys

Call = Callable[..., Tensor]
"""(impl, *tensors) -> what an op gives."""
Check = tuple[str, Callable[[], str]]
"""What is checked; what was found, or an AssertionError."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LIMIT = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
"""Norm of the error over the norm of the truth."""
LAYOUTS = ("alone", "packed", "token first", "unaligned", "one query")
WINDOWS: list[tuple[Size, Size | None]] = [
    ((14, 14), (7, 7)), ((28, 28), (15, 15)), ((5, 25), (3, 5)), ((7, 13), (4, 2)), ((5, 6), (5, 7)),
    ((2, 65), (1, 129)), ((9, 9), None), ((16, 16), (8, 8)), ((1, 7), (1, 3)), ((1, 1), (1, 1)),
]  # fmt: skip
"""The paper's, one that skips blocks, borders of all kinds, whole blocks, and queries that see no key."""


def heads(layout: str, shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """query, key, value [B, H, N, D] as they come: alone, views of one product, token first, off the 16-byte border."""
    batch, number, tokens, width = shape
    if layout == "packed":
        made = torch.randn(batch, tokens, 3, number, width, device=device).to(dtype).permute(2, 0, 3, 1, 4)
    elif layout == "token first":
        made = torch.randn(tokens, batch, 3, number, width, device=device).to(dtype).permute(2, 1, 3, 0, 4)
    elif layout == "unaligned":
        flat = torch.randn(3, batch * number * tokens * (width + 1) + 1, device=device).to(dtype)
        made = flat[:, 1:].view(3, batch, number, tokens, width + 1)[..., :width]
    else:
        made = torch.randn(3, *shape, device=device).to(dtype)
    query, key, value = made
    return [query[:1] if layout == "one query" else query, key, value]


def against_float64(call: Call, tensors: list[Tensor]) -> Callable[[], str]:
    """The output and every gradient, beside the definition's from the same inputs in float64."""

    def results(impl: str, given: list[Tensor]) -> list[Tensor]:
        given = [tensor.detach().requires_grad_() for tensor in given]
        out = call(impl, *given)
        gradient = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=torch.float64).view(out.shape).sin()
        return [out.detach(), *torch.autograd.grad(out, given, gradient.to(out.dtype))]

    def check() -> str:
        ours, truth = results("triton", tensors), results("reference", [tensor.double() for tensor in tensors])
        assert all(tensor.isfinite().all() for tensor in ours), "not finite"
        errors = [distance(a, b) for a, b in zip(ours, truth, strict=True)]
        found = "errors " + " ".join(f"{error:.1e}" for error in errors)
        assert max(errors) < LIMIT[tensors[0].dtype], found
        return found

    return check


def distance(ours: Tensor, truth: Tensor) -> float:
    return ((ours.double() - truth).norm() / truth.norm().clamp(min=1e-30)).item()


def attention_call(grid: Size, window: Size | None, dropout_p: float) -> Call:
    return lambda impl, *tensors: neighbor_masked_attention(
        *tensors, grid, window, dropout_p=dropout_p, seed=11, impl=impl
    )


def attention_checks(device: torch.device, small: bool) -> Iterator[Check]:
    for (grid, window), (name, dtype), p in product(WINDOWS[8:] if small else WINDOWS, DTYPES.items(), (0.0, 0.3)):
        tensors = heads("alone", (2, 2, grid[0] * grid[1], 32), device, dtype)
        yield (
            f"attention {grid}, window {window}, {name}, p={p}",
            against_float64(attention_call(grid, window, p), tensors),
        )
    for layout, (name, dtype) in product(LAYOUTS, DTYPES.items()):
        tensors = heads(layout, (2, 3, 35, 32), device, dtype)
        yield f"attention {layout}, {name}", against_float64(attention_call((5, 7), (3, 3), 0.2), tensors)
    for width, (name, dtype) in product((24,) if small else (1, 8, 16, 24, 64, 80, 128), DTYPES.items()):
        tensors = heads("packed", (1, 1, 35, width), device, dtype)
        yield f"attention head_dim {width}, {name}", against_float64(attention_call((5, 7), (3, 5), 0.2), tensors)


def row_checks(device: torch.device, small: bool) -> Iterator[Check]:
    """Jitter and project, and the passes between products."""
    sizes, shapes = [(392, 272, 256), (7, 13, 10), (1, 1, 1)], [(3, 196, 256), (1, 1, 4096), (2, 5, 17)]
    for (rows, channels, outs), (name, dtype), p in product(sizes[small:], DTYPES.items(), (1.0, 0.5)):
        made = [torch.randn(s, device=device).to(dtype) for s in ((rows, channels), (outs, channels), (outs,))]

        def jitter(impl: str, *tensors: Tensor, p=p) -> Tensor:
            return jitter_project(*tensors, scale=5.0, prob=p, seed=9, impl=impl)

        yield f"jitter {rows} x {channels} -> {outs}, {name}, prob={p}", against_float64(jitter, made)
    for shape, (name, dtype), p in product(shapes[2 * small :], DTYPES.items(), (0.0, 0.3)):
        made = [torch.randn(s, device=device).to(dtype) for s in (shape, (1, *shape[1:]))]
        affine = [torch.randn(shape[-1], device=device) for _ in range(2)]

        def norm(impl: str, x: Tensor, residual: Tensor, p=p, affine=affine) -> Tensor:
            own = [tensor.to(x.dtype) if impl == "reference" else tensor for tensor in affine]
            return dropout_add_norm(x, residual, *own, dropout_p=p, seed=7, impl=impl)

        def relu(impl: str, x: Tensor, p=p) -> Tensor:
            return dropout(x, p, relu=True, seed=7, impl=impl)

        yield f"dropout + add + norm {shape}, {name}, p={p}", against_float64(norm, made)
        yield f"ReLU + dropout {shape}, {name}, p={p}", against_float64(relu, made[:1])


def draw_checks(device: torch.device, small: bool) -> Iterator[Check]:
    """Values, and gradients of the output, that are unit vectors show each weight: is it there exactly where kept?"""
    grid, window, seed, p = ((3, 4) if small else (28, 28)), (3, 3), -0x1234_5678_9ABC_DEF, 0.3
    tokens = grid[0] * grid[1]

    def check(dtype: torch.dtype) -> str:
        query, key = (0.1 * torch.randn(1, 2, tokens, 32, device=device).to(dtype) for _ in range(2))
        there = noise.keep_mask(seed, (2, tokens, tokens), p, device) & ~hidden_keys(Window.of(grid, window), device)
        unit = torch.eye(-(-tokens // 32) * 32, device=device)[:tokens].to(dtype)
        wrong = 0
        for first in range(0, tokens, 32):
            some, seen = unit[:, first : first + 32].expand(1, 2, -1, -1), slice(first, min(first + 32, tokens))
            value = some.clone().requires_grad_()
            out = neighbor_masked_attention(query, key, value, grid, window, dropout_p=p, seed=seed, impl="triton")
            (by_key,) = torch.autograd.grad(out, value, some)  # [j, c]: the weight of query first + c on key j
            wrong += ((out[0, ..., : seen.stop - first] != 0) != there[:, :, seen]).sum().item()
            wrong += ((by_key[0, ..., : seen.stop - first] != 0) != there[:, seen].transpose(1, 2)).sum().item()
        assert not wrong, f"{wrong} weights are there or missing against the definition"
        return f"{there.numel()} weights"

    for name, dtype in DTYPES.items():
        yield f"dropout's draws {grid}, {name}", lambda dtype=dtype: check(dtype)


def model(impl: str, device: torch.device) -> UniAD:
    torch.manual_seed(0)
    neighbors = {"neighbor_size": (3, 5), "mask": [True] * 3}
    jitter = {"scale": 20.0, "prob": 1.0}
    made = UniAD(
        [24],
        [16],
        (7, 9),
        jitter,
        neighbors,
        64,
        "learned",
        None,
        {"method": "xavier_uniform"},
        2,
        1,
        1,
        128,
        impl=impl,
    )
    return made.to(device)


def model_checks(device: torch.device) -> Iterator[Check]:
    x = torch.randn(2, 24, 7, 9, device=device)

    def step(impl: str, dtype: torch.dtype | None = None) -> list[Tensor]:
        net = model(impl, device)
        torch.manual_seed(4)
        with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            out = net({"feature_align": x})["feature_rec"]
        return [out.detach(), *torch.autograd.grad((out.float() - x).square().mean(), list(net.parameters()))]

    def beside_definition(dtype: torch.dtype | None) -> str:
        with drawn_singly():
            ours = step("triton", dtype)
        pairs = zip(ours, step("reference"), strict=True)
        worst = max(distance(ours, truth.double()) for ours, truth in pairs)
        assert worst < (2e-3 if dtype is None else 0.1), f"worst {worst:.1e}"
        return f"worst {worst:.1e}"

    def same_bits() -> str:
        assert all(torch.equal(a, b) for a, b in zip(step("triton"), step("triton"), strict=True))
        return ""

    yield "a training step beside the definition's", lambda: beside_definition(None)
    yield "the same seed, the same bits", same_bits
    if device.type == "cuda":
        yield "a training step, autocast", lambda: beside_definition(torch.bfloat16)
        for mode in ("default", "reduce-overhead"):
            yield f"torch.compile, {mode}", lambda mode=mode: compiled(model("triton", device).eval(), x, mode)


def compiled(net: UniAD, x: Tensor, mode: str) -> str:
    tokens = x.flatten(2).transpose(1, 2)
    torch.compiler.reset()
    with torch.no_grad():
        made = torch.compile(net.reconstruct, fullgraph=True, mode=mode)
        worst = max((made(tokens) - net.reconstruct(tokens)).abs().max().item() for _ in range(3))
    assert worst < 1e-3, f"differs by {worst:.1e}"
    return f"differs by {worst:.1e}"


def graph_checks(device: torch.device) -> Iterator[Check]:
    """One captured forward and backward pass, replayed: with other seeds as eager calls have it; with None anew."""
    tensors = [tensor.requires_grad_() for tensor in heads("alone", (4, 8, 196, 32), device, torch.bfloat16)]

    def call(seed: Tensor | None) -> list[Tensor]:
        out = neighbor_masked_attention(*tensors, (14, 14), (7, 7), dropout_p=0.1, seed=seed, impl="triton")
        return [out, *torch.autograd.grad(out, tensors, torch.ones_like(out))]

    def with_seed() -> str:
        seed = torch.zeros((), dtype=torch.int64, device=device)
        graph, results = captured(lambda: call(seed))
        for number in (1, -5, 2**62):
            seed.fill_(number)
            graph.replay()
            assert all(torch.equal(a, b) for a, b in zip(results, call(seed), strict=True)), f"seed {number}"
        return ""

    def without() -> str:
        graph, results = captured(lambda: call(None))
        graph.replay()
        first = results[0].clone()
        graph.replay()
        assert not torch.equal(first, results[0]), "the same draws twice"
        return ""

    yield "CUDA graph, a seed on the device", with_seed
    yield "CUDA graph, draws anew at each replay", without
    yield "training, its steps replayed beside called", lambda: training_check(device)


def memory_checks(device: torch.device) -> Iterator[Check]:
    def check() -> str:
        tensors = [tensor.requires_grad_() for tensor in heads("alone", (1, 3, 10_000, 32), device, torch.bfloat16)]
        call = attention_call((100, 100), (9, 9), 0.1)
        peak = peak_mib(lambda: torch.autograd.grad(call("triton", *tensors).sum(), tensors))
        assert peak < 20, f"{peak:.0f} MiB"
        return f"{peak:.1f} MiB; a dense mask alone has {10_000**2 * 2 / 2**20:.0f}"

    yield "peak of 100 x 100, 3 heads, forward + backward", check


def checks(options: argparse.Namespace, device: torch.device) -> Iterator[Check]:
    small = options.small or options.smoke
    yield from attention_checks(device, small)
    yield from row_checks(device, small)
    if options.small:
        return
    yield from draw_checks(device, small)
    yield from model_checks(device)
    if device.type == "cuda":
        yield from graph_checks(device)
        yield from memory_checks(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="checks whose line has this in it")
    parser.add_argument("--small", action="store_true", help="a few small calls, for compute-sanitizer")
    parser.add_argument("--smoke", action="store_true", help="in Triton's interpreter, on a CPU")
    options = parser.parse_args()
    if options.smoke:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported, with the kernels, by the first call
        DTYPES.pop("bfloat16")  # whose products the interpreter gets wrong
    elif not torch.cuda.is_available():
        sys.exit("no GPU: --smoke runs the checks in Triton's interpreter")
    device = torch.device("cpu" if options.smoke else "cuda")
    failed = []
    for what, check in checks(options, device):
        if options.only not in what:
            continue
        start = time.perf_counter()
        try:
            found, ok = check(), True
        except Exception as problem:
            if "CUDA error" in str(problem):
                raise  # nothing after it means anything
            found, ok = first_line(problem), False
            failed.append(what)
        print(f"{'ok' if ok else 'FAILED':6} {what:60} {found} ({time.perf_counter() - start:.1f} s)", flush=True)
    print("\n".join([f"{len(failed)} failed", *failed]))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
