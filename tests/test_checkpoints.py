"""Checkpoints of other codebases: they load strictly, score as the original, and go back."""

import pickle
import sys
import types

import numpy as np
import public_efficientnet
import pytest
import timm
import torch
import torch.nn.functional as F
from public_checkpoints import GRID, SIDE, network, public_state, under

from uniad_fast import AnomalyDetector, UniAD
from uniad_fast.interop import checkpoints as checkpoints
from uniad_fast.models.backbone import Backbone
from uniad_fast.models.efficientnet import _MODELS, native_size, public_names, recognize
from uniad_fast.state_dicts import WeightsError
from uniad_fast.testing import PublicUniAD

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


class EasyDict(dict):
    """As the package easydict has it: what is set is an item and an attribute."""

    def __init__(self, **items):
        super().__init__()
        for name, value in items.items():
            setattr(self, name, EasyDict(**value) if isinstance(value, dict) else value)

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        super().__setitem__(name, value)


@pytest.fixture
def easydict(monkeypatch):
    """EasyDict as its package pickles it; that package is not there when the file is read."""
    module = types.ModuleType("easydict")
    module.EasyDict = EasyDict
    monkeypatch.setitem(sys.modules, "easydict", module)
    monkeypatch.setattr(EasyDict, "__module__", "easydict")
    return EasyDict


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))


def expected_maps(frozen_features, images, net=None):
    """[B, S, S] and image scores, as the original computes them from normalised images."""
    with torch.no_grad():
        normalized = (images - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)
        pred = (net or network())({"feature_align": frozen_features(normalized)})["pred"]
    return pred[:, 0], F.avg_pool2d(pred, 16, stride=1).amax(dim=(1, 2, 3))


