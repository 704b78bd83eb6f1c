"""Torch's generators of a run; GPUs' are stood in for by the CPU's kind."""

import contextlib

import pytest
import torch

from uniad_fast.training import generators

CPU, FIRST, SECOND = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs' generators, by index; the current GPU is the first, or that of an inner `torch.cuda.device`."""
    found, current = [torch.Generator().manual_seed(7 + i) for i in range(2)], [0]

    @contextlib.contextmanager
    def inside(device):
        current.append(device.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", inside)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: found[device.index].get_state())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: found[device.index].set_state(state))
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda seed: found[current[-1]].manual_seed(seed))
    return found


def draw(generator=None):
    return torch.rand(3, generator=generator).tolist()


def test_a_state_that_one_process_saved_serves_another_on_its_own_gpu(gpus):
    draw(gpus[0])
    saved = generators.states(FIRST)
    expected, other = (draw(), draw(gpus[0])), gpus[0].get_state()
    generators.restore(saved, SECOND)
    assert (draw(), draw(gpus[1])) == expected
    assert torch.equal(gpus[0].get_state(), other), "another process's GPU was touched"


@pytest.mark.parametrize("device", [CPU, FIRST, SECOND], ids=str)
def test_what_is_seeded_is_the_runs_alone_and_given_back(device, gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("all GPUs were seeded"))
    before = [torch.get_rng_state(), *(gpu.get_state() for gpu in gpus)]
    with generators.seeded_generators(3, device):
        of_cpu, of_gpus = draw(), [draw(gpu) for i, gpu in enumerate(gpus) if device.index == i]
        drawn = draw(torch.Generator().manual_seed(3))
        assert of_cpu == drawn and of_gpus == [drawn] * (device.type == "cuda")
    after = [torch.get_rng_state(), *(gpu.get_state() for gpu in gpus)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_states_of_a_cpu_do_not_serve_a_gpu(gpus):
    assert generators.states(CPU).keys() == {"cpu"}
    with pytest.raises(KeyError, match="cuda"):
        generators.restore(generators.states(CPU), FIRST)
