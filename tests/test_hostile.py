"""What is handed in is trusted in nothing: names, bundles, checkpoints, configurations; and what commands then say."""

import copy
import csv
import hashlib
import json
import os
import socket
import time

import numpy as np
import pytest
import torch
import yaml
from conftest import QUICK, save
from test_public_config import TEXT
from typer.testing import CliRunner

from uniad_fast import AnomalyDetector
from uniad_fast.cli.main import app
from uniad_fast.cli.main import main as cli
from uniad_fast.detect.bundle import BundleError
from uniad_fast.detect.public_config import ConfigError, read_config
from uniad_fast.errors import UniadFastError
from uniad_fast.interop import checkpoints as weights
from uniad_fast.models.backbone import Backbone, usable_device
from uniad_fast.models.uniad import save_reconstructions
from uniad_fast.printable import file_name, printable, table_cell
from uniad_fast.state_dicts import WeightsError


def call(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def options(backbone_weights, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return [*QUICK, "--backbone-weights", backbone_weights, "--epochs", 1, "--cache", cache, "-q"]


@pytest.fixture(scope="module")
def bundle(made_up_classes, options, tmp_path_factory):
    target = tmp_path_factory.mktemp("hostile") / "bundle"
    assert call("train", made_up_classes, "-o", target, *options)[0] == 0
    return target


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["a\x1b[2Jb", "a\nb", "a\rb", "\x9b31m", "a\u202eb", "a\u2028b", "\udcff", "\x00", "\x7f", "\u200b"]
)
def test_nothing_in_a_name_is_obeyed_by_a_terminal(text):
    shown = printable(text)
    assert shown.isprintable() and shown != text and "\\" in shown
    shown.encode("utf-8")


def test_ordinary_names_stay_as_they_are():
    for text in ("bottle", "été", "日本 語.png", "a-b_c (1)", "👍"):
        assert printable(text) == file_name(text) == table_cell(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "../../escaped",
        "/etc/passwd",
        "..",
        ".",
        "",
        ".hidden",
        "a/b",
        "a\\b",
        "x" * 300,
        "a\x00b",
        "a\nb",
        "\udcff",
        " ",
        "a.",
    ],
)
def test_every_text_becomes_a_file_name_of_its_own(text, tmp_path):
    name = file_name(text)
    assert name not in ("", ".", "..") and not name.startswith(".") and "/" not in name and len(name.encode()) < 200
    (tmp_path / name).mkdir()
    assert name != file_name(text + "x") and [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("text", ["=cmd|' /C calc'!A0", "+1", "-1", "@x", "\t=1"])
def test_no_cell_is_a_formula(text):
    assert table_cell(text) == f"'{text}" and table_cell(-1.5) == -1.5


def test_a_class_name_leads_nowhere(tmp_path):
    save_reconstructions(torch.zeros(1, 2, 3, 3), ["../../escaped"], ["x/../../../y/z.png"], tmp_path / "a/b")
    (written,) = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert written.is_relative_to(tmp_path / "a/b") and not (tmp_path / "escaped").exists()


def test_names_from_metadata_in_every_output(bundle, made_up_classes, tmp_path):
    name = "=ev\x1b[31mil\nmean"
    lines = [
        {"filename": f"class0/test/{kind}/00{i}.png", "label": int(kind == "square"), "clsname": name,
         "label_name": "../x"}
        for kind in ("good", "square") for i in range(2)
    ]  # fmt: skip
    (made_up_classes / "test-odd.json").write_text("\n".join(map(json.dumps, lines)))
    try:
        arguments = ["--save-reconstructions", tmp_path / "r/s", "-o", tmp_path / "o", "-q"]
        code, output = call("eval", bundle, made_up_classes / "test-odd.json", *arguments)
    finally:
        os.unlink(made_up_classes / "test-odd.json")
    assert code == 0 and "\x1b" not in output and "\\x1b[31mil\\nmean" in output
    with open(tmp_path / "o/metrics.csv", newline="", encoding="utf-8") as file:
        assert next(csv.DictReader(file))["class"] == f"'{name}"
    assert {p.name for p in tmp_path.iterdir()} == {"o", "r"} and {p.name for p in (tmp_path / "r").iterdir()} == {"s"}


def test_a_class_called_mean_is_told_from_the_mean(bundle, made_up_classes, tmp_path):
    import shutil

    shutil.copytree(made_up_classes / "class0", tmp_path / "d/mean")
    code, output = call("eval", bundle, tmp_path / "d", "-q", "-o", tmp_path / "o")
    assert code == 0 and "mean over classes" in output and "was not trained on this class" in output


# --- bundles --------------------------------------------------------------------------------------------------------


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
        put("backbone", None), put("backbone", "name", 5), put("backbone", "out_indices", [99]),
        put("backbone", "out_indices", "abc"), put("backbone", "padded_for", -1), put("backbone", "stride", 0),
        put("image_size", 6000), put("image_size", 64.5), put("image_size", True), put("seed", "x"), put("seed", -1),
        put("calibration", "threshold", "x"), put("calibration", "threshold", True), put("calibration", {}),
        put("calibration", "surplus", 1), put("classes", "abc"), put("classes", [1]), put("architecture", None),
        put("architecture", "hidden_dim", 20_000), put("architecture", "num_encoder_layers", 10**6),
        put("architecture", "mask", []), put("architecture", "nhead", 16.0), put("recipe", "batch_size", 0),
        put("recipe", []), put("score", "l3"), put("held_out", None), put("false_alarm_rate", 7), put("version", True),
        put("version", "2"), put("format", None),
    ],
    ids=range(30),
)  # fmt: skip
def test_bundles_whose_configuration_can_not_be_followed(bundle, tmp_path, change):
    with pytest.raises(BundleError):
        AnomalyDetector.load(rewritten(bundle, tmp_path, change))


