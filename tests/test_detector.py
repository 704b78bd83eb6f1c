"""AnomalyDetector: fit, predict, save, load, on made-up classes."""

import hashlib
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import BACKBONE
from PIL import Image

from uniad_fast import AnomalyDetector, Prediction
from uniad_fast.data.datasets import load_dataset
from uniad_fast.data.image_files import list_images
from uniad_fast.data.images import UnreadableImage
from uniad_fast.data.samples import DataError
from uniad_fast.detect.bundle import BundleError
from uniad_fast.detect.evaluation import evaluate
from uniad_fast.training.recipes import FAST


@pytest.fixture(scope="module")
def settings(backbone_weights, tmp_path_factory):
    return dict(
        backbone=BACKBONE,
        image_size=64,
        backbone_weights=backbone_weights,
        recipe=replace(FAST, epochs=4, min_steps=0, batch_size=8),
        cache_dir=tmp_path_factory.mktemp("cache"),
        false_alarm_rate=0.1,
    )


@pytest.fixture(scope="module")
def detector(settings, made_up_classes):
    return AnomalyDetector(**settings).fit(made_up_classes, quiet=True)


@pytest.fixture(scope="module")
def picture(made_up_classes):
    return made_up_classes / "class1/test/square/000.png"


def image_tensor(path):
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None] / 255


def same(a: Prediction, b: Prediction, tolerance=1e-3) -> bool:
    return abs(a.score - b.score) < tolerance * abs(a.score) and np.allclose(a.anomaly_map, b.anomaly_map, rtol=1e-2)


def test_it_finds_and_locates_what_it_never_saw(detector, made_up_classes):
    evaluation = evaluate(detector, load_dataset(made_up_classes).test, quiet=True)
    assert sorted(evaluation.by_class) == [f"class{i}" for i in range(5)] and not evaluation.notes
    assert evaluation.mean["image_auroc"] > 0.8 and evaluation.mean["pixel_auroc"] > 0.8
    assert detector.classes == tuple(sorted(evaluation.by_class))


def test_predict_takes_every_kind_of_image(detector, picture):
    image = Image.open(picture)
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    one = detector.predict(picture)
    assert isinstance(one, Prediction) and isinstance(one.score, float) and isinstance(one.label, bool)
    assert one.anomaly_map.shape == (64, 64) and one.anomaly_map.dtype == np.float32
    assert one.label == (one.score > detector.calibration.threshold.value)
    for other in (str(picture), image, array, array / 255, tensor, tensor / 255):
        assert same(one, detector.predict(other))
    several = detector.predict([picture, image, array])
    assert len(several) == 3 and all(same(one, p) for p in several)
    assert detector.predict([]) == []


def test_predict_names_what_it_cannot_take(detector, tmp_path):
    (tmp_path / "x.png").write_text("no image")
    with pytest.raises(UnreadableImage, match=r"x\.png"):
        detector.predict(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"\(4, 4, 7\)"):
        detector.predict(np.zeros((4, 4, 7), np.uint8))


def test_a_bundle_gives_the_same_predictions(detector, picture, tmp_path):
    detector.save(tmp_path / "bundle")
    assert sorted(p.name for p in (tmp_path / "bundle").iterdir()) == [
        "config.json",
        "model.safetensors",
        "training.csv",
    ]
    again = AnomalyDetector.load(tmp_path / "bundle")
    assert same(detector.predict(picture), again.predict(picture), 1e-6)
    assert again.calibration == detector.calibration and again.classes == detector.classes
    again.save(tmp_path / "bundle")  # replaces it
    assert same(detector.predict(picture), AnomalyDetector.load(tmp_path / "bundle").predict(picture), 1e-6)
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("image_score", ["mean", "std"])
def test_other_scores(settings, made_up_classes, picture, image_score, tmp_path):
    options = settings | dict(image_score=image_score, residual_score="l2")
    detector = AnomalyDetector(**options).fit(made_up_classes, quiet=True)
    prediction = detector.predict(picture)
    tokens = detector.pipeline.tokens(image_tensor(picture))
    fields = detector.pipeline.fields_of(tokens)
    raw = detector.pipeline.enlarge(detector.pipeline.score_maps(tokens, fields))[0]
    expected = raw.mean() if image_score == "mean" else raw.flatten().std()
    assert prediction.score == pytest.approx(detector.calibration.of_score(expected.item(), fields.item()), rel=1e-3)
    assert prediction.class_name == [*detector.classes, None][fields.item()]
    detector.save(tmp_path / "b")
    assert same(prediction, AnomalyDetector.load(tmp_path / "b").predict(picture), 1e-6)


def test_relative_scores_and_patience(settings, made_up_classes, picture, tmp_path):
    # Nothing is learnt at this rate, so one epoch without progress comes at once.
    recipe = replace(settings["recipe"], learning_rate=1e-12, epochs=9, patience=1)
    detector = AnomalyDetector(**(settings | dict(recipe=recipe, residual_score="relative"))).fit(
        made_up_classes, quiet=True
    )
    assert detector.trained.training_log.splitlines()[-1].split(",")[1] == "1"  # the second epoch
    typical = detector.pipeline.residual_score.typical
    assert typical.shape == (4, 4) and typical.min() > 0 and typical.std() > 0
    detector.save(tmp_path / "b")
    again = AnomalyDetector.load(tmp_path / "b")
    assert torch.equal(again.pipeline.residual_score.typical, typical)
    assert same(detector.predict(picture), again.predict(picture), 1e-6)


