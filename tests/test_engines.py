"""Engines: the same verdicts by each that is installed, the fastest taken and remembered, and what is refused."""

import dataclasses
import json
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import call, run_command
from engine_cases import TORCH, cache, detector, examined, paths  # noqa: F401  fixtures

from uniad_fast import AnomalyDetector, signals
from uniad_fast.deploy import engines, plans
from uniad_fast.deploy.engine_files import EngineFiles
from uniad_fast.deploy.engines import use_engine
from uniad_fast.deploy.examine import EngineError, Examined, examine
from uniad_fast.deploy.parity import compare
from uniad_fast.deploy.plans import Plan, plans_here
from uniad_fast.detect.evaluation import evaluate
from uniad_fast.packages import MissingPackageError


def scores(detector, paths):
    return np.array([one.score for one in detector.predict(paths)])


def test_every_plan_says_what_the_pipeline_says(detector, examined, paths):
    found = {row.plan for row in examined}
    assert (
        found
        == set(plans_here())
        >= {Plan(engine, part, "float32") for engine in ("openvino", "onnxruntime") for part in ("features", "network")}
    )
    assert [row.problem for row in examined if row.problem] == []
    assert all(row.agrees and row.image > 0 and row.load > 0 for row in examined if row.precision == "float32")
    truth, fields = scores(detector, paths), [one.class_name for one in detector.predict(paths)]
    for plan in (plan for plan in plans_here() if plan.precision == "float32"):
        detector.engine = plans.runner(plan, detector.pipeline, EngineFiles(detector))
        assert np.abs(scores(detector, paths) - truth).max() < 0.05 * max(1, truth.max() / 10), plan
        assert [one.class_name for one in detector.predict(paths)] == fields
    told = detector.predict(paths[:2], class_name=detector.classes[-1])
    assert [one.class_name for one in told] == [detector.classes[-1]] * 2


def test_the_fastest_of_what_is_remembered_is_taken(detector, examined, paths):
    files = EngineFiles(detector)
    per_image = {plan: 1.0 + number for number, plan in enumerate(plans_here())}
    slow_to_load = Plan("openvino", "network", "float32")
    per_image[slow_to_load] = 0.01
    rows = [
        dataclasses.replace(row, image=per_image[row.plan], load=100.0 if row.plan == slow_to_load else 0.0)
        for row in examined
    ]
    files.remember([dataclasses.asdict(row) for row in rows])
    assert use_engine(detector, batch=3).plan == slow_to_load
    assert detector.engine is not None
    assert use_engine(detector, batch=3, count=60).plan == TORCH  # before the other has loaded, it is done
    assert use_engine(detector, batch=3, count=10).plan is None  # and so is the pipeline as it is, before that
    assert use_engine(detector, "onnxruntime", batch=1).plan.engine == "onnxruntime"
    assert use_engine(detector, "torch").plan == TORCH
    assert detector.engine is not None
    assert use_engine(detector, batch=99, count=5).plan is None  # never measured, and not worth it
    assert detector.engine is None
    assert use_engine(detector, batch=99, count=500).plan == TORCH
    wrong = [dataclasses.replace(row, score=1.0) if row.plan == slow_to_load else row for row in rows]
    files.remember([dataclasses.asdict(row) for row in wrong])
    choice = use_engine(detector, batch=3)
    assert choice.plan == TORCH and "off by 1 standard deviations, and may be by 0.05" in choice.note
    with pytest.raises(EngineError, match="openvino does not agree with the detector here"):
        files.remember([dataclasses.asdict(dataclasses.replace(row, score=1.0)) for row in rows])
        use_engine(detector, "openvino", batch=3)
    files.remember([dataclasses.asdict(row) for row in examined])


