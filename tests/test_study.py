"""Studies: what is measured is right, what was done is not done again, tables and figures say what was measured."""

import csv
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import BACKBONE, call
from PIL import Image

from uniad_fast import AnomalyDetector
from uniad_fast.data.datasets import load_dataset
from uniad_fast.data.samples import DataError, Dataset
from uniad_fast.detect.evaluation import evaluate
from uniad_fast.files import locked
from uniad_fast.models.backbone import Backbone
from uniad_fast.studies import study, trial
from uniad_fast.studies.data import StudyData
from uniad_fast.studies.study import plan, run_study
from uniad_fast.studies.systems import SHORTCUT_SYSTEMS, System
from uniad_fast.studies.trial import EVERY_CLASS, Trial, run_trial
from uniad_fast.training.recipes import FAST
from uniad_fast.training.run_files import ResumeError, RunFiles

CPU = torch.device("cpu")
RECIPE = replace(FAST, epochs=4, min_steps=0, batch_size=4, precision="float32")
MLP = SHORTCUT_SYSTEMS[1]
SMALL = dict(hidden_dim=32, nhead=4, num_encoder_layers=1, num_decoder_layers=2, dim_feedforward=64)
UNIAD = System("UniAD", options=SMALL)
METRICS = ("image_auroc_max", "image_auroc_mean", "pixel_auroc")


@pytest.fixture(scope="module")
def two_classes(made_up_classes, tmp_path_factory):
    root = tmp_path_factory.mktemp("study") / "two"
    for name in ("class0", "class1"):
        shutil.copytree(made_up_classes / name, root / name)
    return root


@pytest.fixture(scope="module")
def backbone(backbone_weights):
    return Backbone.pretrained(BACKBONE, 64, backbone_weights)


@pytest.fixture(scope="module")
def data(two_classes, backbone, tmp_path_factory):
    return StudyData.load(load_dataset(two_classes), backbone, 64, tmp_path_factory.mktemp("cache"), quiet=True)


