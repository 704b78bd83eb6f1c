"""The feature cache: used again, resumed, rebuilt when damaged, never a dead run."""

import multiprocessing
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from conftest import save, striped_picture

from uniad_fast.data import feature_cache as cache
from uniad_fast.data import features
from uniad_fast.data.feature_cache import cached_features
from uniad_fast.data.feature_shards import PRECISIONS
from uniad_fast.errors import UniadFastError
from uniad_fast.models.backbone import Backbone


@pytest.fixture
def paths(tmp_path):
    rng = np.random.default_rng(0)
    for index in range(7):
        save(striped_picture(rng, index, False)[0], tmp_path / "images" / f"{index}.png")
    return sorted((tmp_path / "images").iterdir())


@pytest.fixture
def extract(backbone, tmp_path):
    def call(paths, image_size=64):
        return cached_features(backbone, image_size, paths, tmp_path / "cache", quiet=True)

    return call


@pytest.fixture
def extracted_images(monkeypatch):
    """How many images went through the backbone."""
    counts = []
    tokens = features.tokens_of
    monkeypatch.setattr(features, "tokens_of", lambda batch, b: counts.append(len(batch.used)) or tokens(batch, b))
    return counts


def test_rows_are_the_backbones_features(extract, backbone, paths):
    found = extract(paths)
    assert found.tokens.shape == (7, 16, backbone.channels) and found.used == list(range(7))
    from uniad_fast.data.images import read_image, to_tensor

    expected = backbone(to_tensor(read_image(paths[3]), 64)[None]).flatten(2).transpose(1, 2)[0]
    np.testing.assert_allclose(found.tokens[3], expected.numpy(), rtol=1e-4, atol=1e-5)


def test_the_next_run_uses_it_and_a_change_does_not(extract, backbone, paths, extracted_images):
    first = extract(paths)
    again = extract(paths)
    assert extracted_images == [7] and again.key == first.key
    np.testing.assert_array_equal(first.tokens, again.tokens)
    renamed = paths[0].rename(paths[0].with_name("renamed.png"))
    assert extract([renamed, *paths[1:]]).key == first.key  # the content counts, not the name
    save(striped_picture(np.random.default_rng(9), 1, True)[0], renamed)
    assert extract([renamed, *paths[1:]]).key != first.key
    assert extract(paths[1:], image_size=96).key != extract(paths[1:]).key
    mean = backbone.mean.clone()
    backbone.mean += 0.1
    assert extract(paths[1:]).key != first.key
    backbone.mean.copy_(mean)


def shards_in(tmp_path):
    return sorted((tmp_path / "cache").glob("*/*.safetensors"))


