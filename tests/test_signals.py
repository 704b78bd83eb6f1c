"""Signals end training and extraction at a safe place; two runs of one folder keep out of each other's way."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import call

from uniad_fast.files import locked


def test_a_folder_called_like_the_checkpoints_is_the_users(made_up_classes, options, tmp_path):
    (tmp_path / "b.training").mkdir()
    (tmp_path / "b.training/thesis.txt").write_text("years of work")
    for extra in ([], ["--restart"], ["--resume"]):
        output = call("train", made_up_classes, "-o", tmp_path / "b", *options, *extra, code=2)
        assert "holds other files (thesis.txt)" in output
    assert (tmp_path / "b.training/thesis.txt").read_text() == "years of work"


def test_a_bundle_with_other_files_in_it_is_not_replaced(bundle, made_up_classes, options, tmp_path):
    shutil.copytree(bundle, tmp_path / "b")
    (tmp_path / "b/notes.txt").write_text("mine")
    output = call("train", made_up_classes, "-o", tmp_path / "b", *options, code=2)
    assert "notes.txt" in output and (tmp_path / "b/notes.txt").exists()


def test_two_trainings_of_one_bundle(made_up_classes, options, tmp_path):
    work = tmp_path / "b.training"
    work.mkdir()
    with locked(work / "lock") as held:
        assert held
        output = call("train", made_up_classes, "-o", tmp_path / "b", *options, code=2)
    assert "another process is training" in output and work.exists()
    call("train", made_up_classes, "-o", tmp_path / "b", *options)


@pytest.mark.parametrize(("target", "message"), [("link", "is a link"), ("x" * 240, "has a name of 240 bytes")])
def test_a_place_that_can_hold_no_bundle_is_told_before_training(made_up_classes, options, tmp_path, target, message):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert message in call("train", made_up_classes, "-o", tmp_path / target, *options, code=2)


def test_a_relative_place(made_up_classes, options, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    call("train", made_up_classes, "-o", ".", *options)
    assert (tmp_path / "here/config.json").exists()


SLOW = """
import sys, time
from uniad_fast.cli.main import app
from uniad_fast.data import feature_cache, features
from uniad_fast.training.batches import Batches

at, tokens = Batches.at, features.tokens_of
Batches.at = lambda *args: (time.sleep(0.2), print("step", flush=True), at(*args))[2]
features.tokens_of = lambda *args: (time.sleep({extraction}), print("batch", flush=True), tokens(*args))[2]
feature_cache._SHARD_IMAGES = 4
app(sys.argv[1:])
"""


def start(arguments, extraction=0):
    return subprocess.Popen(
        [sys.executable, "-c", SLOW.format(extraction=extraction), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: [signal.signal(s, signal.SIG_DFL) for s in (signal.SIGINT, signal.SIGHUP)] and None,
    )  # fmt: skip


def wait_for(process, word, times=2):
    for line in process.stdout:
        times -= line.strip() == word
        if times == 0:
            return


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)
def test_training_ends_a_signal_with_a_checkpoint_and_goes_on(number, bundle, made_up_classes, options, tmp_path):
    command = ["train", made_up_classes, "-o", tmp_path / "b", *options]
    process = start(command)
    wait_for(process, "step")
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number, error
    assert f"stopped by {number.name}" in error and "--resume goes on from there" in error
    assert (tmp_path / "b.training/checkpoint.pt").exists() and not (tmp_path / "b").exists()
    call(*command, "--resume")
    hashes = [json.loads((b / "config.json").read_text())["sha256"] for b in (tmp_path / "b", bundle)]
    assert hashes[0] == hashes[1]


def test_a_signal_during_extraction_keeps_what_was_extracted(made_up_classes, options, tmp_path):
    command = ["train", made_up_classes, "-o", tmp_path / "b", *options[:-2], "-q", "--cache", tmp_path / "cache"]
    process = start(command, extraction=0.2)
    wait_for(process, "batch")
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "features that were extracted are kept" in error
    assert not (tmp_path / "b.training").exists()
    assert list((tmp_path / "cache").glob("*/000000-of-*.safetensors"))


SECOND = """
import signal
from uniad_fast import signals

taken = []
signal.signal(signal.SIGTERM, lambda number, _frame: taken.append(number))
with signals.noted():
    signal.raise_signal(signal.SIGTERM)
    assert signals.asked_to_stop() and not taken
    try:
        signals.stop_if_asked()
    except signals.Stopped as stopped:
        assert str(stopped) == "stopped by SIGTERM"
    else:
        raise AssertionError("it goes on")
    signal.raise_signal(signal.SIGTERM)
    assert taken == [signal.SIGTERM]
assert not signals.asked_to_stop()
signal.raise_signal(signal.SIGTERM)
assert taken == [signal.SIGTERM] * 2
signal.signal(signal.SIGTERM, signal.SIG_DFL)
with signals.noted():
    signal.raise_signal(signal.SIGTERM)
    print("noted", flush=True)
    signal.raise_signal(signal.SIGTERM)
    print("not ended", flush=True)
"""


def test_a_second_signal_acts_at_once():
    """What was there before takes it, Python's handler or the system's, in a process of its own: it may end that."""
    done = subprocess.run([sys.executable, "-c", SECOND], capture_output=True, text=True)
    assert done.returncode == -signal.SIGTERM and done.stdout == "noted\n", done.stderr
