"""Features that are kept nowhere are those of the cache, whenever they are asked for."""

import shutil

import numpy as np
import pytest
from conftest import call, save, striped_picture

from uniad_fast.data import feature_cache
from uniad_fast.data.feature_cache import NoRoom, cached_features
from uniad_fast.data.live_features import live_features
from uniad_fast.detect.detector import AnomalyDetector
from uniad_fast.errors import UniadFastError


@pytest.fixture
def paths(tmp_path):
    rng = np.random.default_rng(0)
    for index in range(6):
        save(striped_picture(rng, index, False)[0], tmp_path / "images" / f"{index}.png")
    (tmp_path / "images/3.png").write_text("no image")
    return sorted((tmp_path / "images").iterdir())


def test_they_are_those_of_the_cache(backbone, paths, tmp_path):
    kept = cached_features(backbone, 64, paths, tmp_path / "cache", quiet=True)
    live = live_features(backbone, 64, paths, quiet=True)
    assert live.used == kept.used == [0, 1, 2, 4, 5] and live.key == kept.key
    assert [message.split(":")[0] for message in live.unreadable] == [str(paths[3])]
    assert live.tokens.shape == kept.tokens.shape
    for rows in (slice(None), [4, 0, 0], 2, np.array([True, False, True, False, False]), []):
        np.testing.assert_allclose(live.tokens[rows], kept.tokens[rows], rtol=1e-3, atol=1e-3)
    ahead = live.tokens.begin_reading(np.array([3, 1]))
    np.testing.assert_allclose(ahead(), kept.tokens[[3, 1]], rtol=1e-3, atol=1e-3)


def test_an_image_that_is_gone_by_then_is_named(backbone, paths):
    live = live_features(backbone, 64, paths, quiet=True)
    paths[1].unlink()
    with pytest.raises(UniadFastError, match=r"1\.png.*could be read when training began"):
        live.tokens[[0, 1]]


def test_no_room_for_a_cache(backbone, paths, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(NoRoom, match="has room for 0.0 GB"):
        cached_features(backbone, 64, paths, tmp_path / "cache", quiet=True)


def test_training_without_a_cache_learns_the_same(bundle, made_up_classes, options, tmp_path, monkeypatch):
    position = options.index("--cache")
    rest = options[:position] + options[position + 2 :]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    call("train", made_up_classes, "-o", tmp_path / "b", *rest, "--no-cache")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    thresholds = [AnomalyDetector.load(one).calibration.threshold.value for one in (tmp_path / "b", bundle)]
    assert thresholds[0] == pytest.approx(thresholds[1], rel=0.02)
    call("train", made_up_classes, "-o", tmp_path / "c", *options, "--no-cache", code=2)


def test_training_on_kept_halves(made_up_classes, options, tmp_path):
    call(
        "train",
        made_up_classes,
        "-o",
        tmp_path / "b",
        *options,
        "--cache-precision",
        "bfloat16",
        "--sampling",
        "balanced",
    )
    settings = AnomalyDetector.load(tmp_path / "b").settings
    assert (settings.feature_precision, settings.recipe.sampling) == ("bfloat16", "balanced")
