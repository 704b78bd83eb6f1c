"""The command line, as a person would use it, on five made-up classes."""

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import QUICK, call
from PIL import Image

from uniad_fast.data.image_files import list_images


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def train_options(backbone_weights, cache):
    return [*QUICK, "--backbone-weights", backbone_weights, "--epochs", 6, "--cache", cache, "--quiet"]


@pytest.fixture(scope="module")
def trained(made_up_classes, train_options, tmp_path_factory):
    bundle = tmp_path_factory.mktemp("cli") / "bundle"
    output = call("train", made_up_classes, "-o", bundle, *train_options)
    return bundle, output


def test_train_says_what_it_did(trained, made_up_classes):
    bundle, output = trained
    assert "stripes: 40 good images of 5 classes" in output
    assert f"wrote {bundle}; threshold" in output and "from 40 of them: 1.0% false alarms" in output
    assert "too few to show it: estimated from how their scores thin out" in output
    assert "classes are recognized: of 40 good images, held out in turns," in output
    assert f"uniad-fast eval {bundle} {made_up_classes}" in output
    assert not bundle.with_name("bundle.training").exists()


def test_eval(trained, made_up_classes, tmp_path):
    output = call("eval", trained[0], made_up_classes, "-o", tmp_path, "--save-reconstructions", tmp_path / "rec", "-q")
    _, table = re.split(r"(?=^class +image)", output, flags=re.M)
    header, _, *rows = table.splitlines()
    assert re.split(r"\s{2,}", header) == [
        "class", "image auroc", "image ap", "image f1 max", "pixel auroc", "pixel ap", "pixel f1 max", "pixel aupro"
    ]  # fmt: skip
    assert [row.split()[0] for row in rows[:6]] == [f"class{i}" for i in range(5)] + ["mean"]
    content = json.loads((tmp_path / "metrics.json").read_text())
    assert content["mean"]["image_auroc"] > 0.8 and content["images"] == 40 and content["unreadable"] == []
    with open(tmp_path / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert float(table[-1]["pixel_aupro"]) == pytest.approx(content["mean"]["pixel_aupro"])
    with open(tmp_path / "scores.csv", newline="") as file:
        assert sum(row["kind"] == "square" for row in csv.DictReader(file)) == 20
    assert np.load(tmp_path / "rec/class0/good/000.npy").shape[1:] == (4, 4)


def test_eval_says_what_is_not_defined(trained, made_up_classes, tmp_path):
    root = tmp_path / "stripes"
    shutil.copytree(made_up_classes, root)
    shutil.rmtree(root / "class0/ground_truth")
    shutil.rmtree(root / "class1/test/square")
    (root / "class2/test/good/000.png").write_text("no image")
    (root / "class3/ground_truth/square/000_mask.png").write_text("no image")
    output = call("eval", trained[0], root, "-q", code=3)
    assert "class0: pixel metrics: 4 of 4 defective images have no mask" in output
    assert "class1: image metrics: every image is good" in output
    assert "not defined" in output
    assert re.search(r"left out: .*class2/test/good/000\.png", output)
    assert re.search(r"left out: .*class3/ground_truth/square/000_mask\.png", output)


def test_score_writes_everything_and_exits_one_for_a_defect(trained, made_up_classes, tmp_path):
    folder = made_up_classes / "class2/test"
    output = call("score", trained[0], folder, "-o", tmp_path, "--threshold", -1e9, "-q", code=1)
    assert "8 of 8 images are defective (score above -1000000000.0000)" in output
    with open(tmp_path / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [row["image"] for row in rows] == [line["image"] for line in lines] == [str(p) for p in list_images(folder)]
    assert all(line["label"] == 1 and line["threshold"] == -1e9 for line in lines)
    for line in lines:
        with Image.open(line["heat_map"]) as picture, Image.open(line["image"]) as image:
            assert picture.height > image.height and picture.width > 2 * image.width and picture.format == "PNG"
    assert [int(row["regions"]) for row in rows] == [len(line["regions"]) for line in lines]
    defective, good = (np.mean([r["score"] for r in lines if kind in r["image"]]) for kind in ("square", "good"))
    assert defective > good


def test_score_exits_zero_when_all_is_good_and_three_for_an_unreadable_image(trained, made_up_classes, tmp_path):
    images = list_images(made_up_classes / "class2/test")
    output = call("score", trained[0], *images, "-o", tmp_path, "--threshold", 1e9, "--no-heat-maps", "-q")
    assert "0 of 8 images are defective" in output and not (tmp_path / "heatmaps").exists()
    bad = tmp_path / "bad.png"
    bad.write_text("no image")
    files = [bad, images[0], images[4]]
    output = call("score", trained[0], *files, "-o", tmp_path / "o", "--threshold", 1e9, "-q", code=3)
    assert re.search(r"left out: .*bad\.png", output) and "0 of 2 images" in output
    assert sorted(p.name for p in (tmp_path / "o/heatmaps").iterdir()) == ["000-2.png", "000.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "{tmp}/none", "-o", "{tmp}/b"], "neither a folder nor a file"),
        (["train", "{tmp}", "-o", "{tmp}/b"], "no images in"),
        (["train", "{data}", "-o", "{tmp}"], "other content"),
        (["train", "{data}", "-o", "{tmp}/b", "--backbone-weights", "{tmp}/w.pth"], "no weight file at"),
        (["train", "{data}", "-o", "{tmp}/b", "--held-out", "2"], "held_out must be in (0, 1), got 2"),
        (["eval", "{tmp}", "{data}"], "is not a bundle: it has no config.json"),
        (["score", "{bundle}", "{tmp}/x.png", "-o", "{tmp}/o"], "x.png"),
        (["score", "{bundle}", "{tmp}/empty", "-o", "{tmp}/o"], "no images in"),
    ],
)
def test_errors_are_one_message_and_exit_two(trained, made_up_classes, tmp_path, arguments, message):
    (tmp_path / "note.txt").touch()
    (tmp_path / "empty").mkdir()
    filled = [a.format(tmp=tmp_path, data=made_up_classes, bundle=trained[0]) for a in arguments]
    output = call(*filled, code=2)
    assert message in output and "Traceback" not in output


def test_killed_training_goes_on_with_resume(trained, made_up_classes, train_options, tmp_path):
    """SIGKILL in mid-training; then the same command with --resume ends in the same tensors as an unbroken run."""
    bundle = tmp_path / "bundle"
    code = """
import sys, time
from uniad_fast.cli.main import app
from uniad_fast.detect.detector import AnomalyDetector
from uniad_fast.training.batches import Batches

at = Batches.at
Batches.at = lambda *args: (time.sleep(0.3), at(*args))[1]
AnomalyDetector.fit.__kwdefaults__["checkpoint_seconds"] = 0.0
app(sys.argv[1:])
"""
    command = ["train", made_up_classes, "-o", bundle, *train_options]
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, command)])
    checkpoint = tmp_path / "bundle.training/checkpoint.pt"
    for _ in range(600):
        if checkpoint.exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.exists() and not bundle.exists()
    assert "--resume" in call(*command, code=2)  # neither forgotten nor thrown away
    call(*command, "--resume")
    hashes = [json.loads((b / "config.json").read_text())["sha256"] for b in (bundle, trained[0])]
    assert hashes[0] == hashes[1]