def assert_scores_as(detector, maps, scores, images):
    predictions = detector.judge(detector.pipeline(images))
    ours = torch.stack([torch.from_numpy(p.anomaly_map) for p in predictions])
    torch.testing.assert_close(ours, maps, rtol=1e-4, atol=1e-4)
    assert [p.score for p in predictions] == pytest.approx(scores.tolist(), rel=1e-4)
    assert all(p.label is None for p in predictions) and not detector.is_calibrated


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_the_public_checkpoint(tmp_path, backbone_tensors, images, easydict, monkeypatch, zipped):
    path = tmp_path / "ckpt.pth.tar"
    arch = easydict(net=[easydict(name="backbone", kwargs={"outlayers": [1, 2, 3, 4]})], version="v1")
    optimizer = {"state": {0: {"step": 1, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    content = {"epoch": 3, "arch": arch, "state_dict": public_state(backbone_tensors), "optimizer": optimizer}
    content["best_metric"] = np.float64(0.97)
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    monkeypatch.delitem(sys.modules, "easydict")
    detector = checkpoints.load(path)
    assert isinstance(detector, AnomalyDetector) and detector.settings.image_size == (SIDE, SIDE)
    assert detector.settings.backbone == "tf_efficientnet_b4" and detector.pipeline.backbone.padded_for == 380
    assert (
        detector.settings.architecture.num_encoder_layers == 2 and detector.settings.architecture.dim_feedforward == 48
    )
    assert "easydict" not in sys.modules

    def frozen(x):
        return public_efficientnet.features(backbone_tensors, x)

    torch.testing.assert_close(
        detector.pipeline.backbone(images),
        frozen((images - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)),
        rtol=1e-4,
        atol=1e-4,
    )
    maps, scores = expected_maps(frozen, images)
    assert_scores_as(detector, maps, scores, images)
    detector.save(tmp_path / "bundle")  # the padding, the widths and the missing threshold are in it
    for again in (AnomalyDetector.load(tmp_path / "bundle"), checkpoints.load(tmp_path / "bundle")):
        assert_scores_as(again, maps, scores, images)


def test_the_padding_is_worth_its_trouble(backbone_tensors, images):
    """Padded for the image instead, stages 3 and on differ, at this size as at 224."""
    as_trained = Backbone.from_state("tf_efficientnet_b4", SIDE, None, backbone_tensors, 380)(images)
    as_timm_does = Backbone.from_state("tf_efficientnet_b4", SIDE, None, backbone_tensors)(images)
    torch.testing.assert_close(as_trained[:, :56], as_timm_does[:, :56])
    assert (as_trained - as_timm_does)[:, 56:].norm() > 1e-3 * as_trained[:, 56:].norm()
    by_hand = public_efficientnet.features(backbone_tensors, (images - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1), SIDE)
    torch.testing.assert_close(as_timm_does, by_hand, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wrapped", [True, False])
def test_aders_checkpoint(tmp_path, images, wrapped):
    torch.manual_seed(1)
    frozen = timm.create_model("tf_efficientnet_b4", features_only=True, out_indices=(0, 1, 2, 3)).eval()
    state = under("net_backbone.", frozen.state_dict()) | under("net_ad.", network().state_dict())
    recorder = {"mAUROC_sp_max": [np.float64(0.5)], "by_class": {"bottle": [0.5]}}
    content = {"net": state, "optimizer": {"state": {}}, "scaler": None, "metric_recorder": recorder}
    torch.save(content if wrapped else state, tmp_path / "ckpt.pth")
    detector = checkpoints.load(tmp_path / "ckpt.pth")
    assert detector.pipeline.backbone.padded_for is None

    def features(normalized):
        stages = frozen(normalized)
        return torch.cat([F.interpolate(s, GRID, mode="bilinear", align_corners=True) for s in stages], dim=1)

    assert_scores_as(detector, *expected_maps(features, images), images)


def test_a_network_alone(tmp_path, backbone_tensors, images):
    torch.save(network().state_dict(), tmp_path / "network.pth")
    model = checkpoints.load_network(tmp_path / "network.pth")
    feature = torch.randn(2, 272, *GRID)
    assert isinstance(model, UniAD) and not model.training
    with torch.no_grad():
        torch.testing.assert_close(
            model({"feature_align": feature})["pred"],
            network()({"feature_align": feature})["pred"],
            rtol=1e-4,
            atol=1e-4,
        )
    torch.save(backbone_tensors, tmp_path / "b4.pth")
    detector = checkpoints.load(
        tmp_path / "network.pth", backbone="tf_efficientnet_b4", backbone_weights=tmp_path / "b4.pth"
    )
    maps = expected_maps(lambda x: public_efficientnet.features(backbone_tensors, x, SIDE), images)
    assert_scores_as(detector, *maps, images)


def test_what_tensors_do_not_tell_can_be_said(tmp_path, backbone_tensors, images):
    torch.manual_seed(2)
    other = PublicUniAD(272, 16, GRID, (5, 3), hidden_dim=32, layers=2, dim_feedforward=48, nhead=4).eval()
    state = under("backbone.", backbone_tensors) | under("reconstruction.", other.state_dict())
    torch.save({"state_dict": state}, tmp_path / "c.pth")
    maps = expected_maps(lambda x: public_efficientnet.features(backbone_tensors, x), images, other)
    assert_scores_as(
        checkpoints.load(tmp_path / "c.pth", not_in_tensors=checkpoints.NotInTensors(4, (5, 3))), *maps, images
    )
    kwargs = {
        "hidden_dim": 32, "nhead": 4, "num_encoder_layers": 2, "num_decoder_layers": 2, "dim_feedforward": 48,
        "neighbor_mask": {"neighbor_size": [5, 3], "mask": [True] * 3}, "pos_embed_type": "learned",
    }  # fmt: skip
    config = {
        "net": [
            {"name": "backbone", "type": "models.backbones.efficientnet_b4", "kwargs": {"outlayers": [1, 2, 3, 4]}},
            {"name": "neck", "kwargs": {"outstrides": [16]}},
            {"name": "reconstruction", "type": "models.reconstructions.UniAD", "kwargs": kwargs},
        ]
    }
    assert_scores_as(checkpoints.load(tmp_path / "c.pth", config=config), *maps, images)


def test_backbones_alone(tmp_path, backbone_tensors, images):
    torch.save(backbone_tensors, tmp_path / "b4.pth")
    frozen = checkpoints.load_backbone(tmp_path / "b4.pth", image_size=SIDE)
    assert isinstance(frozen, Backbone) and frozen.name == "tf_efficientnet_b4" and frozen.feature_size(SIDE) == GRID
    stem = frozen.features.state_dict()["conv_stem.weight"]
    torch.testing.assert_close(stem, backbone_tensors["_conv_stem.weight"])


@pytest.mark.parametrize("name", _MODELS)
def test_every_efficientnet_is_told_apart(name):
    with torch.device("meta"):
        state = timm.create_model(name).state_dict()
    public = {public: state[own] for own, public in public_names(state).items()}
    assert len(public) == len(state) and recognize(public) == name and recognize(state) == name
    if "lite" not in name:
        assert timm.get_pretrained_cfg(name).input_size[1] == native_size(name)


def test_what_does_not_fit_is_listed_and_nothing_loaded(tmp_path, backbone_tensors):
    state = public_state(backbone_tensors)
    state["module.reconstruction.output_proj.bias"] = torch.zeros(7)
    state["module.reconstruction.surplus"] = torch.zeros(2)
    del state["module.reconstruction.transformer.decoder.layers.1.norm3.weight"]
    torch.save({"state_dict": state}, tmp_path / "c.pth")
    with pytest.raises(WeightsError) as error:
        checkpoints.load(tmp_path / "c.pth")
    for part in (
        "3 tensors",
        "output_proj.bias is (7,), expected (272,)",
        "unexpected surplus (2,)",
        "missing transformer.decoder.layers.1.norm3.weight (32,)",
    ):
        assert part in str(error.value)
    state = public_state(backbone_tensors)
    state["module.backbone._blocks.9._bn1.weight"] = torch.zeros(3)
    state["module.backbone._other.weight"] = state.pop("module.backbone._blocks.3._bn1.bias")
    torch.save({"state_dict": state}, tmp_path / "c.pth")
    with pytest.raises(WeightsError, match=r"weight is \(3,\)(?s:.)*missing blocks.1.1.bn2.bias(?s:.)*unexpected _o"):
        checkpoints.load(tmp_path / "c.pth")
    torch.save(
        {"state_dict": public_state(backbone_tensors) | {"module.teacher.w": torch.zeros(1)}}, tmp_path / "c.pth"
    )
    with pytest.raises(WeightsError, match=r"unexpected teacher\.w \(1,\)"):
        checkpoints.load(tmp_path / "c.pth")


class Hostile:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code in a checkpoint was run')",))


def test_damaged_and_hostile_files_are_refused(tmp_path, backbone_tensors):
    path = tmp_path / "c.pth"

    def refused(match):
        with pytest.raises(WeightsError, match=match) as error:
            checkpoints.load(path)
        assert str(path) in str(error.value)

    torch.save({"state_dict": public_state(backbone_tensors)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused("not a weight file")
    path.write_bytes(b"")
    refused("not a weight file")
    path.write_bytes(pickle.dumps(Hostile()))
    refused("not a weight file")
    torch.save({"state_dict": public_state(backbone_tensors), "arch": Hostile()}, path)
    refused(r"asks for (builtins\.)?exec, which is not a tensor")
    torch.save({"state_dict": {"encoder.0.weight": torch.zeros(3)}}, path)
    refused("of no known layout(?s:.)*but encoder.0.weight")
    torch.save({"epoch": 3}, path)
    refused("does not hold a dict of tensors")
    path.unlink()
    refused("no weight file")
