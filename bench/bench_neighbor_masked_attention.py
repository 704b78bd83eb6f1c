"""Attention forward, and forward + backward with and without dropout, by everybody; and its memory on a large grid."""

import pytest
import torch
from torch import Tensor

from bench.tools.attention_peak import attention_peak, attention_peak_elsewhere
from bench.tools.cases import ATTENTION, BATCHES, LARGE, SPARSE, AttentionCase
from bench.tools.competitors import WITHOUT_GRAPH, attention, inputs, names, why_not
from bench.tools.device import refusal
from bench.tools.harness import Run, name_of
from bench.tools.marks import cases
from bench.tools.table import Row
from bench.tools.turns import Way, Work

CASES = pytest.mark.parametrize(
    "case",
    [
        *cases([*ATTENTION, LARGE[0]]),
        *cases(BATCHES[:2], "gpu"),
        *cases([*BATCHES[2:], SPARSE, LARGE[1]], "gpu", "large"),
    ],
)


def works_of(run: Run, case: AttentionCase, dropout_p: float, backward: bool) -> tuple[dict[Way, Work], dict[Way, str]]:
    """The ways to measure, and what is known or found to keep the others from it."""
    works: dict[Way, Work] = {}
    missing: dict[Way, str] = {}
    for dtype in run.dtypes:
        tensors = inputs(case, run.device, dtype, grad=backward)
        weight = torch.randn_like(tensors[0])
        for name in names(run.device):
            way = Way(name, name_of(dtype))
            if why := why_not(name, dtype, dropout_p):
                missing[way] = why
                continue
            call = attention(name, case, dropout_p, run.device, dtype)

            def work(call=call, tensors=tensors, weight=weight) -> tuple[Tensor, ...]:
                out = call(*tensors)
                return torch.autograd.grad(out, tensors, weight) if backward else (out,)

            # On a GPU the backends choose what they take, and the largest may not find the memory.
            if run.device.type == "cuda" and (why := refusal(work)):
                missing[way] = why
            else:
                works[way] = work
    assert not [way for way in missing if way.name in ("torch", "triton")], missing
    return works, missing


def agree(first: dict[Way, object], tolerance: float) -> None:
    """Everybody gave what stock PyTorch gave in the same dtype."""
    for way, tensors in first.items():
        for ours, expected in zip(tensors, first[Way("torch", way.dtype)], strict=True):
            torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


@CASES
def test_benchmark_forward(turns, run, case):
    case = run.sized(case)
    works, missing = works_of(run, case, 0.0, backward=False)
    capturable = [way for way in works if way.name not in WITHOUT_GRAPH]
    agree(turns(f"attention forward, {case.name}", works, capturable=capturable, missing=missing), 2e-2)


@CASES
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_benchmark_forward_backward(turns, run, case, dropout_p):
    case = run.sized(case)
    works, missing = works_of(run, case, dropout_p, backward=True)
    capturable = [way for way in works if way.name not in WITHOUT_GRAPH]
    group = f"attention forward + backward, dropout {dropout_p}, {case.name}"
    first = turns(group, works, capturable=capturable, missing=missing)
    if dropout_p == 0:
        agree(first, 5e-2)
    assert all(gradient.isfinite().all() for gradients in first.values() for gradient in gradients)


@pytest.mark.large
def test_benchmark_memory(turns, run):
    """What a grid of 100 x 100 needs beside its inputs: in a process of its own each, whose peak is read."""
    case = run.sized(LARGE[1])
    if run.device.type != "cpu":
        pytest.skip("on a GPU every row has its peak")
    measure = attention_peak if run.smoke else attention_peak_elsewhere
    group = f"attention forward + backward, dropout 0.1, once, {case.name}"
    rows = []
    for name in names(run.device):
        seconds, extra = measure(name, case)
        rows.append(Row(group, Way(name), [seconds], {"extra MB": extra / 1e6}))
    turns.tell(group, rows)
