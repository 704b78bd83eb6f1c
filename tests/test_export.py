"""Exported detectors: the same numbers by every engine, on images of any size, and files that are refused."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call
from PIL import Image

from uniad_fast import AnomalyDetector
from uniad_fast.data.images import to_tensor
from uniad_fast.deploy import export, exported, parity
from uniad_fast.deploy.engines import use_engine
from uniad_fast.deploy.export import ExportError, export_detector
from uniad_fast.deploy.exported import load_exported
from uniad_fast.deploy.graph import OUTPUTS, DetectorGraph, resized
from uniad_fast.models.precision import computes_in_bfloat16

# Of a score: the command's detector computes as it was trained to, in bfloat16 where the processor has it.
ROUNDING = 0.05 if computes_in_bfloat16("auto", torch.device("cpu")) else 0.001
GUIDE = Path(__file__).parents[1] / "docs/guide/export.md"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Of all shapes, one larger than the detector, one smaller, one long, one grey."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number, shape in enumerate([(64, 64), (97, 150), (40, 33), (20, 200), (64, 65)]):
        smooth = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize(shape[::-1])
        (smooth.convert("L") if number == 4 else smooth).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def onnx_file(bundle, made_up_classes, pictures, tmp_path_factory):
    """Exported by the command, checked on pictures that the detector was not made for and on one that it was."""
    target = tmp_path_factory.mktemp("exported") / "detector.onnx"
    text = call("export", bundle, "-o", target, "--check", pictures)
    assert "onnxruntime may differ by 0.05" in text
    return target


@pytest.fixture(scope="module")
def detector(bundle):
    """In float32 as the files are, whatever the processor would rather take."""
    found = AnomalyDetector.load(bundle)
    found.pipeline.precision = "float32"
    return found


def batch(paths):
    return np.stack([np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1) for path in paths])


def test_the_file_says_what_the_detector_says(onnx_file, detector, made_up_classes):
    file = load_exported(onnx_file)
    paths = sorted(made_up_classes.glob("*/test/*/00[01].png"))
    found = file(batch(paths))
    for row, prediction in enumerate(detector.predict(paths)):
        assert found["score"][row] == pytest.approx(prediction.score, abs=1e-3)
        np.testing.assert_allclose(found["anomaly_map"][row], prediction.anomaly_map, atol=1e-3)
        assert bool(found["defective"][row]) == prediction.label
        number = found["class"][row]
        assert (file.metadata["classes"][number] if number >= 0 else None) == prediction.class_name
    assert 0 < found["defective"].sum() < len(paths)
    assert [value.dtype for value in found.values()] == [np.float32, bool, np.int64, np.float32, np.float32]
    stored = json.loads(onnx_file.with_name("detector.onnx.parity.json").read_text())
    assert [p["batch"] for p in stored["parity"]] == [1, 7] and stored["engine"] == "onnxruntime"
    assert 0 < stored["parity"][1]["score"] < ROUNDING and [p["images"] for p in stored["parity"]] == [5, 5]
    assert [p["resized"] for p in stored["parity"]] == [True, False]
    assert stored["metadata"]["threshold"] == detector.calibration.threshold.value


def test_the_guides_program_needs_no_torch(onnx_file, detector, made_up_classes, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(re.search(r"```python\n(.*?)```", GUIDE.read_text(), re.S)[1])
    assert len(program.read_text().splitlines()) <= 30
    paths = sorted(made_up_classes.glob("class0/test/*/000.png"))
    blocked = "import sys; sys.modules['torch'] = sys.modules['uniad_fast'] = None; sys.argv = sys.argv[1:]; "
    command = [sys.executable, "-c", blocked + "exec(open(sys.argv[0]).read())", program, onnx_file, *paths]
    lines = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout.splitlines()
    for path, line, prediction in zip(paths, lines, detector.predict(paths), strict=True):
        assert line.startswith(f"{path}: ")
        assert float(re.search(r"score (\S+)", line)[1]) == pytest.approx(prediction.score, abs=0.02)
        assert ("DEFECTIVE, worst at row" in line) == prediction.label


def test_openvino_and_torch_say_it_too(bundle, detector, pictures, tmp_path):
    for name, options in (
        ("d.xml", ["--format", "openvino", "--precision", "float16"]),
        ("d.pt2", ["--format", "torch"]),
    ):
        text = call("export", bundle, "-o", tmp_path / name, *options, "--check", pictures)
        assert "wrote" in text
    assert {path.name for path in tmp_path.iterdir()} == {
        "d.xml", "d.bin", "d.xml.parity.json", "d.pt2", "d.pt2.parity.json"
    }  # fmt: skip
    exact = json.loads((tmp_path / "d.pt2.parity.json").read_text())
    assert exact["parity"][1]["score"] < ROUNDING and exact["bound"] == 0.05
    with pytest.raises(ExportError, match="may hold pickles"):
        load_exported(tmp_path / "d.pt2")
    file = load_exported(tmp_path / "d.xml", threads=1)
    assert file.metadata["precision"] == "float16" and file.metadata["classes"] == list(detector.trained.names)
    first = file(np.zeros((2, 3, 10, 20), np.uint8))["score"]
    kept = first.copy()
    file(np.full((2, 3, 10, 20), 255, np.uint8))
    assert (first == kept).all()
    (tmp_path / "d.bin").write_bytes((tmp_path / "d.bin").read_bytes()[:1000])
    with pytest.raises(ExportError, match="d.xml can't be read"):
        load_exported(tmp_path / "d.xml")
    (tmp_path / "d.bin").unlink()
    with pytest.raises(ExportError, match="d.bin is not beside it"):
        load_exported(tmp_path / "d.xml")


def test_int8_of_all_but_resize_and_scores(bundle, detector, made_up_classes, onnx_file, tmp_path):
    import openvino

    target, data = tmp_path / "d.xml", made_up_classes
    options = ["--format", "openvino", "--precision", "int8"]
    # This backbone's weights are random, so that rounding is worse than it may be.
    text = call("export", bundle, "-o", target, *options, "--good", data, "--check", data / "class0/test", code=2)
    assert f"wrote {target}" in text and "the median score of int8 may differ by 0.5" in text
    model = openvino.Core().read_model(target)
    assert [port.get_any_name() for port in model.outputs] == list(OUTPUTS)
    kinds = [node.get_type_name() for node in model.get_ops()]
    assert kinds.count("FakeQuantize") > kinds.count("Convolution") > 5
    made = {"float32": load_exported(onnx_file, threads=1), "int8": load_exported(target, threads=1)}
    assert made["int8"].metadata["precision"] == "int8"
    paths = sorted(data.glob("*/test/*/*.png"))
    scores = {name: file(batch(paths))["score"] for name, file in made.items()}
    off = np.abs(scores["int8"] - scores["float32"]) / np.maximum(1, scores["float32"] / 10)
    assert 0 < np.median(off) < 5  # of random weights, and by instructions that differ between processors
    with pytest.raises(ExportError, match="give good images"):
        export_detector(detector.trained, target, "openvino", "int8")
    with pytest.raises(ExportError, match="float16 or int8 for openvino, got 'int8' for onnx"):
        export_detector(detector.trained, tmp_path / "d.onnx", "onnx", "int8")


def test_a_file_measures_in_the_detectors_place(onnx_file, detector, made_up_classes, bundle):
    paths = sorted(made_up_classes.glob("*/test/*/00[01].png"))
    truth = detector.predict(paths)
    use_engine(detector, str(onnx_file))
    for ours, theirs in zip(truth, detector.predict(paths), strict=True):
        assert theirs.score == pytest.approx(ours.score, abs=1e-3, rel=1e-4)
        assert (theirs.label, theirs.class_name) == (ours.label, ours.class_name)
        np.testing.assert_allclose(theirs.anomaly_map, ours.anomaly_map, atol=1e-3, rtol=1e-4)
    with pytest.raises(ExportError, match="recognizes the class of an image by itself"):
        detector.predict(paths, class_name=detector.classes[0])
    arguments = ["--engine", onnx_file, "--save-reconstructions", onnx_file.parent / "r", "-q"]
    text = call("eval", bundle, made_up_classes, *arguments, code=2)
    assert "reconstructions need the features" in text
    detector.calibrate(paths, false_alarm_rate=0.5, quiet=True)
    with pytest.raises(ExportError, match="before this one was calibrated anew"):
        use_engine(detector, str(onnx_file))


def test_files_that_are_no_exported_detector(onnx_file, tmp_path):
    import onnx

    damaged = tmp_path / "cut.onnx"
    damaged.write_bytes(onnx_file.read_bytes()[:-100000])
    with pytest.raises(ExportError, match="cut.onnx can't be read"):
        load_exported(damaged)
    model = onnx.load(str(onnx_file))
    about = json.loads(model.metadata_props[0].value)
    for value, message in (
        (json.dumps(about | {"version": 0}), "version 0 and this reads 1"),
        ("[]", "not exported by uniad_fast"),
        ("{", "not exported by uniad_fast"),
    ):
        onnx.helper.set_model_props(model, {"uniad_fast": value})
        onnx.save(model, str(damaged))
        with pytest.raises(ExportError, match=message):
            load_exported(damaged)
    del model.metadata_props[:]
    onnx.save(model, str(damaged))
    with pytest.raises(ExportError, match="not exported by uniad_fast"):
        load_exported(damaged)
    with pytest.raises(ExportError, match="is not there"):
        load_exported(tmp_path / "missing.onnx")
    with pytest.raises(ExportError, match="ends in .onnx, .xml, .pt2"):
        load_exported(tmp_path)
    with pytest.raises(ValueError, match="uint8"):
        load_exported(onnx_file)(np.zeros((1, 3, 4, 4)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("d.onnx", "engine"), "format must be one of"),
        (("d.xml", "onnx"), "ends in .onnx, got 'd.xml'"),
        (("d.onnx", "onnx", "float16"), "float16 or int8 for openvino, got 'float16'"),
        (("d.onnx", "onnx", "float32", "int8"), "uint8 or float32, got 'int8'"),
    ],
)
def test_what_can_not_be_exported_is_refused(arguments, message, detector, tmp_path):
    with pytest.raises(ExportError, match=message):
        export_detector(detector.trained, tmp_path / arguments[0], *arguments[1:])
    assert not list(tmp_path.iterdir())


def test_a_detector_without_a_threshold_is_refused(detector, tmp_path):
    with pytest.raises(ExportError, match="no threshold"):
        export_detector(detector.trained._replace(calibration=None), tmp_path / "d.onnx", "onnx")


def test_a_detector_exports_itself(detector, tmp_path):
    metadata = detector.export(tmp_path / "d.pt2", "torch", images="float32")
    assert metadata["images"] == "float32" and metadata["threshold"] == detector.calibration.threshold.value
    assert load_exported(tmp_path / "d.pt2", trusted=True).metadata == metadata


def test_a_failed_export_leaves_nothing(detector, tmp_path, monkeypatch):
    def fail(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(export.torch.export, "export", lambda *_, **__: None)
    monkeypatch.setattr(export, "_write_onnx", fail)
    for name, kind in (("d.onnx", "onnx"), ("d.xml", "openvino")):
        with pytest.raises(KeyboardInterrupt):
            export_detector(detector.trained, tmp_path / name, kind)
    assert not list(tmp_path.iterdir())


def test_a_file_that_differs_fails(onnx_file, bundle, pictures, tmp_path, monkeypatch):
    """The graph is another one by a little more than it may be."""

    class Off(exported.ExportedDetector):
        def __call__(self, images):
            found = super().__call__(images)
            return found | {"score": found["score"] + 0.3}

    monkeypatch.setattr("uniad_fast.cli.export.export_detector", lambda *_: {"threshold": 0.0})
    loaded = load_exported(onnx_file)
    monkeypatch.setattr(
        "uniad_fast.cli.export.load_exported", lambda *_, **__: Off("off", loaded.metadata, loaded._run)
    )
    text = call("export", bundle, "-o", tmp_path / "d.onnx", "--check", pictures, code=2)
    assert "differs from the detector by more than it may" in text


def test_parity_sees_every_kind_of_difference():
    good = parity.Parity(1, 3, 0.01, 0.01, 0.01, 0, 0, False)
    assert parity.Parity(**(vars(good) | {"map": 0.19})).within("float32")
    assert good.within("float32") and parity.Parity(1, 3, 0.2, 0.2, 0.2, 1, 0, True).within("float32")
    for change in ({"score": 0.06}, {"map": 0.21}, {"classes": 1}, {"map": float("inf")}):
        assert not parity.Parity(**(vars(good) | change)).within("float32")
    assert parity.Parity(1, 3, 3.0, 9.0, 0.4, 1, 0, False).within("int8")
    for change in ({"typical": 0.6}, {"classes": 1}):
        assert not parity.Parity(**(vars(good) | change)).within("int8")
    difference = parity.difference
    assert difference(np.array([1.0, np.nan]), np.array([1.5, np.nan])) == 0.5
    assert difference(np.array([100.0]), np.array([101.0])) == pytest.approx(0.1)
    assert difference(np.array([np.nan]), np.array([1.0])) == np.inf
    assert difference(np.zeros(3), np.zeros(2)) == np.inf


@pytest.mark.parametrize("shape", [(64, 64), (128, 128), (200, 31), (17, 500), (1, 1), (333, 64)])
def test_the_resize_is_pillows(shape):
    picture = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    ours = resized(torch.from_numpy(picture.transpose(2, 0, 1)[None]), 64)[0]
    theirs = to_tensor(Image.fromarray(picture), 64)
    levels = (255 * (ours - theirs)).abs().round()
    # Pillow 13 takes the rows of tall images first, which moves a fifth of the pixels by a level.
    tall = shape[0] > shape[1] and shape[1] != 64
    assert levels.max() <= 1 and (levels > 0).float().mean() < (0.3 if tall else 0.01)
    as_float = resized(torch.from_numpy(picture.transpose(2, 0, 1)[None] / np.float32(255)), 64)[0]
    assert (255 * (as_float - ours)).abs().max() <= 1.001


def test_the_graph_shares_the_detectors_tensors_and_leaves_it_as_it_was(detector):
    before = detector.predict(np.zeros((64, 64, 3), np.uint8)).score
    graph = DetectorGraph(detector.trained)
    mine, its = detector.pipeline.state_dict(keep_vars=True), graph.pipeline.state_dict(keep_vars=True)
    assert all(mine[name].data_ptr() == its[name].data_ptr() for name in mine)
    assert detector.pipeline.model.impl is None and graph.pipeline.model.impl == "torch"
    assert detector.predict(np.zeros((64, 64, 3), np.uint8)).score == before
    assert len(graph(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))) == len(OUTPUTS)
