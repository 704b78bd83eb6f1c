"""Many classes in one detector: recognized or told, added to, and looked at in part."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import BACKBONE, call, run_command
from PIL import Image

from uniad_fast import AnomalyDetector
from uniad_fast.data.datasets import load_dataset
from uniad_fast.data.samples import DataError
from uniad_fast.detect import learning
from uniad_fast.detect.evaluation import evaluate
from uniad_fast.detect.score_outputs import NamedImage, with_classes_of_folders
from uniad_fast.errors import UniadFastError
from uniad_fast.training.reconstruction_loss import ReconstructionLoss
from uniad_fast.training.run_files import ResumeError


def rows_of(folder):
    return [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]


def test_score_measures_by_the_class_that_is_told(bundle, made_up_classes, tmp_path):
    images = made_up_classes / "class1/test/good"
    options = ["--no-heat-maps", "--threshold", 1e9, "-q"]
    call("score", bundle, images, "-o", tmp_path / "told", "--class", "class1", *options)
    call("score", bundle, images, "-o", tmp_path / "folder", "--class-from", "folder", *options)
    call("score", bundle, images, "-o", tmp_path / "other", "--class", "class3", *options)
    told, folder, other = (rows_of(tmp_path / name) for name in ("told", "folder", "other"))
    assert told == folder and {row["class"] for row in told} == {"class1"}
    assert {row["class"] for row in other} == {"class3"}
    assert all(a["score"] != b["score"] for a, b in zip(told, other, strict=True))
    with open(tmp_path / "told/scores.csv", newline="") as file:
        assert [row["class"] for row in csv.DictReader(file)] == ["class1"] * len(told)
    detector = AnomalyDetector.load(bundle)
    again = detector.predict([row["image"] for row in told], "class1")
    assert [p.score for p in again] == pytest.approx([row["score"] for row in told], rel=1e-3, abs=1e-3)


def test_what_is_told_wrong_is_refused(bundle, made_up_classes, tmp_path):
    images = made_up_classes / "class1/test/good"
    output = call("score", bundle, images, "-o", tmp_path, "--class", "class9", code=2)
    assert "knows no class 'class9'; it knows class0, class1" in output
    output = call("score", bundle, images, "-o", tmp_path, "--class", "class1", "--class-from", "folder", code=2)
    assert "--class says the class of all images" in output
    options = ["--threshold", 1, "--false-alarm-rate", 0.1]
    assert "give one of them" in call("score", bundle, images, "-o", tmp_path, *options, code=2)
    with pytest.raises(UniadFastError, match="no class 'x'"):
        AnomalyDetector.load(bundle).predict(sorted(images.iterdir()), "x")


def test_the_nearest_folder_of_a_class_counts(tmp_path):
    paths = ["cup/lid/good/1.png", "cup/1.png", "elsewhere/2.png"]
    named = [NamedImage(tmp_path / path, "1.png") for path in paths]
    told, notes = with_classes_of_folders(named, ("cup", "lid"))
    assert [one.class_name for one in told] == ["lid", "cup", None]
    assert notes == ["1 of 3 images lie in no folder named after a class; theirs is recognized"]
    assert with_classes_of_folders(named[:2], ("cup", "lid"))[1] == []


def test_a_rate_asked_for_when_scoring(bundle, made_up_classes, tmp_path):
    images = made_up_classes / "class1/test/good"
    limits = []
    for rate in (0.02, 0.4):
        options = ["-o", tmp_path, "--false-alarm-rate", rate, "-q", "--no-heat-maps"]
        code, _ = run_command("score", bundle, images, *options)
        assert code in (0, 1)
        limits.append(rows_of(tmp_path)[0]["threshold"])
    detector = AnomalyDetector.load(bundle)
    assert limits == [detector.calibration.threshold_at(rate).value for rate in (0.02, 0.4)] and limits[0] > limits[1]


def test_eval_tells_how_classes_were_recognized(bundle, made_up_classes, tmp_path):
    output = call("eval", bundle, made_up_classes, "-o", tmp_path, "-q")
    content = json.loads((tmp_path / "metrics.json").read_text())["recognized"]
    assert content["good"][0] == content["defective"][0] == 20 and "of 20 defective images" in output
    output = call("eval", bundle, made_up_classes, "--class-from", "data", "-q")
    assert "recognized" not in output
    detector, test = AnomalyDetector.load(bundle), load_dataset(made_up_classes).test
    assert evaluate(detector, test, class_from_data=True, quiet=True).recognized is None


def fitted(data, backbone_weights, tmp_path, **options):
    detector = AnomalyDetector(BACKBONE, 64, backbone_weights=backbone_weights, cache_dir=tmp_path / "cache", **options)
    detector.settings = type(detector.settings)(
        **(vars(detector.settings) | {"recipe": detector.settings.recipe.with_epochs(5)})
    )
    return detector


@pytest.fixture
def three_classes(made_up_classes, tmp_path):
    for k in range(3):
        shutil.copytree(made_up_classes / f"class{k}", tmp_path / "data" / f"class{k}")
    return tmp_path / "data"


def test_classes_are_added_in_a_fraction_of_the_steps(made_up_classes, three_classes, backbone_weights, tmp_path):
    detector = fitted(three_classes, backbone_weights, tmp_path).fit(three_classes, quiet=True)
    detector.save(tmp_path / "b")
    before = {name: t.clone() for name, t in detector.pipeline.model.state_dict().items()}
    anew = len(detector.trained.training_log.splitlines())
    options = ["--add-to", tmp_path / "b", "--cache", tmp_path / "cache", "-q"]
    call("train", made_up_classes, "-o", tmp_path / "c", *options)
    more = AnomalyDetector.load(tmp_path / "c")
    assert detector.classes == ("class0", "class1", "class2") and more.classes == tuple(f"class{k}" for k in range(5))
    assert len(more.trained.training_log.splitlines()) < 0.45 * anew * 5 / 3
    moved = max((before[n] - t).abs().max().item() for n, t in more.pipeline.model.state_dict().items() if n in before)
    assert 0 < moved < 0.1  # it went on from there
    assert torch.equal(more.pipeline.mean, detector.pipeline.mean)
    assert more.calibration.images == (8, 8, 8, 8, 8, 40)


def test_adding_goes_on_where_it_was_stopped_and_only_from_the_same_bundle(
    made_up_classes, three_classes, backbone_weights, tmp_path, monkeypatch
):
    detector = fitted(three_classes, backbone_weights, tmp_path).fit(three_classes, quiet=True)
    detector.save(tmp_path / "b")

    def loaded():
        one = AnomalyDetector.load(tmp_path / "b")
        one.cache_dir = tmp_path / "cache"
        return one

    whole = loaded().add(made_up_classes, quiet=True)
    monkeypatch.setattr(learning, "fit_scores", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    work = tmp_path / "work"
    with pytest.raises(KeyboardInterrupt):
        loaded().add(made_up_classes, work_dir=work, checkpoint_seconds=0, quiet=True)
    monkeypatch.undo()
    resumed = loaded().add(made_up_classes, work_dir=work, resume=True, quiet=True)
    for mine, other in zip(whole.pipeline.model.parameters(), resumed.pipeline.model.parameters(), strict=True):
        assert torch.equal(mine, other)
    changed = loaded()
    with torch.no_grad():
        next(iter(changed.pipeline.model.parameters())).add_(1e-3)
    with pytest.raises(ResumeError, match="goes on from"):
        changed.add(made_up_classes, work_dir=work, resume=True, quiet=True)


def test_what_can_not_be_added_to(bundle, three_classes, tmp_path):
    detector = AnomalyDetector.load(bundle)
    detector.cache_dir = tmp_path / "cache"
    with pytest.raises(DataError, match="no good image of class3, class4, which the detector knows: it would forget"):
        detector.add(three_classes, quiet=True)
    output = call("train", three_classes, "-o", tmp_path / "c", "--add-to", bundle, "--epochs", 3, "--seed", 1, code=2)
    assert "--epochs, --seed would not be followed" in output and not (tmp_path / "c").exists()
    detector._trained = detector.trained._replace(classes=())
    with pytest.raises(DataError, match="does not know which classes"):
        detector.add(three_classes, quiet=True)


def test_nobody_looks_outside_of_the_roi(bundle, made_up_classes, tmp_path):
    mask = np.zeros((128, 256), np.uint8)
    mask[:, 128:] = 255
    Image.fromarray(mask).save(tmp_path / "roi.png")
    picture = sorted((made_up_classes / "class0/test/good").iterdir())[0]
    pixels = np.array(Image.open(picture))
    pixels[20:40, 4:24] = 255 - pixels[20:40, 4:24]
    detector = AnomalyDetector.load(bundle).look_at(tmp_path / "roi.png")
    prediction = detector.predict(pixels, "class0")
    assert (prediction.anomaly_map[:, :32] == prediction.anomaly_map.min()).all()
    assert prediction.anomaly_map[:, 40:].min() > prediction.anomaly_map[:, 0].max()
    assert all(region.box[0] >= 32 for region in prediction.regions)
    detector.save(tmp_path / "b")
    again = AnomalyDetector.load(tmp_path / "b")
    assert np.array_equal(again.predict(pixels, "class0").anomaly_map, prediction.anomaly_map)
    output = call("eval", bundle, made_up_classes, "--roi", tmp_path / "roi.png", "-q")
    assert "pixel auroc" in output
    Image.fromarray(mask * 0).save(tmp_path / "black.png")
    output = call("score", bundle, picture, "-o", tmp_path, "--roi", tmp_path / "black.png", code=2)
    assert "black everywhere" in output
    with pytest.raises(UniadFastError, match=r"shape \(2, 3, 4\)"):
        detector.look_at(np.zeros((2, 3, 4)))


def test_training_spends_nothing_outside_of_the_roi(bundle):
    """The loss is that of the tokens that are looked at: what is reconstructed elsewhere does not count."""
    mask = np.zeros((64, 64), bool)
    mask[16:32, 16:48] = True  # two tokens of sixteen
    pipeline = AnomalyDetector.load(bundle).look_at(mask).pipeline
    inside = pipeline.looked_at()
    assert inside.view(4, 4).nonzero().tolist() == [[1, 1], [1, 2]]
    criterion = ReconstructionLoss(pipeline.model, pipeline.mean, pipeline.std, F.mse_loss, "float32", inside)
    tokens = torch.rand(2, 16, pipeline.backbone.channels)
    target = (tokens - pipeline.mean) / pipeline.std
    error = (pipeline.model.eval().reconstruct(target) - target).square()
    torch.testing.assert_close(criterion(tokens), error[:, inside].mean())
    assert abs(criterion(tokens).item() / error.mean().item() - 1) > 1e-3


def test_fit_trains_on_what_is_looked_at(made_up_classes, backbone_weights, tmp_path):
    mask = np.zeros((64, 64), bool)
    mask[16:32, 16:48] = True
    everywhere = fitted(made_up_classes, backbone_weights, tmp_path).fit(made_up_classes, quiet=True)
    inside = fitted(made_up_classes, backbone_weights, tmp_path).look_at(mask).fit(made_up_classes, quiet=True)
    pairs = zip(everywhere.pipeline.model.parameters(), inside.pipeline.model.parameters(), strict=True)
    assert any(not torch.equal(one, other) for one, other in pairs)