def test_a_list_of_files_will_do(settings, made_up_classes):
    files = list_images(made_up_classes / "class0/train/good")
    assert AnomalyDetector(**settings).fit(files, quiet=True).classes == ("unnamed",)


def test_the_papers_score_is_the_l2_norm(settings, made_up_classes, picture):
    detector = AnomalyDetector(**(settings | dict(residual_score="l2"))).fit(made_up_classes, quiet=True)
    pipeline = detector.pipeline
    tokens = pipeline.tokens(torch.rand(1, 3, 64, 64))
    residual = pipeline.residual(tokens)
    torch.testing.assert_close(pipeline.score_maps(tokens), residual.square().sum(1).sqrt())
    back = (pipeline.reconstruction(tokens) - tokens.transpose(1, 2).unflatten(2, (4, 4))) / pipeline.std[:, None, None]
    torch.testing.assert_close(back, residual, rtol=1e-3, atol=1e-3)


def test_unreadable_training_images_are_listed(settings, made_up_classes, tmp_path):
    root = tmp_path / "mine"
    shutil.copytree(made_up_classes / "class0/train/good", root)
    (root / "torn.png").write_text("no image")
    detector = AnomalyDetector(**settings).fit(root, quiet=True)
    assert len(detector.unreadable) == 1 and "torn.png" in detector.unreadable[0]


@pytest.mark.parametrize("kind", ["one", "none_readable"])
def test_too_few_images(settings, tmp_path, kind):
    root = tmp_path / "few"
    root.mkdir()
    for index in range(1 if kind == "one" else 3):
        (root / f"{index}.png").write_text("no image")
    with pytest.raises(DataError, match="at least two"):
        AnomalyDetector(**settings).fit(root, quiet=True)


def test_before_training():
    with pytest.raises(RuntimeError, match="not trained"):
        AnomalyDetector("resnet10t").predict(np.zeros((4, 4), np.uint8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(recipe="slow"), "'slow'"),
        (dict(residual_score="l1"), "'l1'"),
        (dict(image_score="median"), "'median'"),
        (dict(false_alarm_rate=0), "0"),
        (dict(held_out=1), "1"),
        (dict(image_size=8), "8"),
    ],
    ids=str,
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        AnomalyDetector(**options)


def change_json(**changes):
    return rewrite(lambda config: config | changes)


def change_settings(**changes):
    return rewrite(lambda config: config | {"settings": config["settings"] | changes})


def rewrite(change):
    def damage(bundle):
        config = json.loads((bundle / "config.json").read_text())
        config = change(config)
        del config["config_sha256"]  # whoever edits can make a checksum too
        config["config_sha256"] = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
        (bundle / "config.json").write_text(json.dumps(config))

    return damage


def flip_a_byte(bundle):
    content = bytearray((bundle / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (bundle / "model.safetensors").write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "is not a folder"),
        (lambda b: (b / "config.json").unlink(), "has no config.json"),
        (lambda b: (b / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda b: (b / "config.json").write_text("{"), "is damaged"),
        (change_json(format="other"), "not the configuration of a bundle"),
        (change_json(version=99), "version 99"),
        (change_json(calibration={}), "damaged bundle"),
        (change_settings(image_size=96), "damaged bundle"),
        (change_settings(recipe={"name": "x"}), "damaged bundle"),
        (flip_a_byte, "checksum"),
    ],
)
def test_damaged_bundles_say_what_is_wrong(detector, tmp_path, damage, message):
    bundle = tmp_path / "bundle"
    detector.save(bundle)
    damage(bundle)
    with pytest.raises(BundleError, match=message):
        AnomalyDetector.load(bundle)


def test_saving_never_replaces_something_else(detector, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/holiday.png").touch()
    (tmp_path / "file").touch()
    for name in ("photos", "file"):
        with pytest.raises(BundleError, match=name):
            detector.save(tmp_path / name)
    assert (tmp_path / "photos/holiday.png").exists()


def test_a_failed_save_leaves_the_old_bundle(detector, picture, tmp_path, monkeypatch):
    detector.save(tmp_path / "bundle")
    monkeypatch.setattr("uniad_fast.detect.bundle.save_file", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        detector.save(tmp_path / "bundle")
    assert same(detector.predict(picture), AnomalyDetector.load(tmp_path / "bundle").predict(picture), 1e-6)
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_good_images_do_not_glow(detector, made_up_classes):
    """The colours of held-out good images stay in the lower half, defects go beyond."""
    low, high = detector.calibration.color_range
    middle = (low + high) / 2
    good = detector.predict(list_images(made_up_classes / "class1/test/good"))
    bad = detector.predict(list_images(made_up_classes / "class1/test/square"))
    assert np.mean([p.anomaly_map > middle for p in good]) < 0.02
    assert np.mean([p.anomaly_map > middle for p in bad]) > 5 * np.mean([p.anomaly_map > middle for p in good])
