"""What is handed in is trusted in nothing: names, bundles, checkpoints, configurations; and what commands then say."""

import pytest
import torch
import yaml
from conftest import run_command
from test_public_config import TEXT

from uniad_fast import AnomalyDetector
from uniad_fast.detect.public_config import ConfigError, read_config
from uniad_fast.errors import UniadFastError
from uniad_fast.interop import checkpoints as weights
from uniad_fast.state_dicts import WeightsError


def network(**changes):
    from uniad_fast import UniAD

    options = dict(
        inplanes=[6], instrides=[16], feature_size=(3, 3), feature_jitter=None, neighbor_mask=None, hidden_dim=8,
        pos_embed_type="learned", save_recon=None, initializer=None, nhead=2, num_encoder_layers=1,
        num_decoder_layers=1, dim_feedforward=8,
    )  # fmt: skip
    state = dict(UniAD(**options).state_dict())
    for name, tensor in changes.items():
        state[name.replace("__", ".")] = tensor
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(input_proj__weight=torch.zeros(3)), "another shape"),
        (dict(transformer__decoder__layers__0__learned_embed__weight=torch.zeros(())), "another shape"),
        (dict(transformer__encoder__layers__0__linear2__weight=torch.zeros(4)), "another shape"),
        (dict(input_proj__bias=torch.full((8,), float("nan"))), "input_proj.bias is not finite"),
        (dict(input_proj__bias=torch.zeros(8, dtype=torch.int64)), "is torch.int64, expected torch.float32"),
        (dict(input_proj__bias=torch.zeros(8, dtype=torch.complex64)), "expected torch.float32"),
        (dict(transformer__encoder__layers__999999999__x=torch.zeros(1)), "from 1 to 64"),
        (dict(evil=torch.zeros(1)), "unexpected evil"),
    ],
    ids=range(8),
)  # fmt: skip
def test_tensors_that_do_not_fit(tmp_path, change, message):
    torch.save(network(**change), tmp_path / "c.pth")
    with pytest.raises(UniadFastError, match=message):
        weights.load(tmp_path / "c.pth", not_in_tensors=weights.NotInTensors(2))


def test_names_of_tensors_are_made_fit_and_lists_end(tmp_path):
    state = network() | {0: torch.zeros(1)}
    torch.save(state, tmp_path / "key.pth")
    with pytest.raises(WeightsError, match="does not hold a dict of tensors"):
        weights.load(tmp_path / "key.pth")
    torch.save(network() | {f"\x1b[31m{i}": torch.zeros(1) for i in range(500)}, tmp_path / "names.pth")
    with pytest.raises(WeightsError) as caught:
        weights.load(tmp_path / "names.pth", not_in_tensors=weights.NotInTensors(2))
    assert "\x1b" not in str(caught.value) and "and 460 more" in str(caught.value)


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ([{"name": "reconstruction", "type": "models.reconstructions.Other", "kwargs": {}}], "not UniAD's network"),
        (
            [{"name": "reconstruction", "type": "models.reconstructions.UniAD", "kwargs": {"sum_layers": 1}}],
            "sum_layers",
        ),
    ],
)
def test_a_checkpoints_own_record_of_its_network_is_believed(tmp_path, arch, message):
    torch.save({"state_dict": network(), "arch": arch, "epoch": 1}, tmp_path / "c.pth")
    with pytest.raises(ConfigError, match=message):
        weights.load(tmp_path / "c.pth", not_in_tensors=weights.NotInTensors(2))
    arch[0] |= {"type": "models.reconstructions.UniAD", "kwargs": {"hidden_dim": 8, "inplanes": [6]}}
    torch.save({"state_dict": network(), "arch": arch, "epoch": 1}, tmp_path / "c.pth")
    assert weights.load_network(tmp_path / "c.pth", weights.NotInTensors(2))


def test_nothing_is_overwritten_by_a_conversion(bundle, tmp_path):
    (tmp_path / "precious.pth").write_text("years of work")
    code, output = run_command("convert", bundle, "--to", "ader", "-o", tmp_path / "precious.pth")
    assert code == 2 and "is there already" in output and (tmp_path / "precious.pth").read_text() == "years of work"
    code, output = run_command("convert", bundle, "--to", "ader", "-o", tmp_path / "none/x.pth")
    assert code == 2 and "is not a folder" in output


