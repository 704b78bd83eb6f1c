"""The operators that tracing needs: opcheck, torch.compile, torch.export, DDP."""

import copy
import inspect

import pytest
import torch

from uniad_fast import jitter_project, neighbor_masked_attention
from uniad_fast.ops import registered
from uniad_fast.ops.functional import dropout, dropout_add_norm

pytest.importorskip("triton")
DEVICES = {"triton": torch.device("cuda" if torch.cuda.is_available() else "cpu"), "cpu": torch.device("cpu")}
IMPL = pytest.mark.parametrize("impl", DEVICES)


def opcheck(operator, arguments, **options):
    """torch.library.opcheck with room for the order of sums, where it takes such a thing (torch 2.7)."""
    if "rtol" in inspect.signature(torch.library.opcheck).parameters:
        options |= {"rtol": 1e-4, "atol": 1e-5}
    torch.library.opcheck(operator, arguments, **options)


@IMPL
@pytest.mark.parametrize("query_batch", [2, 1])
def test_registered_attention_operators_pass_opcheck(impl, query_batch):
    device, sample = DEVICES[impl], (5, 7, 1, 1, 0.2, 0.25, impl)
    query = torch.randn(query_batch, 2, 35, 16, device=device)
    key, value = torch.randn(2, 2, 2, 35, 16, device=device)
    seed = torch.tensor(3, device=device)
    opcheck(registered.attention_forward, (query, key, value, seed, *sample))
    out, stats = registered.attention_forward(query, key, value, seed, *sample)
    arguments = (torch.randn_like(out), query, key, value, out, stats, seed, *sample)
    opcheck(registered.attention_backward, arguments)


def test_what_an_operator_lays_out_is_what_it_says_to_compilers():
    """Two tasks a head: the query's gradient is summed over them."""
    sample = (34, 34, 1, 1, 0.0, 0.25, "cpu")
    query, key, value = torch.randn(3, 2, 2, 34 * 34, 8)
    out, stats = registered.attention_forward(query, key, value, None, *sample)
    arguments = (torch.randn_like(out), query, key, value, out, stats, None, *sample)
    opcheck(registered.attention_backward, arguments, test_utils="test_faketensor")


@IMPL
def test_registered_jitter_operators_pass_opcheck(impl):
    device = DEVICES[impl]
    tokens, weight, bias = torch.randn(9, 24), torch.randn(10, 24), torch.randn(10)
    tokens, weight, bias = (t.to(device) for t in (tokens, weight, bias))
    seed = torch.tensor(3, device=device)
    opcheck(registered.jitter_forward, (tokens, weight, bias, seed, 5.0, 0.5, impl))
    out, deviation = registered.jitter_forward(tokens, weight, bias, seed, 5.0, 0.5, impl)
    arguments = (torch.randn_like(out), tokens, weight, deviation, seed, 5.0, 0.5, impl, True, True)
    opcheck(registered.jitter_backward, arguments)


@IMPL
@pytest.mark.parametrize("residual_rows", [12, 4])
def test_registered_norm_operators_pass_opcheck(impl, residual_rows):
    device = DEVICES[impl]
    x, residual = torch.randn(12, 20, device=device), torch.randn(residual_rows, 20, device=device)
    weight, bias, seed = torch.rand(20, device=device), torch.rand(20, device=device), torch.tensor(3, device=device)
    for p in (0.0, 0.2):
        arguments = (x, residual, weight, bias, seed, p, 1e-5, impl)
        opcheck(registered.norm_forward, arguments)
        out, stats = registered.norm_forward(*arguments)
        arguments = (torch.randn_like(out), x, residual, weight, stats, seed, p, impl)
        opcheck(registered.norm_backward, arguments)


@IMPL
@pytest.mark.parametrize("relu", [True, False])
def test_registered_dropout_operators_pass_opcheck(impl, relu):
    x, seed = torch.randn(12, 20, device=DEVICES[impl]), torch.tensor(3, device=DEVICES[impl])
    opcheck(registered.dropout_forward, (x, seed, 0.2, relu, impl))
    opcheck(registered.dropout_backward, (torch.randn_like(x), x, seed, 0.2, relu, impl))


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
