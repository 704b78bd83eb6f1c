"""Files are whole or not there, and what died is swept."""

import errno
import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call

from uniad_fast import files
from uniad_fast.data.image_batches import read_batches
from uniad_fast.files import atomic_directory, atomic_path, save_tensors, sweep


def _write_and_die(target):
    with atomic_path(target) as path:
        path.write_text("half")
        os._exit(9)


def test_what_killed_processes_left_is_swept_and_what_living_ones_write_is_not(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_write_and_die, args=(tmp_path / "x.txt",))
    process.start()
    process.join()
    assert len(list(tmp_path.iterdir())) == 1
    with atomic_path(tmp_path / "x.txt") as mine:
        mine.write_text("being written")
        assert [p for p in tmp_path.iterdir()] == [mine]
        sweep(tmp_path / "x.txt")
        assert mine.exists()
    (tmp_path / ".x.txt.notours.partial").touch()
    sweep(tmp_path / "x.txt")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".x.txt.notours.partial", "x.txt"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_replaced_whole(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(files, "_exchanged", lambda *_: False)
    for content in ("first", "second"):
        with atomic_directory(tmp_path / "d") as partial:
            (partial / "file").write_text(content)
        assert (tmp_path / "d/file").read_text() == content and len(list(tmp_path.iterdir())) == 1
    rename = Path.rename
    if not exchange:
        monkeypatch.setattr(
            Path,
            "rename",
            lambda s, t: (
                (_ for _ in ()).throw(OSError(errno.EIO, "no")) if s.name.endswith("partial") else rename(s, t)
            ),
        )
        with pytest.raises(OSError, match="no"), atomic_directory(tmp_path / "d") as partial:
            (partial / "file").write_text("third")
        assert (tmp_path / "d/file").read_text() == "second" and len(list(tmp_path.iterdir())) == 1


def test_files_have_the_mode_of_other_files(bundle, tmp_path):
    (tmp_path / "other").touch()
    modes = {p.stat().st_mode & 0o777 for p in (*bundle.iterdir(), tmp_path / "other")}
    assert len(modes) == 1


def test_images_that_failed_for_a_passing_reason_are_tried_again(backbone_weights, photos, tmp_path, monkeypatch):
    from uniad_fast.data import image_batches
    from uniad_fast.data.feature_cache import cached_features
    from uniad_fast.models.backbone import Backbone

    backbone = Backbone.pretrained("resnet10t", 64, backbone_weights)
    paths, read = sorted(photos.iterdir()), image_batches.read_bytes
    fresh = np.array(cached_features(backbone, 64, paths, tmp_path / "other", quiet=True).tokens)

    def hiccup(path):
        if Path(path) == paths[1]:
            error = image_batches.UnreadableImage(f"{path}: Too many open files")
            error.passing = True
            raise error
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(image_batches, "read_bytes", hiccup)
        assert cached_features(backbone, 64, paths, tmp_path / "c", quiet=True).used == [0, 2, 3]
    with pytest.warns(UserWarning, match="for a reason that may have passed: extracting again"):
        assert cached_features(backbone, 64, paths, tmp_path / "c", quiet=True).used == [0, 1, 2, 3]

    def changing(path):
        content = read(path)
        return content + b"x" if Path(path) == paths[2] else content

    with monkeypatch.context() as patch:
        patch.setattr(image_batches, "read_bytes", changing)
        found = cached_features(backbone, 64, paths, tmp_path / "d", quiet=True)
        assert found.used == [0, 1, 3] and "changed while it was being read" in found.unreadable[0]
    with pytest.warns(UserWarning, match="extracting again"):
        np.testing.assert_array_equal(cached_features(backbone, 64, paths, tmp_path / "d", quiet=True).tokens, fresh)


def test_a_cache_names_the_files_of_this_run(backbone_weights, photos, tmp_path):
    from uniad_fast.data.feature_cache import cached_features
    from uniad_fast.models.backbone import Backbone

    backbone = Backbone.pretrained("resnet10t", 64, backbone_weights)
    (photos / "4.png").write_text("junk")
    shutil.copytree(photos, tmp_path / "moved")
    for folder in (photos, tmp_path / "moved"):
        (message,) = cached_features(backbone, 64, sorted(folder.iterdir()), tmp_path / "c", quiet=True).unreadable
        assert message.startswith(str(folder / "4.png"))


def test_a_cache_without_a_place_says_what_to_do(made_up_classes, options, tmp_path):
    (tmp_path / "file").touch()
    output = call(
        "train", made_up_classes, "-o", tmp_path / "b", *options[:-3], "--cache", tmp_path / "file/c", "-q", code=2
    )
    assert "can't be used to keep features" in output and "--cache" in output


def test_reading_ahead_stops_with_its_reader(photos):
    batches = read_batches(sorted(photos.iterdir()), 32, 1)
    assert next(batches).images.shape == (1, 3, 32, 32)
    batches.close()
    assert torch.get_num_threads() > 0


def test_a_full_disk_is_said_to_be_full():
    with pytest.raises(OSError, match="No space left on device") as found:
        save_tensors({"a": torch.zeros(100_000)}, Path("/dev/full"))
    assert found.value.filename == "/dev/full"
