"""The loop: it learns, it logs, and killed at any moment it goes on to the same weights."""

import csv
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from uniad_fast.models.architecture import Architecture
from uniad_fast.training.build import build_model
from uniad_fast.training.loop import optimization, train
from uniad_fast.training.recipes import FAST, PAPER
from uniad_fast.training.reconstruction_loss import ReconstructionLoss, channel_statistics
from uniad_fast.training.run_files import ResumeError, RunFiles

TOKENS = np.random.default_rng(0).normal(2, 3, (12, 16, 6)).astype(np.float32)
SMALL = Architecture(hidden_dim=32, nhead=4, num_encoder_layers=1, num_decoder_layers=2, dim_feedforward=64)
RECIPE = replace(FAST, epochs=4, min_steps=0, batch_size=5, precision="float32", dropout=0.1)


def run(directory, recipe=RECIPE, seed=0, tokens=TOKENS, **options):
    torch.manual_seed(seed)
    model = build_model(6, 16, (4, 4), recipe, architecture=SMALL)
    fit(model, tokens, recipe, seed, directory, **options)
    return model


def fit(model, tokens, recipe, seed, directory, resume=False, checkpoint_seconds=60.0, events=None, **options):
    criterion = ReconstructionLoss(
        model, *channel_statistics(tokens), optimization.loss(recipe), precision=recipe.precision
    )
    files = RunFiles(directory, {}, resume, checkpoint_seconds, events, quiet=True)
    return train(criterion, tokens, recipe, seed, files, **options)


