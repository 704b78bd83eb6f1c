"""The step as a graph: the same bits as step by step, and what can't be captured goes step by step.

On a CPU a stand-in records and replays; see `recorded_graphs` for what that shows.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from recorded_graphs import RecordedGraphs  # noqa: E402
from torch import nn  # noqa: E402

from uniad_fast.models.architecture import Architecture  # noqa: E402
from uniad_fast.training import loop, optimization  # noqa: E402
from uniad_fast.training.build import build_model  # noqa: E402
from uniad_fast.training.captured_step import CapturedStep  # noqa: E402
from uniad_fast.training.recipes import FAST, PAPER  # noqa: E402
from uniad_fast.training.reconstruction_loss import ReconstructionLoss, channel_statistics  # noqa: E402
from uniad_fast.training.run_files import RunFiles  # noqa: E402

GRID, CHANNELS = (2, 3), 6
TOKENS = np.random.default_rng(0).normal(2, 3, (7, 6, CHANNELS)).astype(np.float32)
SMALL = Architecture(hidden_dim=16, nhead=1, num_encoder_layers=1, num_decoder_layers=1, dim_feedforward=24)
RECIPE = replace(FAST, epochs=2, min_steps=0, batch_size=2, precision="float32", dropout=0.1)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TORCH = tuple(int(number) for number in torch.__version__.split(".")[:2])


def trained(folder, graphs, monkeypatch, recipe=RECIPE, locations=None):
    """(state dict, log without seconds) of six steps, each with another rate and beta1."""
    if graphs is not None or DEVICE == "cpu":
        monkeypatch.setattr(loop, "_graphs", lambda device: graphs)
    torch.manual_seed(0)
    model = build_model(CHANNELS, 16, GRID, recipe, "triton", SMALL).to(DEVICE)
    statistics = channel_statistics(TOKENS)
    criterion = ReconstructionLoss(model, *statistics, optimization.loss(recipe), recipe.precision, locations)
    loop.train(criterion, TOKENS, recipe, 0, RunFiles(folder, {}, quiet=True))
    log = [line.rsplit(",", 1)[0] for line in (folder / "log.csv").read_text().splitlines()]
    return model.state_dict(), log


def assert_same(first, second):
    (weights, log), (others, other_log) = first, second
    assert log == other_log
    assert all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.fixture(scope="module")
def by_steps(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        return trained(tmp_path_factory.mktemp("steps"), None, patch)


@pytest.mark.skipif(DEVICE == "cuda", reason="the stand-in is for a machine without a GPU")
def test_replayed_steps_have_the_bits_of_steps(by_steps, tmp_path, monkeypatch):
    graphs = RecordedGraphs()
    assert_same(trained(tmp_path, graphs, monkeypatch), by_steps)
    assert graphs.replayed > 3 * 50  # six steps but the first three, each of many calls


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_cuda_graph_has_the_bits_of_steps(tmp_path, monkeypatch):
    replayed = trained(tmp_path / "graph", None, monkeypatch)
    monkeypatch.setattr(loop, "_graphs", lambda device: None)
    assert_same(replayed, trained(tmp_path / "steps", None, monkeypatch))


@pytest.mark.skipif(DEVICE == "cuda", reason="the stand-in is for a machine without a GPU")
def test_another_optimizer_and_places_that_do_not_count(tmp_path, monkeypatch):
    recipe, seen = replace(PAPER, epochs=2, batch_size=2, optimizer="muon"), torch.arange(6) % 3 > 0
    graphs = RecordedGraphs()
    replayed = trained(tmp_path / "graph", graphs, monkeypatch, recipe, seen)
    assert_same(replayed, trained(tmp_path / "steps", None, monkeypatch, recipe, seen))
    assert graphs.replayed


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.skipif(TORCH < (2, 13), reason="older releases of torch can't go on after a failed capture, and say so")
def test_a_capture_that_fails_leaves_the_device_as_it_was(tmp_path, monkeypatch):
    by_steps = trained(tmp_path / "steps", None, monkeypatch)
    stream, forward = torch.cuda.current_stream(), ReconstructionLoss.forward
    monkeypatch.setattr(loop, "_graphs", loop.CudaGraphs)
    monkeypatch.setattr(ReconstructionLoss, "forward", lambda *a: (loss := forward(*a), loss.item())[0])
    with pytest.warns(UserWarning, match="no CUDA graph"):
        called = trained(tmp_path / "graph", None, monkeypatch)
    assert_same(called, by_steps)
    assert torch.cuda.current_stream() == stream


class Net:
    """A step of one weight; with what must not be in one."""

    def __init__(self, reads_back=False):
        self.weight, self.reads_back = nn.Parameter(torch.tensor([2.0])), reads_back
        self.calls, self.frozen = 0, False

    def __call__(self, tokens):
        self.calls += 1
        self.weight.grad = None
        loss = (self.weight * tokens.square()).sum() * (self.calls if self.reads_back is None else 1)
        if not self.frozen:
            loss.backward()
        if self.reads_back and loss.item() > 1e9:
            raise ValueError("never")
        return loss.detach().reshape(1)


def stepped(net, batches):
    step = CapturedStep(net, [net.weight], RecordedGraphs())
    return step, [(step(tokens).clone(), net.weight.grad.clone()) for tokens in batches]


BATCHES = [torch.full((2, 3), float(value)) for value in range(1, 9)]


def test_who_captures(monkeypatch):
    assert loop._graphs(torch.device("cpu")) is None
    monkeypatch.setattr(loop, "CudaGraphs", lambda device: device)
    assert loop._graphs(torch.device("cuda")) == torch.device("cuda")
    monkeypatch.setenv("UNIAD_FAST_CUDA_GRAPH", "0")
    assert loop._graphs(torch.device("cuda")) is None


def test_a_step_is_called_three_times_and_captured_once():
    net = Net()
    step, found = stepped(net, BATCHES)
    assert step.is_captured and net.calls == 4
    for (loss, gradient), tokens in zip(found, BATCHES, strict=True):
        assert loss.item() == 2 * tokens.square().sum() and gradient.item() == tokens.square().sum()


def test_a_batch_of_another_shape_goes_beside_the_graph():
    net = Net()
    short = torch.full((1, 3), 3.0)
    step, found = stepped(net, [*BATCHES[:5], short, *BATCHES[5:]])
    assert net.calls == 5 and found[5][0].item() == 2 * 27 and found[5][1].item() == 27
    assert found[6][1].item() == BATCHES[5].square().sum() and net.weight.grad.item() == BATCHES[7].square().sum()


@pytest.mark.parametrize("change", ["moved", "frozen"])
def test_a_graph_is_dropped_where_its_parameters_are_others(change):
    """And captured anew, after some calls."""
    net = Net()
    step = CapturedStep(net, [net.weight], RecordedGraphs())
    for tokens in BATCHES[:5]:
        step(tokens)
    calls = net.calls
    if change == "moved":
        net.weight.data = torch.tensor([5.0])
    else:
        net.weight.requires_grad_(False)
        net.frozen = True
    for tokens in BATCHES[:6]:
        assert step(tokens).item() == (5 if change == "moved" else 2) * tokens.square().sum()
    assert net.calls == calls + 4 and step.is_captured


def test_what_reads_back_goes_step_by_step_and_says_so_once():
    net = Net(reads_back=True)
    with pytest.warns(UserWarning, match="no CUDA graph, and waits for Python: .*reads back") as warned:
        step, found = stepped(net, BATCHES)
    assert len(warned) == 1 and not step.is_captured
    assert [loss.item() for loss, _ in found] == [2 * tokens.square().sum().item() for tokens in BATCHES]


def test_the_stand_in_keeps_a_number_of_pythons_as_a_graph_does():
    """So that a test of equal bits fails where a step hangs on one."""
    net = Net(reads_back=None)  # the loss is multiplied with the number of the call
    _, found = stepped(net, BATCHES)
    assert found[2][0].item() == 3 * 2 * BATCHES[2].square().sum()
    assert found[6][0].item() == 4 * 2 * BATCHES[6].square().sum()  # the call that was captured


def test_masks_and_pythons_memory_are_refused_by_the_stand_in():
    graphs, mask = RecordedGraphs(), torch.tensor([True, False])
    for call in (lambda: BATCHES[0][mask], lambda: BATCHES[0] + torch.tensor(3.0), lambda: mask.nonzero()):
        with pytest.raises(RuntimeError, match=r"reads back|Python's memory"):
            graphs.capture(call)
