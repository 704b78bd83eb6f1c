"""uniad-fast calibrate: another threshold, and nothing else of the bundle changed."""

import csv
import json
import shutil
import signal

import numpy as np
import pytest
from conftest import call
from safetensors.torch import load_file

from uniad_fast import AnomalyDetector, signals


def config_of(bundle):
    return json.loads((bundle / "config.json").read_text())


def test_the_threshold_is_that_of_the_images_given(bundle, made_up_classes, tmp_path):
    good = made_up_classes / "class1/test/good"
    output = call(
        "calibrate",
        bundle,
        good,
        "-o",
        tmp_path / "b",
        "--all-good",
        "--false-alarm-rate",
        0.3,
        "--cache",
        tmp_path,
        "-q",
    )
    before, after = config_of(bundle), config_of(tmp_path / "b")
    scores = [p.score for p in AnomalyDetector.load(bundle).predict(sorted(good.iterdir()))]
    assert len(scores) == 4 and after["calibration"]["images"] == [0, 4, 0, 0, 0, 4]
    assert after["settings"]["false_alarm_rate"] == 0.3
    assert f"it was {before['calibration']['threshold']['value']:.4f}" in output and "from 4 of them" in output
    raw = [before["calibration"]["scores"][name][1] for name in ("centers", "spreads")]
    again = [after["calibration"]["scores"][name][1] for name in ("centers", "spreads")]
    assert again[0] == pytest.approx(np.median(scores) * raw[1] + raw[0], rel=1e-3)
    assert again[1] == pytest.approx(np.subtract(*np.quantile(scores, (0.75, 0.25))) / 1.349 * raw[1], rel=1e-3)
    for config in (before, after):
        del config["calibration"], config["settings"]["false_alarm_rate"], config["config_sha256"]
    assert before == after
    first, second = (load_file(b / "model.safetensors") for b in (bundle, tmp_path / "b"))
    assert first.keys() == second.keys() and all((first[n] == second[n]).all() for n in first)
    assert (tmp_path / "b/training.csv").read_text() == (bundle / "training.csv").read_text()


def test_in_place_and_what_can_not_be_done(bundle, made_up_classes, tmp_path):
    learnt_from = made_up_classes / "class0/train/good"
    output = call("calibrate", bundle, learnt_from, "-o", tmp_path / "b", "--cache", tmp_path, "-q", code=2)
    assert "the detector has learnt from 8 of these 8 images" in output and not (tmp_path / "b").exists()
    shutil.copytree(bundle, tmp_path / "b")
    call("calibrate", tmp_path / "b", made_up_classes / "class0/test/good", "--all-good", "--cache", tmp_path, "-q")
    assert config_of(tmp_path / "b")["calibration"]["images"][0] == 4
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk/a.png").write_text("no image")
    assert "needs a readable good image" in call("calibrate", tmp_path / "b", tmp_path / "junk", "-q", code=2)
    assert "is not a folder: a bundle is" in call("calibrate", tmp_path / "junk/a.png", tmp_path / "junk", code=2)
    rate = ["--false-alarm-rate", 2]
    output = call("calibrate", tmp_path / "b", made_up_classes / "class0/test/good", "--all-good", *rate, "-q", code=2)
    assert "false_alarm_rate must be in (0, 1), got 2" in output
    assert config_of(tmp_path / "b")["calibration"]["images"][0] == 4


def test_eval_says_what_happens_at_the_threshold(bundle, made_up_classes, tmp_path):
    old, mine = (tmp_path / "pictures/gone" / name for name in ("false-alarm-3.png", "mine.png"))
    old.parent.mkdir(parents=True)
    old.touch(), mine.touch()
    output = call("eval", bundle, made_up_classes, "-o", tmp_path, "-q")
    assert mine.exists() and not old.exists()  # of an evaluation before this one
    assert "at the threshold" in output and "found, " in output and "false alarms" in output
    assert "at most 5% false alarms among these images" in output
    with open(tmp_path / "decisions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10 and {row["kind"] for row in rows} == {"good", "square"}
    with open(tmp_path / "scores.csv", newline="") as file:
        assert min(float(row["score"]) for row in csv.DictReader(file)) < 0  # a number still, for a spreadsheet too
    threshold = AnomalyDetector.load(bundle).calibration.threshold.value
    with open(tmp_path / "scores.csv", newline="") as file:
        scores = [row for row in csv.DictReader(file) if row["class"] == "class2" and row["kind"] == "square"]
    (row,) = (row for row in rows if row["class"] == "class2" and row["kind"] == "square")
    assert int(row["called_defective"]) == sum(float(s["score"]) > threshold for s in scores)
    decisions = json.loads((tmp_path / "metrics.json").read_text())["decisions"]
    assert decisions["threshold"] == threshold and len(decisions["alternatives"]) == 3


def test_a_signal_leaves_the_bundle_as_it_was(bundle, made_up_classes, tmp_path, monkeypatch):
    shutil.copytree(bundle, tmp_path / "b")

    def calibrated(self, *_, **__):
        signals._asked.append(signal.SIGTERM)
        self._trained = None  # which nobody could write
        return self

    monkeypatch.setattr(AnomalyDetector, "calibrate", calibrated)
    good = made_up_classes / "class0/test/good"
    call("calibrate", tmp_path / "b", good, "--all-good", "-q", code=128 + signal.SIGTERM)
    assert config_of(tmp_path / "b") == config_of(bundle)