def test_it_measures_when_it_is_worth_it(detector, paths, monkeypatch):
    calls = []

    def fake(_detector, images, batches, **options):
        calls.append((len(images), batches, options["plans"]))
        return [Examined(*plan, batches[0], 0.0, 1.0, 0.0, 0.0) for plan in options["plans"]]

    monkeypatch.setattr(engines, "examine", fake)
    use_engine(detector, images=paths, batch=5, count=999)
    assert calls == []
    use_engine(detector, images=paths, batch=500, count=1000)  # a few batches: they are done sooner
    assert calls == []
    use_engine(detector, images=paths, batch=5, count=1000)
    use_engine(detector, "openvino", paths, batch=5, count=2)
    assert [(count, batches) for count, batches, _ in calls] == [(len(paths), [5]), (len(paths), [2])]
    assert {plan.engine for plan in calls[1][2]} == {"openvino"}


def test_an_engine_that_fails_is_not_taken(detector, paths, tmp_path, monkeypatch):
    def fail(path, threads):
        raise RuntimeError("no such instruction\nand more")

    monkeypatch.setattr(plans, "onnxruntime_session", fail)
    wanted = [TORCH, Plan("onnxruntime", "features", "float32")]
    rows = examine(detector, paths, [1], cache_dir=tmp_path, quiet=True, plans=wanted)
    assert [row.problem for row in sorted(rows, key=lambda row: row.engine)] == ["no such instruction", ""]
    with pytest.raises(EngineError, match="onnxruntime float32 \\+ own network: no such instruction"):
        use_engine(detector, "onnxruntime", paths, cache_dir=tmp_path, quiet=True)
    monkeypatch.undo()  # what has failed may do so no more
    assert use_engine(detector, "onnxruntime", paths, cache_dir=tmp_path, quiet=True).plan.engine == "onnxruntime"


def test_an_engine_that_fails_later_is_passed_over(detector, examined, paths, monkeypatch):
    EngineFiles(detector).remember([dataclasses.asdict(row) for row in examined])

    def fail(*_):
        raise RuntimeError("gone")

    for name in ("openvino_model", "onnxruntime_session"):
        monkeypatch.setattr(plans, name, fail)
    slow = [dataclasses.replace(row, image=9.0) if row.plan == TORCH else row for row in examined]
    EngineFiles(detector).remember([dataclasses.asdict(row) for row in slow])
    choice = use_engine(detector, batch=3)
    assert choice.plan == TORCH and "can't be loaded: gone" in choice.note
    with pytest.raises(EngineError, match="can't be loaded: gone"):
        use_engine(detector, "openvino", batch=3)
    EngineFiles(detector).remember([dataclasses.asdict(row) for row in examined])


def test_an_engine_that_fails_at_a_size_of_batch_is_not_taken_there(detector, paths, tmp_path, monkeypatch):
    real = plans.onnxruntime_session

    class Limited:
        def __init__(self, *arguments):
            self.session = real(*arguments)

        def run(self, outputs, inputs):
            if len(inputs["images"]) > 2:
                raise RuntimeError("too many")
            return self.session.run(outputs, inputs)

    monkeypatch.setattr(plans, "onnxruntime_session", Limited)
    plan = Plan("onnxruntime", "features", "float32")
    rows = examine(detector, paths, [2, 3], cache_dir=tmp_path, quiet=True, plans=[plan])
    assert [(row.batch, row.problem) for row in rows] == [(2, ""), (3, "too many")]


def test_maps_and_classes_count_too():
    row = Examined("torch", "features", "float32", 1, 0.0, 1.0, 0.01, 0.1)
    assert row.agrees
    for change in ({"map": 0.3}, {"classes": 1}, {"score": 0.06}, {"problem": "x"}):
        assert not dataclasses.replace(row, **change).agrees
    for change, why in (
        ({"map": 0.3}, "off by 0.3 standard deviations in a map, and may be by 0.2"),
        ({"classes": 2}, "takes 2 images for another class"),
        ({"score": 0.06}, "off by 0.06 standard deviations, and may be by 0.05"),
    ):
        assert engines._why_not(dataclasses.replace(row, **change)).endswith(why)


