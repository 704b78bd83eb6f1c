"""Several processes train one network: as one would, and through the death of any of them."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import call, run_command
from trained_together import RECIPE, SMALL, TOKENS, main

from uniad_fast.detect.detector import AnomalyDetector
from uniad_fast.errors import UniadFastError
from uniad_fast.training.batches import Batch
from uniad_fast.training.loop import _Run, train
from uniad_fast.training.processes import ALONE, ProcessError, Processes, started_as
from uniad_fast.training.reconstruction_loss import ReconstructionLoss
from uniad_fast.training.run_files import RunFiles

SCRIPT = Path(__file__).with_name("trained_together.py")
COMMANDS = Path(__file__).with_name("commands_together.py")
KILLS = int(os.environ.get("UNIAD_FAST_KILLS", "1"))
STEPS = 36


def torchrun(*arguments, **options):
    """A torchrun that has been started."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finished(process, code=0):
    output, _ = process.communicate(timeout=240)
    assert process.returncode == code, output
    return output


def trained(folder, count, *options, seconds=0.0):
    folder.mkdir(exist_ok=True)
    started = torchrun("--standalone", "--nproc-per-node", count, *options, SCRIPT, folder, seconds)
    finished(started)
    return torch.load(folder / "weights.pt", weights_only=True)


def losses(folder):
    with open(folder / "log.csv", newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    """(folder, weights) of an unbroken training by two processes."""
    folder = tmp_path_factory.mktemp("two")
    return folder, trained(folder, 2)


def without_key_bias(state):
    """A key's bias moves all scores of a query alike, so its gradient is rounding, which Adam makes whole steps of."""
    width = SMALL.hidden_dim
    return {
        name: torch.cat([tensor[:width], tensor[2 * width :]]) if name.endswith("in_proj_bias") else tensor
        for name, tensor in state.items()
    }


def test_two_and_three_processes_learn_what_one_learns(by_two, tmp_path):
    by_three = trained(tmp_path, 3)
    alone, folder = tmp_path / "alone", tmp_path / "alone"
    folder.mkdir()
    main(folder, 0.0)
    assert len(losses(alone)) == STEPS
    weights_alone = without_key_bias(torch.load(alone / "weights.pt", weights_only=True))
    for folder, weights in (by_two, (tmp_path, by_three)):
        np.testing.assert_allclose(losses(folder), losses(alone), rtol=2e-5)
        for name, tensor in without_key_bias(weights).items():
            difference = (tensor - weights_alone[name]).abs() - 1e-5 * weights_alone[name].abs()
            assert difference.max() < 2e-6, (name, difference.max())


def test_a_process_that_is_killed_again_and_again_costs_nothing(by_two, tmp_path):
    draw = np.random.default_rng(KILLS)
    options = ["--standalone", "--nproc-per-node", 2, "--max-restarts", KILLS, "--monitor-interval", 0.2]
    started = torchrun(*options, SCRIPT, tmp_path, 0.05)
    gone, kills = set(), 0
    while kills < KILLS and started.poll() is None:
        time.sleep(float(draw.uniform(0.2, 1.5)))
        pids = [int(file.read_text() or 0) for file in sorted(tmp_path.glob("rank*.pid"))]
        if len(pids) == 2 and all(pids) and not gone & {*pids} and (tmp_path / "checkpoint.pt").exists():
            os.kill(pids[draw.integers(2)], signal.SIGKILL)
            gone, kills = gone | set(pids), kills + 1
            began = time.monotonic()
            while any(map(_lives, pids)):
                assert time.monotonic() - began < 60, "the other process outlived it by a minute"
                time.sleep(0.05)
    output = finished(started)
    assert kills == KILLS, output
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert all(torch.equal(tensor, by_two[1][name]) for name, tensor in weights.items())
    assert losses(tmp_path) == losses(by_two[0])


def _lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_signal_ends_all_of_them_with_a_checkpoint_and_two_nodes_go_on(by_two, tmp_path):
    started = torchrun("--standalone", "--nproc-per-node", 2, SCRIPT, tmp_path, 0.2)
    while not (tmp_path / "checkpoint.pt").exists():
        time.sleep(0.1)
        assert started.poll() is None
    started.send_signal(signal.SIGTERM)
    started.communicate(timeout=60)
    assert started.returncode != 0 and not (tmp_path / "weights.pt").exists()
    port = 29400 + os.getpid() % 1000
    options = ["--nnodes", 2, "--nproc-per-node", 1, "--rdzv-backend", "c10d", "--rdzv-id", "test"]
    nodes = [torchrun(*options, "--rdzv-endpoint", f"localhost:{port}", SCRIPT, tmp_path) for _ in range(2)]
    for node in nodes:
        finished(node)
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert all(torch.equal(tensor, by_two[1][name]) for name, tensor in weights.items())


def test_commands_of_two_processes_give_what_one_gives(bundle, made_up_classes, options, tmp_path):
    images, both, alone = made_up_classes / "class1/test", tmp_path / "both", tmp_path / "alone"
    commands = [
        ["train", made_up_classes, "-o", both / "bundle", *options],
        ["eval", bundle, made_up_classes, "-o", both / "eval", "-q"],
        ["score", bundle, images, "-o", both / "scores", "-q"],
    ]
    (tmp_path / "commands.json").write_text(json.dumps([list(map(str, command)) for command in commands]))
    output = finished(torchrun("--standalone", "--nproc-per-node", 2, COMMANDS, tmp_path / "commands.json"))
    assert output.count(f"wrote {both / 'eval/metrics.json'}") == 1  # one of them speaks
    call("eval", bundle, made_up_classes, "-o", alone / "eval", "-q")
    run_command("score", bundle, images, "-o", alone / "scores", "-q")
    assert (both / "eval/metrics.json").read_text() == (alone / "eval/metrics.json").read_text()
    rows = [[json.loads(line) for line in (one / "scores/scores.jsonl").open()] for one in (both, alone)]
    assert [row["image"] for row in rows[0]] == [row["image"] for row in rows[1]]
    np.testing.assert_allclose(*([row["score"] for row in part] for part in rows), rtol=1e-3)
    assert len(list((both / "scores/heatmaps").rglob("*.png"))) == len(rows[0])
    thresholds = [AnomalyDetector.load(one).calibration.threshold.value for one in (both / "bundle", bundle)]
    assert thresholds[0] == pytest.approx(thresholds[1], rel=0.05)


def test_processes_that_share_no_more_than_a_batch(tmp_path):
    criterion = ReconstructionLoss(torch.nn.Linear(1, 1), torch.zeros(24), torch.ones(24), torch.nn.MSELoss())
    with pytest.raises(UniadFastError, match="8 processes can't share batches of 7 images"):
        train(criterion, TOKENS, RECIPE, 0, RunFiles(tmp_path, {}, together=Processes(0, 8), quiet=True))


def test_variables_of_a_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_PROCID", "2")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert started_as() == (0, 1)  # an allocation, and no word of where the others are
    monkeypatch.setenv("MASTER_ADDR", "here")
    monkeypatch.setenv("MASTER_PORT", "1234")
    assert started_as() == (2, 4)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert started_as() == (1, 3)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(ProcessError, match="RANK 3"):
        started_as()
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ProcessError, match="first"):
        started_as()


