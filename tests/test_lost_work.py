"""Nothing is lost for one bad image, a signal, a second process or a place that can't be written to."""

import csv
import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUICK, save, striped_picture
from PIL import Image
from typer.testing import CliRunner

from uniad_fast import files, signals
from uniad_fast.cli.main import app
from uniad_fast.data.image_batches import read_batches
from uniad_fast.detect import results as report
from uniad_fast.files import atomic_directory, atomic_path, locked, sweep


def call(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


@pytest.fixture(scope="module")
def options(backbone_weights, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return [*QUICK, "--backbone-weights", backbone_weights, "--epochs", 3, "--cache", cache, "-q"]


@pytest.fixture(scope="module")
def bundle(made_up_classes, options, tmp_path_factory):
    target = tmp_path_factory.mktemp("lost") / "bundle"
    call("train", made_up_classes, "-o", target, *options)
    return target


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for index in range(4):
        save(striped_picture(rng, index, False)[0], tmp_path / "photos" / f"{index}.png")
    return tmp_path / "photos"


def rows(output):
    with open(output / "scores.csv", newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (output / "scores.jsonl").read_text().splitlines()]
    assert len(table) == len(lines)
    return lines


# --- training -------------------------------------------------------------------------------------------------------


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
from uniad_fast import cli, features, training

batch, tokens = training._batch, features.tokens_of
training._batch = lambda *args: (time.sleep(0.2), print("step", flush=True), batch(*args))[2]
features.tokens_of = lambda *args: (time.sleep({extraction}), print("batch", flush=True), tokens(*args))[2]
features.read_batches.__defaults__ = (4, None)
cli.app(sys.argv[1:])
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
    (note,) = (tmp_path / "cache").glob("*.partial.json")
    assert json.loads(note.read_text())["done"] >= 4


def test_a_second_signal_acts_at_once():
    with signals.noted():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert signals.asked_to_stop() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        with pytest.raises(signals.Stopped, match="stopped by SIGTERM"):
            signals.stop_if_asked()
    assert not signals.asked_to_stop()


# --- scoring --------------------------------------------------------------------------------------------------------


def test_odd_names_cost_nothing(bundle, photos, tmp_path):
    odd = [
        "\udcff\udcfe.png",
        "x" * 240 + ".png",
        "new\nline.png",
        "\x1b[31mred.png",
        "=cmd|' .png",
        "a.b.png",
        "-rf.png",
    ]
    for name in odd:
        shutil.copy(photos / "0.png", photos / name)
    output = call("score", bundle, photos, "-o", tmp_path / "o", "--threshold", 1e9, "-q")
    found = rows(tmp_path / "o")
    assert {Path(row["image"]).name for row in found} == {*odd, *(f"{i}.png" for i in range(4))}
    assert all(Path(row["heat_map"]).is_file() for row in found)
    assert "\x1b" not in output and "new\\nline.png" in output


def test_an_image_that_goes_or_can_not_be_drawn_costs_its_own_row_alone(bundle, photos, tmp_path, monkeypatch):
    (photos / "5.png").write_text("junk")
    from uniad_fast.detect import score_files as scan

    draw, names = scan.heat_map, []

    def fail(image, *rest):
        names.append(image.size)
        if len(names) == 2:
            raise MemoryError("too large")
        return draw(image, *rest)

    monkeypatch.setattr(scan, "heat_map", fail)
    output = call("score", bundle, photos, photos / "gone.png", "-o", tmp_path / "o", "--threshold", 1e9, "-q", code=3)
    assert len(rows(tmp_path / "o")) == 4 and "not drawn: " in output
    assert output.rstrip().endswith("0 of 4 images are defective (score above 1000000000.0000); 2 could not be read")


def test_both_defects_and_unreadable_images(bundle, photos, tmp_path):
    (photos / "junk.png").write_text("junk")
    output = call("score", bundle, photos, "-o", tmp_path / "o", "--threshold", 0, "-q", code=3)
    assert output.rstrip().endswith("4 of 4 images are defective (score above 0.0000); 1 could not be read")
    assert all(row["label"] == 1 for row in rows(tmp_path / "o"))


def test_nothing_readable_is_an_error(bundle, tmp_path):
    output = call("score", bundle, tmp_path / "typo.png", "-o", tmp_path / "o", code=2)
    assert "none of 1 images could be read" in output and "defective" not in output


def test_a_full_disk_leaves_whole_rows(tmp_path, monkeypatch):
    row = dict(zip(report.SCORE_FIELDS, ("a.png", 1.0, 0, 2.0, None), strict=True))
    with pytest.raises(OSError, match="No space"), report.ScoreFiles(tmp_path) as out:
        out.add(row)
        wrapped = out._files[1]

        class Full:
            tell, truncate, fileno = wrapped.tell, wrapped.truncate, wrapped.fileno

            @staticmethod
            def write(content):
                return wrapped.write(content[: len(content) // 2])

        out._files[1] = Full()
        out.add(row)
    assert (tmp_path / "scores.jsonl").read_text() == json.dumps(row) + "\n"
    assert (tmp_path / "scores.csv").read_text().count("\n") == 3


def test_the_output_is_not_scored(bundle, photos):
    for _ in range(2):
        output = call("score", bundle, photos, "-o", photos / "out", "--threshold", 1e9, "-q")
        assert "0 of 4 images" in output


def test_names_of_heat_maps(bundle, photos, tmp_path):
    for name in ("0.jpg", "a.png/x.png"):
        (photos / name).parent.mkdir(exist_ok=True)
        Image.open(photos / "0.png").save(photos / name)
    Image.open(photos / "0.png").save(photos / "a.jpg")  # whose heat map would be called like the folder
    output = call("score", bundle, photos, "-o", tmp_path / "o", "--threshold", 1e9, "-q", code=3)
    drawn = {
        row["heat_map"] and str(Path(row["heat_map"]).relative_to(tmp_path / "o/heatmaps"))
        for row in rows(tmp_path / "o")
    }
    assert {"0.png", "0-2.png", "1.png"} <= drawn and len(rows(tmp_path / "o")) == 7 and "not drawn: " in output


def test_a_reader_that_leaves_costs_nothing(bundle, photos, tmp_path):
    code = "import sys; from uniad_fast.cli.main import app; app(sys.argv[1:])"
    arguments = ["score", bundle, photos, "-o", tmp_path / "o", "--threshold", "1e9", "-q"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    process.wait(120)
    assert len(rows(tmp_path / "o")) == 4, process.stderr.read()


@pytest.mark.parametrize("command", ["score", "eval"])
def test_a_file_where_results_should_go_is_told_before_the_work(command, bundle, photos, tmp_path):
    (tmp_path / "file").touch()
    output = call(command, bundle, photos, "-o", tmp_path / "file/o", code=2)
    assert "is a file, and results need a folder" in output


def test_reconstructions_of_one_name(bundle, made_up_classes, tmp_path):
    root = tmp_path / "d"
    shutil.copytree(made_up_classes / "class0", root / "class0")
    for part in ("x", "y"):
        target = root / "class0/test/good" / part / "img"
        target.mkdir(parents=True)
        shutil.copy(root / "class0/test/good/000.png", target / "000.png")
    call("eval", bundle, root, "--save-reconstructions", tmp_path / "rec", "-q")
    assert len(list((tmp_path / "rec/class0/img").iterdir())) == 2


# --- files ----------------------------------------------------------------------------------------------------------


def _write_and_die(target):
    with atomic_path(target) as path:
        path.write_text("half")
        os._exit(9)


def test_what_killed_processes_left_is_swept_and_what_living_ones_write_is_not(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_write_and_die, args=(tmp_path / "x.txt",))
    process.start()
    process.join()
    assert len(list(tmp_path.iterdir())) == 1
    with atomic_path(tmp_path / "x.txt") as mine:
        mine.write_text("being written")
        assert [p for p in tmp_path.iterdir()] == [mine]
        sweep(tmp_path / "x.txt")
        assert mine.exists()
    (tmp_path / ".x.txt.notours.partial").touch()
    sweep(tmp_path / "x.txt")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".x.txt.notours.partial", "x.txt"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_replaced_whole(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(files, "_exchanged", lambda *_: False)
    for content in ("first", "second"):
        with atomic_directory(tmp_path / "d") as partial:
            (partial / "file").write_text(content)
        assert (tmp_path / "d/file").read_text() == content and len(list(tmp_path.iterdir())) == 1
    rename = Path.rename
    if not exchange:
        monkeypatch.setattr(
            Path,
            "rename",
            lambda s, t: (
                (_ for _ in ()).throw(OSError(errno.EIO, "no")) if s.name.endswith("partial") else rename(s, t)
            ),
        )
        with pytest.raises(OSError, match="no"), atomic_directory(tmp_path / "d") as partial:
            (partial / "file").write_text("third")
        assert (tmp_path / "d/file").read_text() == "second" and len(list(tmp_path.iterdir())) == 1


def test_files_have_the_mode_of_other_files(bundle, tmp_path):
    (tmp_path / "other").touch()
    modes = {p.stat().st_mode & 0o777 for p in (*bundle.iterdir(), tmp_path / "other")}
    assert len(modes) == 1


def test_images_that_failed_for_a_passing_reason_are_tried_again(backbone_weights, photos, tmp_path, monkeypatch):
    from uniad_fast.data.feature_cache import cached_features
    from uniad_fast.data.samples import image_batches
    from uniad_fast.models.backbone import Backbone

    backbone = Backbone.pretrained("resnet10t", 64, backbone_weights)
    paths, read = sorted(photos.iterdir()), image_batches.read_bytes
    fresh = np.array(cached_features(backbone, 64, paths, tmp_path / "other", quiet=True).tokens)

    def hiccup(path):
        if Path(path) == paths[1]:
            error = image_batches.UnreadableImage(f"{path}: Too many open files")
            error.passing = True
            raise error
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(image_batches, "read_bytes", hiccup)
        assert cached_features(backbone, 64, paths, tmp_path / "c", quiet=True).used == [0, 2, 3]
    with pytest.warns(UserWarning, match="for a reason that may have passed: extracting again"):
        assert cached_features(backbone, 64, paths, tmp_path / "c", quiet=True).used == [0, 1, 2, 3]

    def changing(path):
        content = read(path)
        return content + b"x" if Path(path) == paths[2] else content

    with monkeypatch.context() as patch:
        patch.setattr(image_batches, "read_bytes", changing)
        found = cached_features(backbone, 64, paths, tmp_path / "d", quiet=True)
        assert found.used == [0, 1, 3] and "changed while it was being read" in found.unreadable[0]
    with pytest.warns(UserWarning, match="extracting again"):
        np.testing.assert_array_equal(cached_features(backbone, 64, paths, tmp_path / "d", quiet=True).tokens, fresh)


def test_a_cache_names_the_files_of_this_run(backbone_weights, photos, tmp_path):
    from uniad_fast.data.feature_cache import cached_features
    from uniad_fast.models.backbone import Backbone

    backbone = Backbone.pretrained("resnet10t", 64, backbone_weights)
    (photos / "4.png").write_text("junk")
    shutil.copytree(photos, tmp_path / "moved")
    for folder in (photos, tmp_path / "moved"):
        (message,) = cached_features(backbone, 64, sorted(folder.iterdir()), tmp_path / "c", quiet=True).unreadable
        assert message.startswith(str(folder / "4.png"))


def test_a_cache_without_a_place_says_what_to_do(made_up_classes, options, tmp_path):
    (tmp_path / "file").touch()
    output = call(
        "train", made_up_classes, "-o", tmp_path / "b", *options[:-3], "--cache", tmp_path / "file/c", "-q", code=2
    )
    assert "can't be used to keep features" in output and "--cache" in output


def test_reading_ahead_stops_with_its_reader(photos):
    batches = read_batches(sorted(photos.iterdir()), 32, 1)
    assert next(batches).images.shape == (1, 3, 32, 32)
    batches.close()
    assert torch.get_num_threads() > 0
