"""The feature cache: used again, resumed, rebuilt when damaged, never a dead run."""

import json
import multiprocessing
import warnings

import numpy as np
import pytest
from conftest import save, striped_picture

from uniad_fast.data import feature_cache as features
from uniad_fast.data.feature_cache import cached_features
from uniad_fast.models.backbone import Backbone


@pytest.fixture(scope="module")
def backbone(backbone_weights):
    return Backbone.pretrained("resnet10t", 64, backbone_weights)


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


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "description"])
def test_a_damaged_cache_is_rebuilt_and_said_so(extract, paths, tmp_path, extracted_images, damage):
    good = np.array(extract(paths).tokens)
    (rows,), (info,) = (list((tmp_path / "cache").glob(f"*.{suffix}")) for suffix in ("f32", "json"))
    content = bytearray(rows.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
        rows.write_bytes(content)
    elif damage == "cut":
        rows.write_bytes(content[:-8])
    elif damage == "gone":
        rows.unlink()
    else:
        info.write_text(info.read_text()[:-10])
    with pytest.warns(UserWarning, match="extracting again"):
        again = extract(paths)
    np.testing.assert_array_equal(again.tokens, good)
    assert extracted_images == [7, 7]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extract(paths)


@pytest.mark.parametrize("torn", [False, True], ids=["between_writes", "in_a_write"])
def test_an_interrupted_extraction_goes_on(extract, paths, tmp_path, monkeypatch, extracted_images, torn):
    monkeypatch.setattr(features.read_batches, "__defaults__", (2,))
    tokens = features.tokens_of

    def stop_at_the_third(batch, backbone):
        if len(extracted_images) == 2:
            raise KeyboardInterrupt
        return tokens(batch, backbone)

    monkeypatch.setattr(features, "tokens_of", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        extract(paths)
    if torn:
        (partial,) = (tmp_path / "cache").glob("*.partial.f32")
        partial.write_bytes(partial.read_bytes() + b"half a row")
    monkeypatch.setattr(features, "tokens_of", tokens)
    found = extract(paths)
    fresh = np.array(found.tokens)
    assert extracted_images == [2, 2, 2, 1] and not list((tmp_path / "cache").glob("*.partial*"))
    for file in (tmp_path / "cache").iterdir():
        file.unlink()
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
    queue.put(cached_features(backbone, 64, paths, cache, quiet=True).tokens.sum(dtype=np.float64))


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
    info = json.loads(next((tmp_path / "cache").glob("*.json")).read_text())
    assert info["shape"][0] == 7


def test_no_images(extract):
    features = extract([])
    assert features.tokens.shape[0] == 0 and features.used == [] and extract([]).unreadable == []
