"""Our EfficientNets are timm's: names, shapes, bits. Scoring with them does not import timm."""

import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from conftest import call, save, striped_picture

from uniad_fast.models.backbone import Backbone
from uniad_fast.models.efficientnet import pad_as_for
from uniad_fast.models.efficientnet_features import (
    _SCALES,
    EfficientNetFeatures,
    default_levels,
    is_native,
    with_folded_norms,
)
from uniad_fast.models.prepared import prepared
from uniad_fast.state_dicts import without_values

NAMES = [f"tf_efficientnet_{size}" for size in _SCALES]
ALL = (0, 1, 2, 3, 4)


@pytest.mark.parametrize("name", NAMES)
def test_tensors_and_levels_are_timms(name):
    with without_values():
        theirs = timm.create_model(name, features_only=True, out_indices=ALL)
        ours = EfficientNetFeatures(name, ALL)
    shapes = [{n: tuple(t.shape) for n, t in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1] and list(shapes[0]) == list(shapes[1])
    assert ours.feature_info.channels() == theirs.feature_info.channels()
    assert ours.feature_info.reduction() == theirs.feature_info.reduction()
    for entry in ("mean", "std"):
        assert ours.pretrained_cfg[entry] == timm.get_pretrained_cfg(name).to_dict()[entry]


def with_statistics(features):
    """Norms that do something."""
    for module in features.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.1)
    return features.eval().to(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "tf_efficientnet_b1"])
@pytest.mark.parametrize("padded_for", [None, 80])
def test_features_are_timms_to_the_bit(name, padded_for):
    theirs = with_statistics(timm.create_model(name, features_only=True, out_indices=ALL))
    state = theirs.state_dict()
    if padded_for:
        pad_as_for(theirs, padded_for)
    for levels in (ALL, (1, 3)):
        ours = EfficientNetFeatures(name, levels).eval()
        ours.load_state_dict(state)
        ours.to(memory_format=torch.channels_last)
        if padded_for:
            pad_as_for(ours, padded_for)
        for side in (64, 97):
            images = torch.rand(2, 3, side, side).contiguous(memory_format=torch.channels_last)
            with torch.no_grad():
                stages = theirs(images)
                for level, mine in zip(levels, ours(images), strict=True):
                    assert torch.equal(mine, stages[level]), (level, side)


def test_a_backbone_of_one_is_native_and_keeps_its_fingerprint():
    name = "tf_efficientnet_b0"
    theirs = with_statistics(timm.create_model(name, features_only=True, out_indices=default_levels()))
    frozen = Backbone.from_state(name, 64, None, theirs.state_dict())
    assert isinstance(frozen.features, EfficientNetFeatures) and frozen.out_indices == default_levels()
    assert frozen.fingerprint() == Backbone(name, theirs, default_levels()).fingerprint()
    with pytest.raises(ValueError, match="has no feature levels"):
        Backbone.from_state(name, 64, (0, 7), theirs.state_dict())
    assert not is_native("efficientnet_b0") and not is_native("tf_efficientnet_el")


def test_scoring_with_one_does_not_import_timm(tmp_path):
    """timm's import is more than half of what a cold start would take."""

    generator = np.random.default_rng(0)
    for index in range(4):
        save(striped_picture(generator, index, False)[0], tmp_path / "good" / f"{index}.png")
    weights = tmp_path / "weights.pth"
    torch.save(timm.create_model("tf_efficientnet_b0").state_dict(), weights)
    options = [
        "--backbone",
        "tf_efficientnet_b0",
        "--backbone-weights",
        weights,
        "--image-size",
        64,
        "--epochs",
        1,
        "-q",
    ]
    call("train", tmp_path / "good", "-o", tmp_path / "b", "--cache", tmp_path / "cache", *options)
    code = (
        "import sys; from uniad_fast.cli.main import app; app(sys.argv[1:], standalone_mode=False); "
        "print(sorted({'timm', 'torchvision'} & set(sys.modules)))"
    )
    command = ["score", tmp_path / "b", tmp_path / "good", "-o", tmp_path / "o", "--threshold", 1e9, "-q"]
    result = subprocess.run([sys.executable, "-c", code, *map(str, command)], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "[]", result.stdout + result.stderr


def with_mean(features):
    features.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    return features


@pytest.mark.parametrize(("name", "levels"), [("tf_efficientnet_b0", (1, 3)), ("tf_efficientnet_lite0", ALL)])
def test_folded_norms_give_the_same_features(name, levels):
    torch.manual_seed(0)
    features = EfficientNetFeatures(name, levels).eval()
    for module in features.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 2)
            module.bias.data.normal_(0, 0.2)
    state = {key: tensor.clone() for key, tensor in features.state_dict().items()}
    folded = with_folded_norms(features)
    images = torch.randn(2, 3, 65, 64)
    with torch.inference_mode():
        for expected, found in zip(features(images), folded(images), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    own = prepared(Backbone(name, with_mean(features), levels), "bfloat16")  # shares what is not folded
    found = own(torch.rand(1, 3, 64, 64))
    assert found.dtype == torch.float32 and found.isfinite().all()
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    assert all(torch.equal(tensor, state[key]) for key, tensor in features.state_dict().items())