@pytest.mark.parametrize(
    ("mark", "variables", "message"),
    [
        ("job", {"TORCHELASTIC_RUN_ID": "job"}, "can be read"),  # not a checkpoint, which it tries to go on from
        ("none", {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "1"}, "can be read"),
        ("another", {"TORCHELASTIC_RUN_ID": "job"}, "holds an interrupted run"),
        ("", {"TORCHELASTIC_RUN_ID": "none"}, "holds an interrupted run"),
        ("", {}, "holds an interrupted run"),
    ],
)
def test_what_torchrun_starts_again_goes_on_by_itself(
    mark, variables, message, made_up_classes, options, tmp_path, monkeypatch
):
    for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    work = tmp_path / "b.training"
    work.mkdir()
    (work / "uniad_fast training").write_text(mark)
    (work / "checkpoint.pt").write_text("junk")
    assert message in call("train", made_up_classes, "-o", tmp_path / "b", *options, code=2)


def test_alone_is_the_first_of_one():
    assert ALONE.is_first and ALONE.part == (0, 1)
    assert ALONE.gather(3) == [3] and ALONE.from_first(lambda: 4) == 4
    tensor = torch.ones(2)
    assert ALONE.sum(tensor) is tensor and Processes(1, 2).is_first is False


class Others:
    """Two processes, of which the other one has failed or not."""

    def __init__(self, has_failed):
        self.has_failed, self.told = has_failed, []

    def gather(self, found):
        self.told.append(found)
        return [found, self.has_failed]


def prepared(criterion, together):
    """A run that is about to work with others, after the step that it takes alone."""
    at_first = Batch(np.arange(2), 0, torch.ones(2, 3))
    own = dict(
        step=0, total=1, criterion=criterion, together=together, on_device=SimpleNamespace(at=lambda _: at_first)
    )
    run = object.__new__(_Run)
    vars(run).update(own)
    run._prepare_alone()


class Criterion(torch.nn.Module):
    def __init__(self, fails=False):
        super().__init__()
        self.model, self.fails = torch.nn.Linear(3, 1), fails
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, tokens):
        if self.fails:
            raise MemoryError("no room")
        return (self.model(tokens) * torch.rand(2, 1)).sum()


def test_a_first_step_alone_leaves_nothing_behind():
    criterion, state = Criterion(), torch.get_rng_state()
    prepared(criterion, Others(False))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in criterion.parameters())


def test_who_fails_in_it_tells_the_others():
    together = Others(False)
    with pytest.raises(MemoryError, match="no room"):
        prepared(Criterion(fails=True), together)
    assert together.told == [True]
    with pytest.raises(ProcessError, match="process 1 failed in its first step"):
        prepared(Criterion(), Others(True))
