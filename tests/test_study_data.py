"""The data sets that studies are made on: whole, seeded, with exact masks, and nothing shared by training and test."""

import hashlib
import sys

import numpy as np
import pytest
from PIL import Image

from uniad_fast.data.datasets import load_dataset
from uniad_fast.data.masks import read_mask
from uniad_fast.packages import MissingPackageError
from uniad_fast.studies import made_up, objects, textures
from uniad_fast.studies.digits import NORMAL_SETS, write_digits
from uniad_fast.studies.painting import SIZE
from uniad_fast.studies.textures import DEFECTS, SOURCES, Source, write_textures

FEW = dict(train_images=3, good_images=2, defective_images=1, quiet=True)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("textures") / "set"
    write_textures(root, **FEW)
    return root


def digests(root):
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).digest() for p in root.rglob("*.png")}


def test_the_textures_are_a_data_set_of_many_classes_with_masks(written):
    dataset = load_dataset(written)
    assert len(SOURCES) >= 8 and len(DEFECTS) >= 5
    assert {s.class_name for s in dataset.train} == {s.class_name for s in dataset.test} == set(SOURCES)
    assert len(dataset.train) == 3 * len(SOURCES) and len(dataset.test) == (2 + len(DEFECTS)) * len(SOURCES)
    for sample in dataset.test:
        assert sample.defective == (sample.mask is not None)
        if sample.mask:
            assert 0.001 < read_mask(sample.mask, SIZE).mean() < 0.4, sample.mask


def test_the_same_seed_gives_the_same_files(written, tmp_path):
    write_textures(tmp_path / "again", **FEW)
    assert digests(tmp_path / "again") == digests(written)
    write_textures(tmp_path / "other", **FEW, seed=1)
    assert digests(tmp_path / "other") != digests(written)


@pytest.mark.parametrize("kind", DEFECTS)
def test_nothing_changes_outside_of_a_mask_and_most_does_inside(kind):
    rng = np.random.default_rng(0)
    for _ in range(5):
        good, other = rng.integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)
        before = good.copy()
        spoilt, mask = DEFECTS[kind](good, other, rng)
        assert set(np.unique(mask)) == {0, 255} and (good == before).all()
        changed = (spoilt != good).any(axis=2)
        assert not changed[mask == 0].any()
        assert changed[mask > 0].mean() > 0.9


def test_objects_lie_in_the_same_position_in_every_image(tmp_path):
    objects.write_objects(tmp_path / "a", **FEW)
    dataset = load_dataset(tmp_path / "a")
    assert {s.class_name for s in dataset.train} == set(objects.PHOTOGRAPHS)
    assert len(dataset.train) == 3 * len(objects.PHOTOGRAPHS)
    takes = {
        name: [np.asarray(Image.open(s.path), float) for s in dataset.train if s.class_name == name]
        for name in ("cat", "coffee")
    }
    for own, other in (("cat", "coffee"), ("coffee", "cat")):
        first, second = takes[own][:2]
        assert np.abs(first - second).mean() > 3  # no take is another's copy
        assert np.corrcoef(first.ravel(), second.ravel())[0, 1] > 0.6
        assert np.corrcoef(first.ravel(), takes[other][0].ravel())[0, 1] < 0.5
    objects.write_objects(tmp_path / "b", **FEW)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


@pytest.mark.parametrize("kind", objects.DEFECTS)
def test_a_spoilt_object_is_spoilt_where_the_mask_is(kind):
    rng = np.random.default_rng(0)
    for _ in range(5):
        good = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        before = good.copy()
        spoilt, mask = objects.DEFECTS[kind](good, rng)
        assert set(np.unique(mask)) == {0, 255} and (good == before).all()
        changed = (spoilt != good).any(axis=2)
        assert not changed[mask == 0].any() and changed[mask > 0].mean() > 0.9


def test_training_and_test_share_no_pixel(tmp_path, monkeypatch):
    """Every pixel of the source says where it is from."""
    rows, cols = np.meshgrid(np.arange(256), np.arange(512), indexing="ij")
    marked = np.stack([rows % 256, cols % 256, cols // 256], axis=2).astype(np.uint8)
    monkeypatch.setattr(Source, "read", lambda self: marked)
    monkeypatch.setattr(textures, "SOURCES", {"marked": Source("none"), "same": Source("none")})
    write_textures(tmp_path / "set", train_images=20, good_images=20, defective_images=1, quiet=True)

    def places(folder):
        pixels = [np.asarray(Image.open(p)).reshape(-1, 3) for p in (tmp_path / "set/marked" / folder).glob("*.png")]
        return {tuple(p) for p in np.unique(np.concatenate(pixels), axis=0)}

    trained, tested = places("train/good"), places("test/good")
    assert len(trained) > 10000 and len(tested) > 10000 and not trained & tested


def test_an_interrupted_writing_leaves_nothing(tmp_path, monkeypatch):
    saved = []

    def save(array, path):
        saved.append(path)
        if len(saved) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(made_up, "save", save)
    with pytest.raises(KeyboardInterrupt):
        write_textures(tmp_path / "set", **FEW)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", [write_textures, objects.write_objects, write_digits])
def test_what_is_there_is_never_written_over(write, tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(FileExistsError, match=str(tmp_path)):
        write(tmp_path)


@pytest.mark.parametrize(("write", "package"), [(write_textures, "skimage"), (write_digits, "sklearn")])
def test_a_missing_package_is_named(write, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=rf"{package}: pip install scikit-"):
        write(tmp_path / "set")


@pytest.mark.parametrize("normal", NORMAL_SETS)
def test_digits(normal, tmp_path):
    write_digits(tmp_path / "set", normal)
    dataset = load_dataset(tmp_path / "set")
    assert {s.path.name[0] for s in dataset.train} == set(normal)
    assert {s.path.name[0] for s in dataset.test if not s.defective} == set(normal)
    assert {s.kind for s in dataset.test if s.defective} == set("0123456789") - set(normal)
    names = [s.path.name for s in dataset.train + dataset.test]
    assert len(names) == len(set(names)) > 1200


@pytest.mark.parametrize("normal", ["", "0123456789", "0012", "01a"])
def test_digits_that_are_no_split_are_named(normal, tmp_path):
    with pytest.raises(ValueError, match=repr(normal)):
        write_digits(tmp_path / "set", normal)
    assert not list(tmp_path.iterdir())
