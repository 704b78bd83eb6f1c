"""Bundles that somebody has changed: refused, and the right thing blamed."""

import copy
import hashlib
import json

import pytest
import torch
from conftest import run_command

from uniad_fast import AnomalyDetector
from uniad_fast.detect.bundle import BundleError
from uniad_fast.errors import UniadFastError
from uniad_fast.models.placement import usable_device


def signed(config):
    """With checksums that hold: whoever edits a bundle can compute them too."""
    config = copy.deepcopy(config)
    config.pop("config_sha256", None)
    config["config_sha256"] = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    return json.dumps(config)


def rewritten(bundle, tmp_path, change):
    import shutil

    target = tmp_path / "b"
    shutil.copytree(bundle, target)
    config = json.loads((target / "config.json").read_text())
    change(config)
    (target / "config.json").write_text(signed(config))
    return target


def put(*path):
    *parents, last, value = path

    def change(config):
        for name in parents:
            config = config[name]
        config[last] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        put("settings", None), put("settings", {}), put("settings", "backbone", 5), put("settings", "surplus", 1),
        put("settings", "out_indices", [99]), put("settings", "out_indices", "abc"), put("padded_for", -1),
        put("settings", "stride", 0), put("settings", "stride", None), put("settings", "image_size", 6000),
        put("settings", "image_size", 64.5), put("settings", "image_size", True), put("settings", "image_size", 128),
        put("settings", "image_size", [64, 128]), put("settings", "image_size", [64, 64, 64]),
        put("settings", "seed", "x"), put("settings", "seed", -1), put("settings", "normalization", [1, 2]),
        put("calibration", "threshold", "x"), put("calibration", "threshold", True), put("calibration", {}),
        put("calibration", "surplus", 1), put("classes", "abc"), put("classes", [1]),
        put("settings", "architecture", None), put("settings", "architecture", "hidden_dim", 20_000),
        put("settings", "architecture", "num_encoder_layers", 10**6), put("settings", "architecture", "mask", []),
        put("settings", "architecture", "nhead", 16.0), put("settings", "recipe", "batch_size", 0),
        put("settings", "recipe", []), put("settings", "recipe", "fast"), put("settings", "residual_score", "l3"),
        put("settings", "held_out", None), put("settings", "false_alarm_rate", 7), put("feature_size", [4]),
        put("feature_size", [4, 10**9]), put("feature_size", "ab"), put("version", True), put("version", "3"),
        put("format", None),
    ],
    ids=range(41),
)  # fmt: skip
def test_bundles_whose_configuration_can_not_be_followed(bundle, tmp_path, change):
    with pytest.raises(BundleError):
        AnomalyDetector.load(rewritten(bundle, tmp_path, change))


def test_every_edit_of_a_configuration_is_noticed(bundle, tmp_path):
    import shutil

    for name, change in (
        ("a", put("settings", "architecture", "nhead", 4)),
        ("b", put("calibration", "threshold", 1e9)),
    ):
        target = tmp_path / name
        shutil.copytree(bundle, target)
        config = json.loads((target / "config.json").read_text())
        change(config)
        (target / "config.json").write_text(json.dumps(config))
        with pytest.raises(BundleError, match="damaged or was edited"):
            AnomalyDetector.load(target)


@pytest.mark.parametrize("content", [b"", b"junk", b"\xff" * 8 + b"{}", (10**15).to_bytes(8, "little") + b"{}"])
def test_tensors_that_are_none(bundle, tmp_path, content):
    def change(config):
        config["sha256"] = hashlib.sha256(content).hexdigest()

    target = rewritten(bundle, tmp_path, change)
    (target / "model.safetensors").write_bytes(content)
    with pytest.raises(BundleError, match="can't be read"):
        AnomalyDetector.load(target)


def test_a_configuration_that_is_too_deep(bundle, tmp_path):
    target = rewritten(bundle, tmp_path, lambda _: None)
    (target / "config.json").write_text("[" * 100_000)
    with pytest.raises(BundleError, match="too deeply nested"):
        AnomalyDetector.load(target)


@pytest.mark.parametrize("device", ["cuda", "nope", "meta", "cuda:7"])
def test_a_missing_device_is_not_blamed_on_the_bundle(bundle, tmp_path, device):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for arguments in (["score", bundle, tmp_path, "-o", tmp_path / "o"], ["train", tmp_path, "-o", tmp_path / "b"]):
        code, output = run_command(*arguments, "--device", device)
        assert (
            code == 2
            and f"device '{device}' can't be used here" in output
            and "bundle" not in output.split("error:")[1]
        )
    with pytest.raises(UniadFastError):
        usable_device(device)
