"""The operators that tracing needs: opcheck, torch.compile, torch.export, DDP."""

import copy
import inspect

import pytest
import torch

from uniad_fast import jitter_project, neighbor_masked_attention
from uniad_fast.ops.dispatch import launchers
from uniad_fast.ops.dropout import (
    dropout,
    dropout_add_norm,
    dropout_backward,
    dropout_forward,
    norm_backward,
    norm_forward,
)
from uniad_fast.ops.jitter_project import jitter_backward, jitter_forward
from uniad_fast.ops.neighbor_masked_attention import attention_backward, attention_forward

pytest.importorskip("triton")
DEVICES = {"triton": torch.device("cuda" if torch.cuda.is_available() else "cpu"), "cpu": torch.device("cpu")}
IMPL = pytest.mark.parametrize("impl", DEVICES)


def test_both_launchers_take_the_same_arguments():
    """The seed last; the operators take these and the implementation's name."""
    cpu, gpu = (launchers(impl) for impl in ("cpu", "triton"))
    operators = (
        attention_forward, attention_backward, jitter_forward, jitter_backward,
        norm_forward, norm_backward, dropout_forward, dropout_backward,
    )  # fmt: skip
    counts = {}
    for operator in operators:
        name = operator._opoverload._schema.name.split("::")[1]
        mine, its = (inspect.signature(getattr(module, name)) for module in (cpu, gpu))
        assert mine == its, name
        arguments = [argument.name for argument in operator._opoverload._schema.arguments]
        assert [*mine.parameters, "impl"] == arguments and arguments[-2] == "seed"
        counts[name] = len(mine.parameters)
    assert counts["attention_forward"] == 7 and counts["attention_backward"] == 10


def opcheck(operator, arguments, **options):
    """torch.library.opcheck with room for the order of sums, where it takes such a thing (torch 2.7)."""
    if "rtol" in inspect.signature(torch.library.opcheck).parameters:
        options |= {"rtol": 1e-4, "atol": 1e-5}
    torch.library.opcheck(operator, arguments, **options)


@IMPL
@pytest.mark.parametrize("query_batch", [2, 1])
def test_attention_operators_pass_opcheck(impl, query_batch):
    device = DEVICES[impl]
    query = torch.randn(query_batch, 2, 35, 16, device=device)
    key, value = torch.randn(2, 2, 2, 35, 16, device=device)
    sample = ((5, 7, 1, 1), 0.2, 0.25, torch.tensor(3, device=device), impl)
    opcheck(attention_forward, (query, key, value, *sample))
    out, stats = attention_forward(query, key, value, *sample)
    arguments = (torch.randn_like(out), query, key, value, out, stats, *sample)
    opcheck(attention_backward, arguments)


def test_what_an_operator_lays_out_is_what_it_says_to_compilers():
    """Two tasks a head: the query's gradient is summed over them."""
    sample = ((34, 34, 1, 1), 0.0, 0.25, None, "cpu")
    query, key, value = torch.randn(3, 2, 2, 34 * 34, 8)
    out, stats = attention_forward(query, key, value, *sample)
    arguments = (torch.randn_like(out), query, key, value, out, stats, *sample)
    opcheck(attention_backward, arguments, test_utils="test_faketensor")


@IMPL
def test_jitter_operators_pass_opcheck(impl):
    device = DEVICES[impl]
    tokens, weight, bias = torch.randn(9, 24), torch.randn(10, 24), torch.randn(10)
    tokens, weight, bias = (t.to(device) for t in (tokens, weight, bias))
    seed = torch.tensor(3, device=device)
    opcheck(jitter_forward, (tokens, weight, bias, 5.0, 0.5, seed, impl))
    out, deviation = jitter_forward(tokens, weight, bias, 5.0, 0.5, seed, impl)
    arguments = (torch.randn_like(out), tokens, weight, deviation, 5.0, 0.5, True, True, seed, impl)
    opcheck(jitter_backward, arguments)


@IMPL
@pytest.mark.parametrize("residual_rows", [12, 4])
def test_norm_operators_pass_opcheck(impl, residual_rows):
    device = DEVICES[impl]
    x, residual = torch.randn(12, 20, device=device), torch.randn(residual_rows, 20, device=device)
    weight, bias, seed = torch.rand(20, device=device), torch.rand(20, device=device), torch.tensor(3, device=device)
    for p in (0.0, 0.2):
        arguments = (x, residual, weight, bias, p, 1e-5, seed, impl)
        opcheck(norm_forward, arguments)
        out, stats = norm_forward(*arguments)
        arguments = (torch.randn_like(out), x, residual, weight, stats, p, seed, impl)
        opcheck(norm_backward, arguments)


@IMPL
@pytest.mark.parametrize("relu", [True, False])
def test_dropout_operators_pass_opcheck(impl, relu):
    x, seed = torch.randn(12, 20, device=DEVICES[impl]), torch.tensor(3, device=DEVICES[impl])
    opcheck(dropout_forward, (x, 0.2, relu, seed, impl))
    opcheck(dropout_backward, (torch.randn_like(x), x, 0.2, relu, seed, impl))


class Net(torch.nn.Module):
    def __init__(self, impl):
        super().__init__()
        self.impl = impl
        self.weight = torch.nn.Parameter(torch.randn(32, 24))

    def forward(self, tokens, seed):
        hidden = jitter_project(tokens, self.weight, scale=2.0, seed=seed, impl=self.impl)
        hidden = dropout(hidden, 0.1, relu=True, seed=seed, impl=self.impl)
        norm = torch.ones_like(hidden[0, 0])
        hidden = dropout_add_norm(hidden, hidden, norm, norm, dropout_p=0.1, seed=seed, impl=self.impl)
        heads = hidden.unflatten(-1, (2, 16)).transpose(1, 2)
        return neighbor_masked_attention(heads, heads, heads, (5, 7), (3, 3), dropout_p=0.1, seed=seed, impl=self.impl)


@IMPL
def test_torch_compile_takes_it_in_one_graph(impl):
    device = DEVICES[impl]
    net, tokens, seed = Net(impl).to(device), torch.randn(2, 35, 24, device=device), torch.tensor(8, device=device)
    compiled = torch.compile(copy.deepcopy(net), fullgraph=True, backend="aot_eager")
    out, expected = compiled(tokens, seed), net(tokens, seed)
    torch.testing.assert_close(out, expected)
    gradients = [
        torch.autograd.grad(o.square().sum(), n.parameters())[0] for o, n in ((out, compiled), (expected, net))
    ]
    torch.testing.assert_close(*gradients)


@IMPL
def test_torch_export_takes_it(impl):
    device = DEVICES[impl]
    net, arguments = (
        Net(impl).to(device).eval(),
        (torch.randn(2, 35, 24, device=device), torch.tensor(8, device=device)),
    )
    with torch.no_grad():
        program = torch.export.export(net, arguments)
        torch.testing.assert_close(program.module()(*arguments), net(*arguments))
    assert "uniad_fast.attention_forward" in str(program.graph)


@IMPL
def test_ddp_takes_it(impl, tmp_path):
    device = DEVICES[impl]
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net, tokens, seed = Net(impl).to(device), torch.randn(2, 35, 24, device=device), torch.tensor(8, device=device)
        wrapped = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(net))
        wrapped(tokens, seed).square().sum().backward()
        net(tokens, seed).square().sum().backward()
        torch.testing.assert_close(wrapped.module.weight.grad, net.weight.grad)
    finally:
        dist.destroy_process_group()
