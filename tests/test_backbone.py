"""Frozen features and the weight files that they come from."""

import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from uniad_fast.models.backbone import Backbone
from uniad_fast.state_dicts import WeightsError, packaged_backbone_weights, read_state_dict

LITE0 = "tf_efficientnet_lite0"


def test_features_are_timms_stages_resized_and_concatenated(backbone_weights):
    backbone = Backbone.pretrained("resnet10t", 96, backbone_weights)
    whole = timm.create_model("resnet10t", features_only=True, out_indices=(0, 1, 2, 3)).eval()
    state = torch.load(backbone_weights, weights_only=True)
    whole.load_state_dict({name: state[name] for name in whole.state_dict()})
    images = torch.rand(2, 3, 96, 96)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        stages = whole((images - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    expected = torch.cat([F.interpolate(s, (6, 6), mode="bilinear", align_corners=True) for s in stages], dim=1)
    torch.testing.assert_close(backbone(images), expected, rtol=1e-4, atol=1e-4)
    assert backbone.feature_size(96) == (6, 6) and backbone.stride == 16 and backbone.channels == expected.shape[1]


def test_the_papers_backbone():
    """b4 at 224: 24 + 32 + 56 + 160 channels on a 14 x 14 grid, with ImageNet's normalisation. Random weights."""
    features = timm.create_model("tf_efficientnet_b4", features_only=True, out_indices=(0, 1, 2, 3))
    backbone = Backbone("tf_efficientnet_b4", features, (0, 1, 2, 3))
    assert backbone.channels == 272 and backbone.stride == 16 and backbone.feature_size(224) == (14, 14)
    assert backbone.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])


def test_packaged_weights_in_efficientnet_pytorch_names_load():
    backbone = Backbone.pretrained(LITE0, 64)
    assert backbone.channels == 16 + 24 + 40 + 112
    file = torch.load(packaged_backbone_weights(LITE0), weights_only=True)
    ours = backbone.features.state_dict()
    torch.testing.assert_close(ours["conv_stem.weight"], file["_conv_stem.weight"])
    torch.testing.assert_close(ours["blocks.0.0.conv_dw.weight"], file["_blocks.0._depthwise_conv.weight"])
    assert backbone.mean.flatten().tolist() == [0.5, 0.5, 0.5]  # what timm says lite0 was trained with


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weight_files_of_either_kind_give_the_same_backbone(tmp_path, backbone_weights, suffix):
    path = tmp_path / f"w{suffix}"
    state = torch.load(backbone_weights, weights_only=True)
    save_file(state, path) if suffix == ".safetensors" else torch.save({"state_dict": state}, path)
    same = Backbone.pretrained("resnet10t", 64, path)
    assert same.fingerprint() == Backbone.pretrained("resnet10t", 64, backbone_weights).fingerprint()


def test_it_stays_frozen(backbone_weights):
    backbone = Backbone.pretrained("resnet10t", 64, backbone_weights)
    before = backbone.fingerprint()
    torch.nn.Sequential(backbone).train()
    assert not backbone(torch.rand(2, 3, 64, 64)).requires_grad
    assert not any(module.training for module in backbone.modules())
    assert backbone.fingerprint() == before


def test_a_backbone_with_channels_last_and_a_fixed_input():
    features = timm.create_model("swin_tiny_patch4_window7_224", features_only=True, out_indices=(0, 1, 2))
    backbone = Backbone("swin_tiny_patch4_window7_224", features, (0, 1, 2))
    assert backbone.channels == 96 + 192 + 384 and backbone.feature_size(224) == (14, 14)


def test_it_goes_through_its_state(backbone_weights):
    backbone = Backbone.pretrained("resnet10t", 64, backbone_weights)
    again = Backbone.from_state("resnet10t", 64, backbone.out_indices, backbone.features.state_dict())
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(backbone(images), again(images))


class Hostile:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code in a weight file was run')",))


BAD_FILES = {
    "empty": (b"", "not a weight file"),
    "text": (b"not a weight file at all", "not a weight file"),
    "pickle": (pickle.dumps(Hostile(), protocol=2), "not a weight file"),
    "missing": (None, "no weight file at"),
}
BAD_TORCH_FILES = {
    "code": ({"state_dict": Hostile()}, "not a weight file"),
    "list": ([1, 2], "dict of tensors"),
    "numbers": ({"a": 1}, "dict of tensors"),
    "nothing": ({}, "dict of tensors"),
}


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        pytest.param(suffix, *case, id=f"{name}{suffix}")
        for suffix in (".pth", ".safetensors")
        for name, case in BAD_FILES.items()
    ]
    + [pytest.param(".pth", *case, id=f"torch_{name}") for name, case in BAD_TORCH_FILES.items()],
)
def test_bad_weight_files_are_named_and_run_nothing(tmp_path, suffix, content, message):
    path = tmp_path / f"bad{suffix}"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(WeightsError, match=message) as error:
        read_state_dict(path)
    assert str(path) in str(error.value)


def test_weights_that_do_not_fit_are_listed(tmp_path, backbone_weights):
    state = torch.load(backbone_weights, weights_only=True)
    state["conv1.0.weight"] = torch.zeros(3, 3)
    state["extra"] = state.pop("fc.bias")
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(WeightsError) as error:
        Backbone.pretrained("resnet10t", 64, tmp_path / "w.pth")
    for part in ("missing fc.bias (1000,)", "unexpected extra (1000,)", "conv1.0.weight is (3, 3), expected"):
        assert part in str(error.value)
    with pytest.raises(WeightsError, match=r"64 tensors(?s:.)*missing blocks.0.0.se.conv_reduce.weight"):
        Backbone.pretrained("tf_efficientnet_b0", 64, packaged_backbone_weights(LITE0))


def test_unknown_names_and_no_weights(monkeypatch):
    with pytest.raises(ValueError, match="timm has no model 'efficientnet_b4x'"):
        Backbone.pretrained("efficientnet_b4x", 64)

    def offline(*args, **kwargs):
        if kwargs.get("pretrained"):
            raise OSError("no network")
        return create(*args, **kwargs)

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(WeightsError, match="--backbone-weights FILE"):
        Backbone.pretrained("resnet10t", 64)