def test_demo(tmp_path, cache):
    """A minute of the demo: real photographs, few of them, one epoch."""
    options = ["--images-per-class", 8, "--epochs", 1, "--cache", cache, "-q"]
    output = call("demo", "-o", tmp_path, *options)
    assert re.search(r"^mono +\d\.\d{3}", output, re.M) and re.search(r"^mean +\d\.\d{3}", output, re.M)
    drawn = {path.name for path in (tmp_path / "pictures").glob("*/*.png")}
    assert drawn and drawn <= {f"{kind}-{n}.png" for kind in ("hit", "miss", "false-alarm") for n in (1, 2, 3)}
    assert "at the threshold" in output and "found, " in output
    files = {"metrics.csv", "metrics.json", "decisions.csv", "scores.csv"}
    assert {p.name for p in tmp_path.iterdir()} == {"bundle", "pictures", "report.html", *files}
    call("demo", "-o", tmp_path, *options)  # once more over the old one


def test_doctor():
    output = call("doctor")
    for part in (
        "torch ",
        "impl reference: runs, agrees",
        "impl torch: runs, agrees",
        "impl cpu: runs, agrees",
        "extra [demo]:",
        "cpu: ",
    ):
        assert part in output


@pytest.mark.parametrize("command", ["train", "eval", "score", "calibrate", "demo", "doctor"])
def test_help(command):
    assert "Usage" in call(command, "--help")