def test_every_edit_of_a_configuration_is_noticed(bundle, tmp_path):
    import shutil

    for name, change in (("a", put("architecture", "nhead", 4)), ("b", put("calibration", "threshold", 1e9))):
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
        code, output = call(*arguments, "--device", device)
        assert (
            code == 2
            and f"device '{device}' can't be used here" in output
            and "bundle" not in output.split("error:")[1]
        )
    with pytest.raises(UniadFastError):
        usable_device(device)


# --- checkpoints and configurations ---------------------------------------------------------------------------------


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
        weights.load(tmp_path / "c.pth", nhead=2)


def test_names_of_tensors_are_made_fit_and_lists_end(tmp_path):
    state = network() | {0: torch.zeros(1)}
    torch.save(state, tmp_path / "key.pth")
    with pytest.raises(WeightsError, match="does not hold a dict of tensors"):
        weights.load(tmp_path / "key.pth")
    torch.save(network() | {f"\x1b[31m{i}": torch.zeros(1) for i in range(500)}, tmp_path / "names.pth")
    with pytest.raises(WeightsError) as caught:
        weights.load(tmp_path / "names.pth", nhead=2)
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
        weights.load(tmp_path / "c.pth", nhead=2)
    arch[0] |= {"type": "models.reconstructions.UniAD", "kwargs": {"hidden_dim": 8, "inplanes": [6]}}
    torch.save({"state_dict": network(), "arch": arch, "epoch": 1}, tmp_path / "c.pth")
    assert weights.load(tmp_path / "c.pth", nhead=2)


def test_nothing_is_overwritten_by_a_conversion(bundle, tmp_path):
    (tmp_path / "precious.pth").write_text("years of work")
    code, output = call("convert", bundle, "--to", "ader", "-o", tmp_path / "precious.pth")
    assert code == 2 and "is there already" in output and (tmp_path / "precious.pth").read_text() == "years of work"
    code, output = call("convert", bundle, "--to", "ader", "-o", tmp_path / "none/x.pth")
    assert code == 2 and "is not a folder" in output


@pytest.mark.parametrize(
    "extra", [["--heads", "3"], ["--image-size", "96"], ["--backbone", "nope"], ["--window", "3", "3"]]
)
def test_options_that_would_not_be_followed_are_refused(bundle, tmp_path, extra):
    code, output = call("convert", bundle, "-o", tmp_path / "x", *extra)
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
    frozen = detector.scorer.backbone
    assert frozen.stride == 16 and frozen.grid(64) == (4, 4) and frozen.channels == 64 + 128 + 256 + 512
    detector.save(tmp_path / "b")
    image = made_up_classes / "class0/test/square/000.png"
    again = AnomalyDetector.load(tmp_path / "b")
    assert again.scorer.backbone.stride == 16 and again.predict(image).score == detector.predict(image).score
    weights.save(detector, tmp_path / "c.pth", "ader")
    loaded = weights.load(tmp_path / "c.pth", config=config, backbone="resnet18")
    assert loaded.scorer.backbone.grid(64) == (4, 4)