@pytest.mark.parametrize(
    "extra", [["--heads", "3"], ["--image-size", "96"], ["--backbone", "nope"], ["--window", "3", "3"]]
)
def test_options_that_would_not_be_followed_are_refused(bundle, tmp_path, extra):
    code, output = run_command("convert", bundle, "-o", tmp_path / "x", *extra)
    assert code == 2 and f"{extra[0]} would not be followed" in output


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("dataset",), None, "dataset must be a mapping"),
        (("trainer",), [], "trainer must be a mapping"),
        (("trainer", "optimizer"), None, "trainer.optimizer must be a mapping"),
        (("dataset", "input_size"), 224, "input_size must be"),
        (("dataset", "input_size"), ["a", "a"], "input_size must be"),
        (("dataset", "pixel_std"), [0, 0, 0], "pixel_std must be finite and above 0"),
        (("dataset", "pixel_mean"), [0.1, 0.2], "pixel_mean must be three numbers"),
        (("dataset", "pixel_mean"), [0.1, 0.2, float("nan")], "pixel_mean must be finite"),
        (("dataset", "batch_size"), 0, "batch_size must be an integer from 1"),
        (("trainer", "max_epoch"), -3, "epochs must be an integer from 0"),
        (("trainer", "clip_max_norm"), float("nan"), "clip must be a number"),
        (("trainer", "lr_scheduler", "kwargs"), {"step_size": 1, "gamma": 0.5}, "lr_scheduler must divide"),
        (("trainer", "lr_scheduler", "type"), "Cosine", "lr_scheduler.type must be StepLR"),
        (("dataset", "hflip"), True, "without hflip"),
        (("net", 1, "kwargs"), None, "neck.kwargs must be a mapping"),
        (("net", 1, "kwargs", "outstrides"), 16, "outstrides must be"),
        (("net", 0, "type"), 5, "backbone.type 5 is not known"),
        (("net", 0, "kwargs", "outlayers"), [9], "outlayers must be"),
        (("net", 2, "kwargs", "feature_jitter"), {"scale": "x", "prob": 1}, "feature_jitter.scale must be a number"),
        (("net", 2, "kwargs", "neighbor_mask"), {"neighbor_size": 3, "mask": [1]}, "neighbor_mask must have lists"),
        (("net", 0), "x", "net must be a list of networks"),
    ],
    ids=range(21),
)  # fmt: skip
def test_configurations_name_the_entry_that_is_wrong(path, value, message):
    config = yaml.safe_load(TEXT)
    place = config
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(ConfigError, match=message):
        read_config(config)


@pytest.mark.parametrize("text", ["[" * 5000, "a: 2024-99-99", "\x00", "scale: [", "- 1"])
def test_files_that_are_no_configuration(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        read_config(tmp_path / "config.yaml")


def test_numbers_that_yaml_takes_for_text_and_other_schedules():
    config = yaml.safe_load(TEXT.replace("lr: 0.0003", "lr: 1e-4"))
    read = read_config(config)
    assert read.recipe.learning_rate == 1e-4 and read.recipe.schedule == "constant"  # 800 steps in 2 epochs: no fall
    config["trainer"]["max_epoch"] = 1000
    config["evaluator"] = {"key_metric": "mean_mean_auc"}
    read = read_config(config)
    assert read.recipe.schedule == "step" and read.image_score == "mean"


def test_the_public_cifar_configuration_aligns_to_its_stride(made_up_classes, tmp_path):
    """Layers 1 to 5, of which the last is coarser than the neck's stride of 16."""
    import timm

    config = yaml.safe_load(TEXT.replace("outlayers: [1, 2, 3]", "outlayers: [1, 2, 3, 4]"))
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "w.pth")
    detector = AnomalyDetector.from_config(config, backbone_weights=tmp_path / "w.pth", cache_dir=tmp_path)
    detector.fit(made_up_classes / "class0/train/good", quiet=True)
    frozen = detector.pipeline.backbone
    assert frozen.stride == 16 and frozen.feature_size(64) == (4, 4) and frozen.channels == 64 + 128 + 256 + 512
    detector.save(tmp_path / "b")
    image = made_up_classes / "class0/test/square/000.png"
    again = AnomalyDetector.load(tmp_path / "b")
    assert again.pipeline.backbone.stride == 16 and again.predict(image).score == detector.predict(image).score
    weights.save(detector, tmp_path / "c.pth", "ader")
    loaded = weights.load(tmp_path / "c.pth", config=config, backbone="resnet18")
    assert loaded.pipeline.backbone.feature_size(64) == (4, 4)