def rows(directory):
    with open(directory / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_it_learns_and_logs(tmp_path):
    recipe = replace(RECIPE, epochs=40, dropout=0.0, jitter_scale=0.0)
    model = run(tmp_path, recipe)
    log = rows(tmp_path)
    assert [int(row["step"]) for row in log] == list(range(80))  # 12 images make two full batches of 5
    losses = [float(row["loss"]) for row in log]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert not model.training


def test_the_same_seed_gives_the_same_weights_and_leaves_the_users_generator_alone(tmp_path):
    first = run(tmp_path / "a").state_dict()
    torch.manual_seed(77)
    expected = torch.rand(3)
    torch.manual_seed(77)
    model = build_model(6, 16, (4, 4), RECIPE, architecture=SMALL)
    torch.manual_seed(77)
    fit(model, TOKENS, RECIPE, 0, tmp_path / "c")
    assert torch.equal(torch.rand(3), expected)
    second = run(tmp_path / "b").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = run(tmp_path / "d", seed=1).state_dict()
    assert not all(torch.equal(first[name], other[name]) for name in first)


KILLED = """
    import os, signal, sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    import test_loop
    from uniad_fast.training import batches, loop

    save = loop.Checkpoint.save
    def save_and_count(checkpoint, step):
        save(checkpoint, step)
        print(step, flush=True)
    loop.Checkpoint.save = save_and_count
    at = batches.Batches.at
    def slowly(*args):
        import time; time.sleep(0.05)
        return at(*args)
    batches.Batches.at = slowly
    test_loop.run(Path({directory!r}), test_loop.LONG, checkpoint_seconds=0.2, resume={resume})
"""
LONG = replace(RECIPE, epochs=20)


@pytest.mark.parametrize("kills", [2])
def test_sigkill_at_any_moment_loses_at_most_an_interval(tmp_path, kills):
    unbroken = run(tmp_path / "unbroken", LONG).state_dict()
    directory = tmp_path / "killed"
    for number in range(kills):
        code = textwrap.dedent(KILLED).format(
            tests=os.path.dirname(__file__), directory=str(directory), resume=number > 0
        )
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()  # one checkpoint is there
        time.sleep(np.random.default_rng(number).uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (directory / "checkpoint.pt").exists()
    resumed = run(directory, LONG, resume=True).state_dict()
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)
    log, expected = rows(directory), rows(tmp_path / "unbroken")
    assert [(r["step"], r["loss"]) for r in log] == [(r["step"], r["loss"]) for r in expected]


def test_resume_before_the_first_checkpoint_starts(tmp_path):
    resumed, plain = run(tmp_path / "a", resume=True).state_dict(), run(tmp_path / "b").state_dict()
    assert all(torch.equal(resumed[name], plain[name]) for name in plain)


def test_a_checkpoint_of_another_run_or_a_damaged_one_is_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(ResumeError, match="another run .*recipe"):
        run(tmp_path, replace(RECIPE, epochs=5), resume=True)
    with pytest.raises(ResumeError, match="images: was 12, is 11"):
        run(tmp_path, tokens=TOKENS[:11], resume=True)
    (tmp_path / "checkpoint.pt").write_bytes(b"half a file")
    with pytest.raises(ResumeError, match="not a checkpoint that can be read"):
        run(tmp_path, resume=True)


def test_a_small_set_is_passed_over_until_it_made_enough_steps(tmp_path):
    run(tmp_path, replace(RECIPE, min_steps=11))
    assert len(rows(tmp_path)) == 12  # six epochs of two batches
    assert RECIPE.with_epochs(7).epochs == 7 and FAST.with_epochs(1).min_steps == 0 and FAST.with_epochs(None) is FAST


def test_fewer_images_than_a_batch(tmp_path):
    run(tmp_path, tokens=TOKENS[:2])
    assert len(rows(tmp_path)) == 4


def test_channel_statistics():
    mean, std = channel_statistics(np.concatenate([TOKENS, np.full_like(TOKENS, 5)], axis=-1))
    flat = TOKENS.reshape(-1, 6)
    np.testing.assert_allclose(mean[:6], flat.mean(0), rtol=1e-4)
    np.testing.assert_allclose(std[:6], flat.std(0), rtol=1e-4)
    assert (mean[6:] == 5).all() and (std[6:] == 1).all()  # a constant channel is not blown up


def test_the_papers_recipe():
    assert (PAPER.learning_rate, PAPER.weight_decay, PAPER.clip, PAPER.batch_size) == (1e-4, 1e-4, 0.1, 8)
    assert (PAPER.dropout, PAPER.jitter_scale, PAPER.jitter_prob, PAPER.epochs) == (0.1, 20, 1, 1000)


def test_the_papers_schedule_falls_at_four_fifths(tmp_path):
    run(tmp_path, replace(PAPER, epochs=5, batch_size=6))
    rates = [float(row["learning_rate"]) for row in rows(tmp_path)]
    assert rates == pytest.approx([1e-4] * 8 + [1e-5] * 2)


def test_after_each_epoch_the_model_is_evaluated_and_the_clock_stands(tmp_path):
    seen = []
    torch.manual_seed(0)
    model = build_model(6, 16, (4, 4), RECIPE, architecture=SMALL)

    def look(epoch):
        assert not model.training
        seen.append(epoch)
        time.sleep(0.2)

    started = time.monotonic()
    fit(model, TOKENS, RECIPE, 0, tmp_path, after_epoch=look)
    assert seen == [1, 2, 3, 4]
    assert float(rows(tmp_path)[-1]["seconds"]) <= time.monotonic() - started - 3 * 0.2  # the last row is of before 4
    plain = run(tmp_path / "plain")
    for (name, looked), unwatched in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(looked, unwatched), name


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_learns_and_resumes(tmp_path):
    recipe = replace(RECIPE, optimizer="muon", epochs=20, dropout=0.0, jitter_scale=0.0)
    model = run(tmp_path / "unbroken", recipe)
    losses = [float(row["loss"]) for row in rows(tmp_path / "unbroken")]
    assert losses[-1] < 0.7 * losses[0]
    found = optimization.optimizers(model, recipe)
    groups = [{id(p) for group in optimizer.param_groups for p in group["params"]} for optimizer in found]
    assert not groups[0] & groups[1] and groups[0] | groups[1] == {id(p) for p in model.parameters()}

    def stop(epoch):
        if epoch == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", recipe, checkpoint_seconds=0.0, after_epoch=stop)
    resumed = run(tmp_path / "broken", recipe, resume=True)
    for mine, other in zip(resumed.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_the_optimizer_is_the_same_everywhere(monkeypatch):
    """What trains a detector must not depend on the processor: only the precision is left to it."""
    assert FAST.optimizer == "adamw"
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    optimization.check_optimizer(FAST)
    with pytest.raises(ValueError, match=r"needs torch 2\.9"):
        optimization.check_optimizer(replace(RECIPE, optimizer="muon"))


@pytest.mark.parametrize(("change", "message"), [({"optimizer": "sgd"}, "'sgd'"), ({"loss": "huber"}, "'huber'")])
def test_what_a_recipe_does_not_know_is_named(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, replace(RECIPE, **change))
    run(tmp_path, replace(RECIPE, loss="l1"))


def test_a_constant_rate_and_an_unknown_schedule(tmp_path):
    run(tmp_path, replace(RECIPE, schedule="constant", warmup=0.0))
    assert {float(row["learning_rate"]) for row in rows(tmp_path)} == {RECIPE.learning_rate}
    run(tmp_path, replace(RECIPE, schedule="constant", warmup=0.5))
    rates = [float(row["learning_rate"]) / RECIPE.learning_rate for row in rows(tmp_path)]
    assert rates == pytest.approx([0.25, 0.4375, 0.625, 0.8125, 1, 1, 1, 1])
    with pytest.raises(ValueError, match="got 'cosine'"):
        run(tmp_path, replace(RECIPE, schedule="cosine"))


PATIENT = replace(RECIPE, epochs=30, schedule="constant", patience=2)


def test_patience_ends_training_when_unseen_images_are_no_longer_reconstructed_better(tmp_path):
    watched = []
    torch.manual_seed(0)
    model = build_model(6, 16, (4, 4), PATIENT, architecture=SMALL)
    mean, std = channel_statistics(TOKENS[:9])

    def look(epoch):
        target = (torch.from_numpy(TOKENS[9:]) - mean) / std
        with torch.no_grad():
            watched.append(torch.nn.functional.mse_loss(model.reconstruct(target), target).item())

    epochs = fit(model, TOKENS[:9], PATIENT, 0, tmp_path, after_epoch=look, validation=TOKENS[9:])
    assert epochs == len(watched) < 30
    since = epochs - 1
    lowest = float("inf")
    for epoch, loss in enumerate(watched):
        if loss < 0.99 * lowest:
            lowest, since = loss, epoch
    assert since == epochs - 3  # two epochs without a new lowest


def test_a_patient_run_resumes_and_stays_ended(tmp_path):
    unbroken = run(tmp_path / "unbroken", PATIENT, validation=TOKENS)

    def stop(epoch):
        if epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", PATIENT, checkpoint_seconds=0.0, after_epoch=stop, validation=TOKENS)
    for _ in range(2):  # the second time there is nothing left to do
        resumed = run(tmp_path / "broken", PATIENT, resume=True, validation=TOKENS)
        assert rows(tmp_path / "broken")[-1]["step"] == rows(tmp_path / "unbroken")[-1]["step"]
        for mine, other in zip(resumed.parameters(), unbroken.parameters(), strict=True):
            assert torch.equal(mine, other)


def test_patience_needs_something_to_watch(tmp_path):
    with pytest.raises(ValueError, match="patience 2 needs held-out good images"):
        run(tmp_path, PATIENT)


def test_events_say_what_the_log_says(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plain = run(tmp_path / "a", validation=TOKENS[:4])
    told = run(tmp_path / "b", validation=TOKENS[:4], events=tmp_path / "events")
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), told.parameters(), strict=True))
    found, log = EventAccumulator(str(tmp_path / "events")).Reload(), rows(tmp_path / "b")
    assert len(log) == 8
    for column in ("loss", "learning_rate", "gradient_norm", "seconds"):
        values = found.Scalars(f"training/{column}")
        assert [value.step for value in values] == list(range(8))
        for value, row in zip(values, log, strict=True):
            assert value.value == pytest.approx(float(row[column]), rel=1e-4, abs=0.006)
    assert [value.step for value in found.Scalars("held-out loss")] == [2, 4, 6, 8]