@pytest.mark.parametrize("damage", ["flipped", "cut", "junk", "description"])
def test_a_damaged_shard_is_made_again_alone_and_said_so(
    extract, paths, tmp_path, extracted_images, damage, monkeypatch
):
    monkeypatch.setattr(cache, "_SHARD_IMAGES", 2)
    good = np.array(extract(paths).tokens)
    _, shard, _, _ = shards_in(tmp_path)
    content = bytearray(shard.read_bytes())
    if damage == "flipped":
        content[-len(content) // 4] ^= 1
    elif damage == "cut":
        del content[-8:]
    elif damage == "description":
        content[9] ^= 1
    else:
        content = bytearray(b"junk")
    shard.write_bytes(content)
    with pytest.warns(UserWarning, match=f"{shard.name}.*extracting again"):
        again = extract(paths)
    np.testing.assert_array_equal(again.tokens, good)
    assert extracted_images == [2, 2, 2, 1, 2]  # the damaged one's, and no other's
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extract(paths)


def test_an_interrupted_extraction_goes_on(extract, paths, tmp_path, monkeypatch, extracted_images):
    monkeypatch.setattr(cache, "_SHARD_IMAGES", 2)
    tokens = features.tokens_of

    def stop_at_the_third(batch, backbone):
        if len(extracted_images) == 2:
            raise KeyboardInterrupt
        return tokens(batch, backbone)

    monkeypatch.setattr(features, "tokens_of", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        extract(paths)
    monkeypatch.setattr(features, "tokens_of", tokens)
    found = extract(paths)
    fresh = np.array(found.tokens)
    assert extracted_images == [2, 2, 2, 1] and len(list((tmp_path / "cache").glob("*/*"))) == 4
    shutil.rmtree(tmp_path / "cache")
    np.testing.assert_array_equal(extract(paths).tokens, fresh)


def test_unreadable_images_are_left_out_and_listed(extract, paths, tmp_path):
    paths[2].write_text("no image")
    paths.insert(5, tmp_path / "missing.png")
    found = extract(paths)
    assert found.used == [0, 1, 3, 4, 6, 7] and len(found.tokens) == 6
    assert len(found.unreadable) == 2 and "2.png" in found.unreadable[0] and "missing.png" in found.unreadable[1]
    again = extract(paths)
    assert again.used == found.used and again.unreadable == found.unreadable


def test_nothing_readable_at_all(extract, paths):
    for path in paths:
        path.write_text("no image")
    assert extract(paths).tokens.shape[0] == 0


def _extract_in_process(weights, paths, cache, queue):
    backbone = Backbone.pretrained("resnet10t", 64, weights)
    queue.put(cached_features(backbone, 64, paths, cache, quiet=True).tokens[:].sum(dtype=np.float64))


def test_two_processes_at_once(backbone_weights, paths, tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [
        context.Process(target=_extract_in_process, args=(backbone_weights, paths, tmp_path / "cache", queue))
        for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    sums = [queue.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    assert sums[0] == sums[1]
    assert len(shards_in(tmp_path)) == 1


def test_two_processes_share_the_work(backbone_weights, paths, tmp_path):
    """Each makes what the other has not begun; none is made twice."""
    code = """
import sys, time
from pathlib import Path
from uniad_fast.data import feature_cache, features
from uniad_fast.models.backbone import Backbone
feature_cache._SHARD_IMAGES = 1
tokens = features.tokens_of
features.tokens_of = lambda *args: (time.sleep(0.3), print("made", flush=True), tokens(*args))[2]
weights, cache, *paths = sys.argv[1:]
found = feature_cache.cached_features(
    Backbone.pretrained("resnet10t", 64, weights), 64, list(map(Path, paths)), cache, quiet=True
)
print(found.tokens.shape[0])
"""
    command = [sys.executable, "-c", code, str(backbone_weights), str(tmp_path / "cache"), *map(str, paths)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    words = [process.communicate(timeout=120)[0].split() for process in both]
    assert [found[-1] for found in words] == ["7", "7"]
    made = [found.count("made") for found in words]
    assert sum(made) == 7 and min(made) >= 2


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_half_precision_is_half_the_bytes_and_another_cache(extract, backbone, paths, tmp_path, precision):
    exact = extract(paths)
    found = cached_features(backbone, 64, paths, tmp_path / "cache", quiet=True, precision=precision)
    assert found.key != exact.key and found.tokens.nbytes * 2 == exact.tokens.nbytes
    dtype = PRECISIONS[precision]
    expected = torch.from_numpy(np.array(exact.tokens)).to(dtype).float().numpy()
    assert found.tokens[:].dtype == np.float32
    np.testing.assert_array_equal(found.tokens[:], expected)


def test_features_beyond_float16_are_not_infinite(extract, backbone, paths, tmp_path, monkeypatch):
    tokens = features.tokens_of
    monkeypatch.setattr(
        features, "tokens_of", lambda *args: tokens(*args) + [[1e5 if i == 2 else 0] for i in range(16)]
    )
    found = cached_features(backbone, 64, paths, tmp_path / "cache", quiet=True, precision="float16")
    assert not found.used and "not finite in float16" in found.unreadable[0]


def test_rows_read_like_an_array(extract, paths, monkeypatch):
    monkeypatch.setattr(cache, "_SHARD_IMAGES", 3)
    tokens = extract(paths).tokens
    array = np.array(tokens)
    assert tokens.shape == array.shape and len(tokens) == 7
    mask = np.array([True, False, False, True, True, False, True])
    for rows in (slice(2, 6), slice(None, None, -2), [6, 0, 0, 3], np.array([-1, 5]), mask, [], np.int64(4), 2):
        np.testing.assert_array_equal(tokens[rows], array[rows if not isinstance(rows, list) or rows else slice(0)])
    np.testing.assert_array_equal(tokens.begin_reading(np.array([5, 1]))(), array[[5, 1]])
    for wrong in ([7], [-8], np.array([True]), [0.5]):
        with pytest.raises(IndexError):
            tokens[wrong]


def test_a_shard_that_shrinks_under_a_reader_is_an_error(extract, paths, tmp_path):
    tokens = extract(paths).tokens
    (shard,) = shards_in(tmp_path)
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(UniadFastError, match="cut short"):
        tokens[6]


def test_no_images(extract):
    features = extract([])
    assert features.tokens.shape[0] == 0 and features.used == [] and extract([]).unreadable == []