def test_what_can_not_be(detector, monkeypatch):
    with pytest.raises(
        EngineError, match="must be one of auto, torch, openvino, onnxruntime, or an exported file, got 'tensorrt'"
    ):
        use_engine(detector, "tensorrt")
    with pytest.raises(EngineError, match="precision must be one of float32, bfloat16, got 'int4'"):
        use_engine(detector, precision="int4")
    with pytest.raises(EngineError, match="run uniad-fast engines BUNDLE IMAGES --batch-size 77"):
        use_engine(detector, "openvino", batch=77)
    with pytest.raises(EngineError, match="no image can be read"):
        examine(detector, [], [1], quiet=True)
    monkeypatch.setattr("uniad_fast.packages.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match="pip install openvino"):
        use_engine(detector, "openvino")
    monkeypatch.setattr(plans, "has_bfloat16", lambda _: False)
    with pytest.raises(EngineError, match="no engine computes in bfloat16 on this machine"):
        use_engine(detector, precision="bfloat16")
    monkeypatch.setattr(plans, "find_spec", lambda name: None)
    assert plans_here() == [TORCH]
    assert use_engine(detector).plan == TORCH and use_engine(detector, count=3).plan is None
    detector.device = torch.device("meta")
    assert use_engine(detector).plan is None
    with pytest.raises(EngineError, match="the detector is on meta"):
        use_engine(detector, precision="bfloat16")


@pytest.mark.skipif(len({p.precision for p in plans_here()}) < 2, reason="this processor does not multiply bfloat16")
def test_bfloat16_has_to_be_asked_for(detector, examined):
    assert use_engine(detector, batch=3).plan.precision == "float32"
    files = EngineFiles(detector)
    for off, agrees in ((0.4, True), (0.6, False)):
        rows = [dataclasses.replace(row, score=off) if row.precision == "bfloat16" else row for row in examined]
        files.remember([dataclasses.asdict(row) for row in rows])
        if agrees:
            assert use_engine(detector, batch=3, precision="bfloat16").plan.precision == "bfloat16"
            continue
        with pytest.raises(EngineError, match="is off by 0.6 standard deviations, and may be by 0.5"):
            use_engine(detector, batch=3, precision="bfloat16")
    files.remember([dataclasses.asdict(row) for row in examined])


def test_learning_again_forgets_the_engine(detector, made_up_classes, backbone_weights, tmp_path):
    use_engine(detector, "torch")
    recipe = dataclasses.replace(detector.settings.recipe, epochs=1)
    detector.settings = dataclasses.replace(detector.settings, recipe=recipe)
    detector.backbone_weights, detector.cache_dir = backbone_weights, tmp_path
    detector.fit(sorted(made_up_classes.glob("class0/train/good/*.png")), quiet=True)
    assert detector.engine is None


def test_the_commands(bundle, made_up_classes, detector, examined, tmp_path):
    text = call("engines", bundle, made_up_classes / "class0" / "train", "--batch-size", 2, "-q")
    assert all(str(plan) in text for plan in plans_here())
    assert str(TORCH) in call("doctor")
    data, output = made_up_classes / "class0" / "test", tmp_path / "o"
    reports = {}
    for engine in ("torch", "openvino", "auto"):
        place = output / engine
        code, said = run_command("score", bundle, data, "-o", place, "--engine", engine, "--batch-size", 2, "-q")
        assert code in (0, 1), said
        reports[engine] = [json.loads(line) for line in (place / "scores.jsonl").read_text().splitlines()]
    for rows in zip(*reports.values(), strict=True):
        assert len({(row["image"], row["class"], row["label"]) for row in rows}) == 1
        assert rows[1]["score"] == pytest.approx(rows[0]["score"], abs=0.05, rel=0.005)
    table = call("eval", bundle, made_up_classes, "--engine", "onnxruntime", "-q")
    assert f"{evaluate_mean(bundle, made_up_classes):.3f}" in table


def evaluate_mean(bundle, data):
    from uniad_fast.data.datasets import load_dataset

    return evaluate(AnomalyDetector.load(bundle), load_dataset(data).test, quiet=True).mean["image_auroc"]


def test_a_signal_stops_what_measures_and_compares(detector, paths, monkeypatch):
    monkeypatch.setattr(signals, "_asked", [signal.SIGTERM])
    with pytest.raises(signals.Stopped):
        examine(detector, paths, [2], quiet=True)
    with pytest.raises(signals.Stopped):
        compare(detector, SimpleNamespace(metadata={"classes": []}), paths)  # the file is asked nothing else
