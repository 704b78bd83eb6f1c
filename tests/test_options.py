"""What commands say, and how they end."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import run_command, save

from uniad_fast.cli import eval as evaluating
from uniad_fast.errors import UniadFastError
from uniad_fast.models.backbone import Backbone
from uniad_fast.state_dicts import WeightsError


def test_a_fault_of_ours_is_told_from_the_users(monkeypatch, bundle, tmp_path):
    monkeypatch.setattr(evaluating, "load_dataset", lambda *_, **__: {}["x"])
    code, output = run_command("eval", bundle, tmp_path)
    assert code == 70 and "Traceback" in output and "please report it" in output
    monkeypatch.setattr(evaluating, "load_dataset", lambda *_, **__: (_ for _ in ()).throw(MemoryError("12 GB")))
    code, output = run_command("eval", bundle, tmp_path)
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
            ours = issubclass(kind, Exception) and kind.__module__.startswith("uniad_fast")
            if ours and not name.startswith("_"):  # those never leave their file
                assert issubclass(kind, UniadFastError) and issubclass(kind, ValueError), kind
                seen.add(name)
    assert {"DataError", "BundleError", "WeightsError", "ConfigError", "ResumeError", "CacheError", "Diverged"} <= seen


def test_the_version():
    from uniad_fast import __version__

    assert run_command("--version") == (0, f"uniad_fast {__version__}\n")
    command = [sys.executable, "-m", "uniad_fast", "--version"]
    assert subprocess.run(command, capture_output=True, text=True).stdout == f"uniad_fast {__version__}\n"


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
    for path in Path(evaluating.__file__).parents[1].rglob("*.py"):
        assert "pip install 'uniad_fast[" not in path.read_text(), path


def test_train_shows_what_it_will_look_at(made_up_classes, options, tmp_path):
    code, output = run_command("train", made_up_classes, "-o", tmp_path / "b", *options)
    assert code == 0 and "class4" in output and "4 good, 4 square" in output and "4 of 4" in output
    save(np.zeros((8, 8, 3), np.uint8), tmp_path / "d/bad/0.png")
    code, output = run_command("train", tmp_path / "d", "-o", tmp_path / "c", *options)
    assert code == 2 and "d/bad" in output and "--all-good" in output


def test_options_against_each_other(made_up_classes, options, tmp_path):
    code, output = run_command("train", made_up_classes, "-o", tmp_path / "b", *options, "--resume", "--restart")
    assert code == 2 and "give one of them" in output
    code, output = run_command("train", made_up_classes, "-o", tmp_path / "b", *options, "--image-root", tmp_path)
    assert code == 2 and "an image root is for metadata files" in output


def test_an_empty_name_is_not_this_folder(bundle, tmp_path):
    code, output = run_command("score", bundle, "", "-o", tmp_path / "o")
    assert code == 2 and "the name of an image is empty" in output


def test_unreadable_training_images_end_with_three(made_up_classes, options, tmp_path):
    import shutil

    shutil.copytree(made_up_classes / "class0/train/good", tmp_path / "d")
    (tmp_path / "d/junk.png").write_text("junk")
    code, output = run_command("train", tmp_path / "d", "-o", tmp_path / "b", *options)
    assert code == 3 and "left out: " in output and (tmp_path / "b/config.json").exists()
