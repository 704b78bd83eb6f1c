"""Data sets in all their layouts, and what is wrong with the ones that can't be used."""

import json

import numpy as np
import pytest
from conftest import save

from uniad_fast.data.datasets import load_dataset
from uniad_fast.data.samples import DataError, Sample, hold_out

PICTURE = np.zeros((4, 4, 3), dtype=np.uint8)


def names(samples):
    return sorted((s.class_name, s.kind, s.path.name, s.mask.name if s.mask else None) for s in samples)


@pytest.fixture
def mvtec(tmp_path):
    root = tmp_path / "parts"
    for name in ("cup", "pen"):
        save(PICTURE, root / name / "train/good/0.png")
        save(PICTURE, root / name / "test/good/1.png")
        save(PICTURE, root / name / "test/crack/2.png")
        save(PICTURE, root / name / "test/crack/3.png")
        save(PICTURE[..., 0], root / name / "ground_truth/crack/2_mask.png")
    return root


def test_folder_of_classes(mvtec):
    dataset = load_dataset(mvtec)
    assert names(dataset.train) == [("cup", "good", "0.png", None), ("pen", "good", "0.png", None)]
    assert names(dataset.test)[:3] == [
        ("cup", "crack", "2.png", "2_mask.png"),
        ("cup", "crack", "3.png", None),
        ("cup", "good", "1.png", None),
    ]
    assert len(dataset.test) == 6 and sum(s.defective for s in dataset.test) == 4


def test_one_class_of_that_layout_by_itself(mvtec):
    dataset = load_dataset(mvtec / "cup")
    assert names(dataset.train) == [("cup", "good", "0.png", None)] and len(dataset.test) == 3


def test_folder_of_good_images(tmp_path):
    for name in ("a.png", "deep/er/b.png"):
        save(PICTURE, tmp_path / "mine" / name)
    dataset = load_dataset(tmp_path / "mine")
    assert names(dataset.train) == [("mine", "good", "a.png", None), ("mine", "good", "b.png", None)]
    assert dataset.test == []


def write_lines(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + "\n")


def test_metadata_files(tmp_path):
    good = {"filename": "cup/a.png", "label": 0, "label_name": "good", "clsname": "cup"}
    bad = {"filename": "cup/b.png", "label": 1, "label_name": "crack", "maskname": "cup/m.png", "clsname": "cup"}
    write_lines(tmp_path / "train.json", [good])
    write_lines(tmp_path / "test.json", [good, bad])
    both = load_dataset(tmp_path)
    assert names(both.train) == [("cup", "good", "a.png", None)]
    assert names(both.test) == [("cup", "crack", "b.png", "m.png"), ("cup", "good", "a.png", None)]
    assert both.test[1].path == tmp_path / "cup/b.png"
    one = load_dataset(tmp_path / "test.json", image_root=tmp_path / "images")
    assert not one.train and one.test[1].mask == tmp_path / "images/cup/m.png"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"filename": "a.png"', "line 2: not JSON"),
        ('{"filename": "a.png"}', 'line 2: needs "filename" and "label"'),
        ('{"filename": "a.png", "label": 2}', "line 2"),
        ("[1]", "line 2"),
        ('{"filename": "../a.png", "label": 0}', r"line 2: '\.\./a\.png' leaves the image root"),
        ('{"filename": "/etc/a.png", "label": 0}', "leaves the image root"),
        ('{"filename": "a.png", "label": 1, "maskname": "x/../../m.png"}', "leaves the image root"),
    ],
)
def test_bad_metadata_is_named_by_line(tmp_path, line, message):
    (tmp_path / "meta.jsonl").write_text('{"filename": "ok.png", "label": 0}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        load_dataset(tmp_path / "meta.jsonl")


def test_visa_split(tmp_path):
    path = tmp_path / "split_csv" / "1cls.csv"
    path.parent.mkdir()
    path.write_text(
        "object,split,label,image,mask\n"
        "candle,train,normal,candle/n0.JPG,\n"
        "candle,test,normal,candle/n1.JPG,\n"
        "candle,test,anomaly,candle/a0.JPG,candle/a0.png\n"
    )
    dataset = load_dataset(path)
    assert names(dataset.train) == [("candle", "good", "n0.JPG", None)]
    assert names(dataset.test) == [("candle", "anomaly", "a0.JPG", "a0.png"), ("candle", "good", "n1.JPG", None)]
    assert dataset.train[0].path == tmp_path / "candle/n0.JPG"
    path.write_text("object,split,label,image\n")
    with pytest.raises(DataError, match="no column mask"):
        load_dataset(path)
    path.write_text("object,split,label,image,mask\ncandle,valid,normal,a,\n")
    with pytest.raises(DataError, match="line 2: split must be train or test, got 'valid'"):
        load_dataset(path)


def test_elpv_is_split_by_seed():
    dataset = load_dataset("elpv", seed=1)
    assert len(dataset.train) == 470 + 736 and all(not s.defective for s in dataset.train)
    assert len(dataset.test) == 118 + 184 + 715 and sum(s.defective for s in dataset.test) == 715
    assert not {s.path for s in dataset.train} & {s.path for s in dataset.test}
    assert load_dataset("elpv", seed=1) == dataset != load_dataset("elpv", seed=2)
    assert all(s.path.is_file() for s in dataset.test)


@pytest.mark.parametrize("what", ["missing", "empty"])
def test_nothing_usable(tmp_path, what):
    path = tmp_path / "nothing"
    if what == "empty":
        path.mkdir()
    with pytest.raises(DataError, match="nothing"):
        load_dataset(path)


def test_hold_out_takes_a_share_of_each_class(tmp_path):
    samples = [Sample(tmp_path / f"{c}{i}", c) for c, n in (("a", 20), ("b", 3), ("c", 1)) for i in range(n)]
    kept, held = hold_out(samples, 0.1, seed=0)
    assert sorted(s.class_name for s in held) == ["a", "a", "b"]
    assert sorted([*kept, *held], key=str) == sorted(samples, key=str)
    assert hold_out(samples, 0.1, seed=0) == (kept, held) != hold_out(samples, 0.1, seed=1)
