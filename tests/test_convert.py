"""uniad-fast convert, and checkpoints written back."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import call
from public_checkpoints import SIDE, network, public_state
from safetensors.torch import load_file

from uniad_fast import AnomalyDetector
from uniad_fast.data.image_files import list_images
from uniad_fast.interop import checkpoints as checkpoints
from uniad_fast.state_dicts import read_state_dict
from uniad_fast.training.recipes import FAST


@pytest.mark.parametrize("suffix", [".pth.tar", ".safetensors"])
def test_back_to_the_public_names(tmp_path, backbone_tensors, suffix):
    torch.save({"state_dict": public_state(backbone_tensors)}, tmp_path / "c.pth")
    detector = checkpoints.load(tmp_path / "c.pth")
    path = tmp_path / f"again{suffix}"
    assert checkpoints.save(detector, path) == []
    given = public_state(backbone_tensors)
    written = load_file(path) if suffix == ".safetensors" else torch.load(path, weights_only=True)["state_dict"]
    classifier = re.compile(r"module\.backbone\.(_conv_head|_bn1|_fc)\.")
    counters = {name for name in given if name.endswith("num_batches_tracked")}
    assert set(written) == {name for name in given if not classifier.match(name)}
    assert all(torch.equal(written[name], given[name]) for name in set(written) - counters)
    white = torch.ones(3, SIDE, SIDE)
    assert checkpoints.load(path).predict(white).score == pytest.approx(detector.predict(white).score)
    assert "pads for the image" in checkpoints.save(detector, tmp_path / "ader.pth", "ader")[0]
    assert all(name.startswith(("net_backbone.", "net_ad.")) for name in read_state_dict(tmp_path / "ader.pth"))


def test_standardised_features_are_undone_on_the_way_out(tmp_path, backbone_weights, made_up_classes):
    recipe = replace(FAST.with_epochs(1), precision="float32")
    detector = AnomalyDetector("resnet10t", 64, backbone_weights=backbone_weights, cache_dir=tmp_path, recipe=recipe)
    detector.fit(made_up_classes, quiet=True)
    differs = checkpoints.save(detector, tmp_path / "n.pth", "reconstruction")
    assert len(differs) == 1 and differs[0].startswith("scores:")
    model = checkpoints.load_network(tmp_path / "n.pth")
    tokens = detector.pipeline.tokens(torch.rand(2, 3, 64, 64))
    with torch.no_grad():
        there = model.reconstruct(tokens).transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(there, detector.pipeline.reconstruction(tokens), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="needs|holds a backbone"):
        checkpoints.save(model, tmp_path / "m.pth", "uniad")
    with pytest.raises(ValueError, match="'onnx'"):
        checkpoints.save(detector, tmp_path / "m.pth", "onnx")


def test_convert(tmp_path, backbone_tensors, made_up_classes):
    torch.save({"state_dict": public_state(backbone_tensors)}, tmp_path / "c.pth.tar")
    output = call("convert", tmp_path / "c.pth.tar", "-o", tmp_path / "bundle")
    assert "tf_efficientnet_b4, padded for 380 pixels, 6 x 6 tokens, 96 pixels" in output and "no threshold" in output
    pictures = made_up_classes / "class0/test/square"
    assert "has no threshold" in call("score", tmp_path / "bundle", pictures, "-o", tmp_path / "s", code=2)
    call("score", tmp_path / "bundle", pictures, "-o", tmp_path / "s", "--threshold", 1e9, "--no-heat-maps", "-q")
    options = ["--good", made_up_classes / "class0/train/good", "--cache", tmp_path / "cache", "-q"]
    output = call("convert", tmp_path / "c.pth.tar", "-o", tmp_path / "bundle", *options)
    assert "threshold " in output and "no threshold" not in output
    threshold = AnomalyDetector.load(tmp_path / "bundle").calibration.threshold
    good = AnomalyDetector.load(tmp_path / "bundle").predict(list_images(made_up_classes / "class0/train/good"))
    scores = [p.score for p in good]
    assert np.median(scores) == pytest.approx(0, abs=1e-3)  # of what it was calibrated by
    assert threshold.extrapolated and threshold.value > max(scores)
    call("score", tmp_path / "bundle", pictures, "-o", tmp_path / "s", "--threshold", 1e9, "-q")
    assert len(list_images(tmp_path / "s/heatmaps")) == 4
    assert "wrote" in call("convert", tmp_path / "bundle", "-o", tmp_path / "back.pth.tar", "--to", "uniad")
    assert checkpoints.load(tmp_path / "back.pth.tar").pipeline.backbone.padded_for == 380


def test_convert_says_what_it_cannot(tmp_path, backbone_tensors):
    torch.save(network().state_dict(), tmp_path / "n.pth")
    assert "a network alone: name the backbone" in call("convert", tmp_path / "n.pth", "-o", tmp_path / "b", code=2)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    assert "other content" in call("convert", tmp_path / "n.pth", "-o", tmp_path / "full", code=2)
    assert not (tmp_path / "b").exists()