def without_seconds(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_a_measurement_is_the_librarys_own_evaluation(data, backbone, tmp_path, monkeypatch):
    """What `evaluate` finds from the images, the study finds from their features."""
    pipelines = []
    measure = trial._measure
    monkeypatch.setattr(trial, "_measure", lambda pipeline, *a: pipelines.append(pipeline) or measure(pipeline, *a))
    one = Trial(MLP, replace(RECIPE, standardize=False), 0, None, every=4)
    rows = [row for row in run_trial(one, data, tmp_path, CPU) if row["epoch"] == 4]
    detector = AnomalyDetector.from_parts(backbone, pipelines[-1].model, image_size=64)
    found = evaluate(detector, data.test, quiet=True)
    for row in rows:
        expected = found.mean if row["class"] == EVERY_CLASS else found.by_class[row["class"]]
        assert row["image_auroc_max"] == pytest.approx(expected["image_auroc"])
        assert row["pixel_auroc"] == pytest.approx(expected["pixel_auroc"], abs=1e-6)


@pytest.mark.parametrize("system", [SHORTCUT_SYSTEMS[3], UNIAD], ids=lambda s: s.name)
def test_an_interrupted_run_goes_on_to_the_same_numbers(system, data, tmp_path, monkeypatch):
    one = Trial(system, RECIPE, 3, None, every=2, scores=("l2", "whitened"), pictured=(5,))
    unbroken = run_trial(one, data, tmp_path / "unbroken", CPU)
    assert sorted({row["epoch"] for row in unbroken}) == [1, 2, 4]
    assert {row["score"] for row in unbroken} == {"l2", "whitened"}
    # With a checkpoint after every step instead of every minute.
    monkeypatch.setattr(trial, "RunFiles", partial(RunFiles, checkpoint_seconds=0.0))
    for stop in (1, 3):

        def interrupt(epoch, stop=stop):
            if epoch == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_trial(one, data, tmp_path / "broken", CPU, after_epoch=interrupt)
        assert not list((tmp_path / "broken").glob("*.json"))
    assert without_seconds(run_trial(one, data, tmp_path / "broken", CPU)) == without_seconds(unbroken)
    assert [path.name for path in (tmp_path / "broken").iterdir()] == [f"{one.name}.json"]


def test_a_finished_run_is_read_and_another_one_refused(data, tmp_path, monkeypatch):
    one = Trial(MLP, RECIPE, 0, "class0", every=2)
    rows = run_trial(one, data.of_class("class0"), tmp_path, CPU)
    monkeypatch.setattr(trial, "train_pipeline", None)
    assert run_trial(one, data.of_class("class0"), tmp_path, CPU) == rows
    with pytest.raises(ResumeError, match="every: was 2, is 3.*another output folder"):
        run_trial(replace(one, every=3), data.of_class("class0"), tmp_path, CPU)
    (tmp_path / f"{one.name}.json").write_text('{"rows"')
    with pytest.raises(ResumeError, match="damaged"):
        run_trial(one, data.of_class("class0"), tmp_path, CPU)


def test_a_separate_model_sees_its_class_alone(data):
    part = data.of_class("class1")
    assert {s.class_name for s in part.train + part.test} == {"class1"} and part.classes == ["class1"]
    rows = [i for i, s in enumerate(data.test) if s.class_name == "class1"]
    assert (part.test_tokens == data.test_tokens[rows]).all() and (part.masks == data.masks[rows]).all()
    assert len(part.train_tokens) == len(part.train) == 8


def test_every_run_of_a_study_is_measured_and_the_mean_is_over_classes(data, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "SHORTCUT_SYSTEMS", (MLP, UNIAD))
    planned = plan("shortcut", data, seeds=2, epochs=2)
    assert len(planned.trials) == 2 * 2 + 2 * 2
    rows = run_study(planned, data, tmp_path, CPU, quiet=True)
    assert len(list((tmp_path / "runs").glob("*.json"))) == 8
    with open(tmp_path / "results.csv", newline="") as file:
        written = list(csv.DictReader(file))
    # Systems, epochs, classes and their mean; unified with two seeds, separate with one.
    assert len(written) == len(rows) == 2 * 2 * 3 * (2 + 1)
    for setting, seed in (("unified", 1), ("separate", 0)):
        group = [r for r in rows if (r["system"], r["setting"], r["seed"], r["epoch"]) == ("MLP", setting, seed, 2)]
        by_class = {r["class"]: r for r in group}
        assert set(by_class) == {"class0", "class1", EVERY_CLASS}
        for metric in METRICS:
            mean = (by_class["class0"][metric] + by_class["class1"][metric]) / 2
            assert by_class[EVERY_CLASS][metric] == pytest.approx(mean)
    losses = {r["loss"] for r in rows if r["setting"] == "unified" and r["system"] == "MLP"}
    assert len(losses) == 4 and all(np.isfinite(loss) and loss > 0 for loss in losses)


def test_a_run_that_another_process_is_at_is_left_to_it(data, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "SHORTCUT_SYSTEMS", (MLP, UNIAD))
    planned = plan("shortcut", data, seeds=1, epochs=1)
    first, *others = planned.trials
    alone = run_study(planned, data, tmp_path / "alone", CPU, quiet=True)
    runs = tmp_path / "shared" / "runs"
    runs.mkdir(parents=True)
    trained, others_ended = [], threading.Event()
    train = trial.train_pipeline

    def record(*args, **options):
        run = args[4].run["trial"]
        epochs = train(*args, **options)
        trained.append((run["system"]["name"], run["class"]))
        if len(trained) == len(others):
            others_ended.set()
        return epochs

    monkeypatch.setattr(trial, "train_pipeline", record)
    with ThreadPoolExecutor() as pool:
        # A lock is of an open file: within one process it keeps out just the same.
        with locked(runs / f".{first.name}.lock"):
            shared = pool.submit(run_study, planned, data, tmp_path / "shared", CPU, quiet=True)
            assert others_ended.wait(60)
            assert trained == [(one.system.name, one.class_name) for one in others]
            run_trial(first, data, runs, CPU)
        assert without_seconds(shared.result(60)) == without_seconds(alone)
    assert len(trained) == len(planned.trials)  # what was done meanwhile is read, not done again


def row(system, seed, epoch, value, setting="unified", pixel=None, score="l2"):
    values = dict(image_auroc_max=value, image_auroc_mean=value / 2, pixel_auroc=pixel, loss=1 / epoch, seconds=epoch)
    return dict(system=system, setting=setting, seed=seed, epoch=epoch, score=score, **{"class": EVERY_CLASS}, **values)


def test_a_run_is_measured_where_it_ends(data, tmp_path):
    """Also where a small set is passed over more often, and where patience ended it."""
    longer = Trial(MLP, replace(RECIPE, epochs=2, min_steps=18), 0, None, every=2)  # five epochs of four steps
    assert sorted({row["epoch"] for row in run_trial(longer, data, tmp_path, CPU)}) == [1, 2, 4, 5]
    # Nothing is learnt at this rate, so the loss never falls.
    ended = Trial(replace(MLP, name="x"), replace(RECIPE, learning_rate=1e-12, epochs=9, patience=2), 0, None, every=9)
    rows = run_trial(ended, data, tmp_path, CPU)
    assert sorted({row["epoch"] for row in rows}) == [1, 3] and all(np.isfinite(row["loss"]) for row in rows)


@pytest.mark.parametrize("name", ["shortcut", "ablation", "recipe"])
def test_a_quick_study_is_an_eighth_of_each_run(name, data):
    whole, quick = plan(name, data), plan(name, data, quick=True)
    assert {trial.seed for trial in quick.trials} == {0} and len(quick.trials) < len(whole.trials)
    recipes = {(t.system.name, t.setting): t.system.recipe(t.recipe) for t in whole.trials}
    for one in quick.trials:
        short, long = one.system.recipe(one.recipe), recipes[one.system.name, one.setting]
        assert short.epochs <= max(2, long.epochs // 8) and short.min_steps == 0
        assert replace(short, epochs=long.epochs, min_steps=long.min_steps) == long


def test_data_that_can_not_be_studied_is_named(data, backbone, tmp_path):
    for broken, message in (
        (Dataset("d", data.train, []), "no test images"),
        (Dataset("d", [], data.test), "'class0' of d has no good image"),
        (Dataset("d", data.train, [s for s in data.test if s.defective]), "one kind alone"),
    ):
        with pytest.raises(DataError, match=message):
            StudyData.load(broken, backbone, 64, tmp_path, quiet=True)
    with pytest.raises(ValueError, match="'speed'"):
        plan("speed", data)


@pytest.mark.parametrize(("name", "pictures"), [("shortcut", 3), ("ablation", 0), ("time", 0)])
def test_the_command_line(name, pictures, two_classes, backbone_weights, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "PART_SYSTEMS", (UNIAD, replace(UNIAD, name="again")))
    monkeypatch.setattr(study, "SHORTCUT_SYSTEMS", (MLP, UNIAD))
    monkeypatch.setattr(study, "FAST", replace(FAST, min_steps=0, epochs=1))
    options = ["--backbone", BACKBONE, "--backbone-weights", backbone_weights, "--image-size", 64]
    options += ["--cache", tmp_path / "cache", "--quiet", "--quick", "--epochs", 2]
    output = tmp_path / "out"
    text = call("study", name, two_classes, "-o", output, *options)
    table = (output / "table.md").read_text()
    assert table in text and ("paper" if name == "time" else "UniAD") in table and "±" not in table
    drawn = sorted(output.glob("*.png"))
    assert len(drawn) == pictures
    for path in drawn:
        assert len(np.unique(np.asarray(Image.open(path)))) > 50, path
    written = (output / "results.csv").read_text()
    monkeypatch.setattr(trial, "train_pipeline", None)  # what is done is not done again
    call("study", name, two_classes, "-o", output, *options)
    assert (output / "results.csv").read_text() == written and (output / "table.md").read_text() == table
    text = call("study", name, two_classes, "-o", output, *options[:-1], 3, code=2)
    assert "another study" in text and "choose another output folder" in text


def test_data_commands(tmp_path):
    call("data", "digits", tmp_path / "digits", "--normal", "13579")
    assert len(load_dataset(tmp_path / "digits").train) > 400
    few = ["--train-images", 1, "--good-images", 1, "--defective-images", 1, "--quiet"]
    call("data", "textures", tmp_path / "textures", *few)
    assert "is there already" in call("data", "textures", tmp_path / "textures", *few, code=2)
