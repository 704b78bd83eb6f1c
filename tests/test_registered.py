"""The operators that tracing needs: opcheck, torch.compile, torch.export, DDP."""

import copy

import pytest
import torch

from uniad_fast import jitter_project, neighbor_masked_attention, registered

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SAMPLE = (5, 7, 1, 1, 0.2, 0.25)


@pytest.mark.parametrize("query_batch", [2, 1])
def test_registered_attention_operators_pass_opcheck(query_batch):
    query = torch.randn(query_batch, 2, 35, 16, device=DEVICE)
    key, value = torch.randn(2, 2, 2, 35, 16, device=DEVICE)
    seed = torch.tensor(3, device=DEVICE)
    torch.library.opcheck(registered.attention_forward, (query, key, value, seed, *SAMPLE), rtol=1e-4, atol=1e-5)
    out, log_sum_exp = registered.attention_forward(query, key, value, seed, *SAMPLE)
    arguments = (torch.randn_like(out), query, key, value, out, log_sum_exp, seed, *SAMPLE)
    torch.library.opcheck(registered.attention_backward, arguments, rtol=1e-4, atol=1e-5)


def test_registered_jitter_operators_pass_opcheck():
    tokens, weight, bias = torch.randn(9, 24), torch.randn(10, 24), torch.randn(10)
    tokens, weight, bias = (t.to(DEVICE) for t in (tokens, weight, bias))
    seed = torch.tensor(3, device=DEVICE)
    torch.library.opcheck(registered.jitter_forward, (tokens, weight, bias, seed, 5.0, 0.5), rtol=1e-4, atol=1e-5)
    out, deviation = registered.jitter_forward(tokens, weight, bias, seed, 5.0, 0.5)
    arguments = (torch.randn_like(out), tokens, weight, deviation, seed, 5.0, 0.5, True, True)
    torch.library.opcheck(registered.jitter_backward, arguments, rtol=1e-4, atol=1e-5)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(32, 24))

    def forward(self, tokens, seed):
        hidden = jitter_project(tokens, self.weight, scale=2.0, seed=seed, impl="triton")
        heads = hidden.unflatten(-1, (2, 16)).transpose(1, 2)
        return neighbor_masked_attention(heads, heads, heads, (5, 7), (3, 3), dropout_p=0.1, seed=seed, impl="triton")


def test_torch_compile_takes_it_in_one_graph():
    net, tokens, seed = Net().to(DEVICE), torch.randn(2, 35, 24, device=DEVICE), torch.tensor(8, device=DEVICE)
    compiled = torch.compile(copy.deepcopy(net), fullgraph=True, backend="aot_eager")
    out, expected = compiled(tokens, seed), net(tokens, seed)
    torch.testing.assert_close(out, expected)
    gradients = [
        torch.autograd.grad(o.square().sum(), n.parameters())[0] for o, n in ((out, compiled), (expected, net))
    ]
    torch.testing.assert_close(*gradients)


def test_torch_export_takes_it():
    net, arguments = Net().to(DEVICE).eval(), (torch.randn(2, 35, 24, device=DEVICE), torch.tensor(8, device=DEVICE))
    with torch.no_grad():
        program = torch.export.export(net, arguments)
        torch.testing.assert_close(program.module()(*arguments), net(*arguments))
    assert "uniad_fast.attention_forward" in str(program.graph)


def test_ddp_takes_it(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net, tokens, seed = Net().to(DEVICE), torch.randn(2, 35, 24, device=DEVICE), torch.tensor(8, device=DEVICE)
        wrapped = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(net))
        wrapped(tokens, seed).square().sum().backward()
        net(tokens, seed).square().sum().backward()
        torch.testing.assert_close(wrapped.module.weight.grad, net.weight.grad)
    finally:
        dist.destroy_process_group()