# --- what commands say ----------------------------------------------------------------------------------------------


def test_a_fault_of_ours_is_told_from_the_users(monkeypatch, bundle, tmp_path):
    monkeypatch.setattr(cli, "load_dataset", lambda *_: {}["x"])
    code, output = call("eval", bundle, tmp_path)
    assert code == 70 and "Traceback" in output and "please report it" in output
    monkeypatch.setattr(cli, "load_dataset", lambda *_: (_ for _ in ()).throw(MemoryError("12 GB")))
    code, output = call("eval", bundle, tmp_path)
    assert code == 2 and "out of memory" in output and "Traceback" not in output


def test_every_error_class_is_the_users():
    import inspect
    import pkgutil

    import uniad_fast

    seen = set()
    for module in pkgutil.walk_packages(uniad_fast.__path__, "uniad_fast."):
        if "kernels" in module.name or module.name.endswith("__main__"):
            continue
        for name, kind in inspect.getmembers(__import__(module.name, fromlist=["x"]), inspect.isclass):
            if issubclass(kind, Exception) and kind.__module__.startswith("uniad_fast"):
                assert issubclass(kind, UniadFastError) and issubclass(kind, ValueError), kind
                seen.add(name)
    assert {"DataError", "BundleError", "WeightsError", "ConfigError", "ResumeError", "CacheError", "Diverged"} <= seen


def test_the_version():
    from uniad_fast import __version__

    assert call("--version") == (0, f"uniad_fast {__version__}\n")


def test_offline_it_says_at_once_where_weights_come_from(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    started = time.monotonic()
    with pytest.raises(WeightsError, match="can't be reached: .*--backbone-weights FILE.*tf_efficientnet_lite0"):
        Backbone.pretrained("tf_efficientnet_b0", 64)
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(("name", "close"), [("resnet5", "resnet50"), ("tf_efficientnet_b44", "tf_efficientnet_b4")])
def test_a_misspelt_backbone(name, close):
    with pytest.raises(UniadFastError, match=f"did you mean .*{close}"):
        Backbone.pretrained(name, 64)


def test_hints_name_commands_that_work_from_a_clone():
    from pathlib import Path

    for path in (Path(cli.__file__).parent).rglob("*.py"):
        assert "pip install 'uniad_fast[" not in path.read_text(), path


def test_train_shows_what_it_will_look_at(made_up_classes, options, tmp_path):
    code, output = call("train", made_up_classes, "-o", tmp_path / "b", *options)
    assert code == 0 and "class4" in output and "4 good, 4 square" in output and "4 of 4" in output
    save(np.zeros((8, 8, 3), np.uint8), tmp_path / "d/bad/0.png")
    code, output = call("train", tmp_path / "d", "-o", tmp_path / "c", *options)
    assert code == 2 and "d/bad" in output and "--all-good" in output


def test_options_against_each_other(made_up_classes, options, tmp_path):
    code, output = call("train", made_up_classes, "-o", tmp_path / "b", *options, "--resume", "--restart")
    assert code == 2 and "give one of them" in output
    code, output = call("train", made_up_classes, "-o", tmp_path / "b", *options, "--image-root", tmp_path)
    assert code == 2 and "an image root is for metadata files" in output


def test_an_empty_name_is_not_this_folder(bundle, tmp_path):
    code, output = call("score", bundle, "", "-o", tmp_path / "o")
    assert code == 2 and "the name of an image is empty" in output


def test_unreadable_training_images_end_with_three(made_up_classes, options, tmp_path):
    import shutil

    shutil.copytree(made_up_classes / "class0/train/good", tmp_path / "d")
    (tmp_path / "d/junk.png").write_text("junk")
    code, output = call("train", tmp_path / "d", "-o", tmp_path / "b", *options)
    assert code == 3 and "left out: " in output and (tmp_path / "b/config.json").exists()
