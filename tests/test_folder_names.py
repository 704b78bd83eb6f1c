"""What a folder's name says: a defect that is learnt as good is never found again."""

import os
import random
import unicodedata
import uuid

import pytest
from test_folder_layouts import tree

from uniad_fast.data.datasets import load_dataset
from uniad_fast.data.folder_names import (
    is_called_defective,
    is_defective,
    is_defective_alone,
    is_doubtful,
)
from uniad_fast.data.samples import DataError

DOUBTFUL = [
    "reject", "rejects", "rejected", "not_ok", "not good", "bad_parts", "BAD_2024", "defects_2024", "defect1", "n.i.O.",
    "defective_parts", "anomaly_1", "scratches", "scratch_01", "cracks", "contamination", "fault", "failures", "scrap",
    "damage", "n.g.", "NG1", "negative", "Positive", "outliers", "NOK_3", "BadParts", "NotOK", "no-good", "不良品",
    "NG_No_12", "defect_no_1", "niO", "nOK", "NoK", "kO", "def_front", "non_conforming", "notok", "Fehlerbilder",
    "img.ng.001", unicodedata.normalize("NFD", "défauts"), unicodedata.normalize("NFD", "불량"), "dent", "gt_masks",
    "masks_old", "MT_Blowhole",
]  # fmt: skip
INNOCENT = [
    "defect-free", "defectfree", "no_defects", "crackers", "default", "identical", "bottle", "batch_ok", "NonDefective",
    "kodak", "screw_bag", "dental", "faultless", "flawless", "2024-11-25", "camera_1", "OK_No_0001", "good_no1",
    "OK_without_glare", "glare-free_good", "without_scratches", "bent_pipe", "scrap_metal", "failsafe", "gt_car",
    "label_side", "无缺陷", "異常なし",
]  # fmt: skip


@pytest.mark.parametrize("word", ["bad", "ng", "nok", "ko", "nio", "fail", "faulty", "broken", "damaged", "defect",
                                  "anomaly", "abnormal", "scratch", "crack"])  # fmt: skip
def test_case_makes_no_difference(word):
    for mask in range(2 ** len(word)):
        name = "".join(c.upper() if mask >> i & 1 else c for i, c in enumerate(word))
        assert is_defective(name) and is_defective(f"{name}_3") and is_defective_alone(name)


@pytest.mark.parametrize("name", DOUBTFUL)
def test_a_folder_that_speaks_of_defects_is_not_learnt_from(name, tmp_path):
    assert is_doubtful(name)
    tree(tmp_path, "parts/0.png,1.png", f"{name}/2.png")
    with pytest.raises(DataError, match="may hold more than good images"):
        load_dataset(tmp_path)
    tree(tmp_path / "other", "bolt/train/good/0.png", f"bolt/train/good/{name}/1.png")
    with pytest.raises(DataError, match="should hold one kind of image"):
        load_dataset(tmp_path / "other")


@pytest.mark.parametrize("name", INNOCENT)
def test_other_names_are_learnt_from_and_said(name, tmp_path):
    dataset = load_dataset(tree(tmp_path / "line", "parts/0.png,1.png", f"{name}/2.png"))
    assert not is_doubtful(name) and len(dataset.train) == 3
    assert any("learnt from as good" in note and f"{name} (1)" in note for note in dataset.notes)


@pytest.mark.parametrize(
    ("name", "alone"),
    [
        ("rejects", True), ("NG_2", True), ("not_ok", True), ("不良", True), ("defect detection", False),
        ("crack_forest", False),
    ],
)  # fmt: skip
def test_a_data_set_or_class_may_be_called_after_its_subject(name, alone, tmp_path):
    assert is_defective_alone(name) == alone
    root = tree(tmp_path, f"{name}/0.png,1.png") / name
    if alone:
        with pytest.raises(DataError, match="may hold more than good images"):
            load_dataset(root)
    else:
        assert len(load_dataset(root).train) == 2


def test_images_called_like_defects_are_not_learnt_from(tmp_path):
    tree(tmp_path, "part_1.png,part_2.png,NOK_3.png")
    with pytest.raises(DataError, match=r"images called like defects, such as NOK_3.png"):
        load_dataset(tmp_path)
    assert len(load_dataset(tmp_path, all_good=True).train) == 3
    for stem in ("part_3_bad", "x.ng.001", "NG12", "n.i.O. 4", "rejected-7"):
        assert is_called_defective(stem), stem


def test_hashes_and_products_are_no_defects():
    made = random.Random(0)
    for _ in range(20_000):
        name = str(uuid.UUID(int=made.getrandbits(128)))
        assert not is_called_defective(name) and not is_called_defective(name.replace("-", "")), name
    for stem in ("3f2c4bad-11", "bent_pipe_01", "scrap_metal_2", "KO_KR", "IMG_0001", "good_no_1", "crack_filler"):
        assert not is_called_defective(stem), stem


def test_defects_beside_point_clouds_are_seen(tmp_path):
    tree(tmp_path, "cookie/train/good/rgb/0.png", "cookie/train/good/rgb/scratch/1.png")
    with pytest.raises(DataError, match="should hold one kind of image"):
        load_dataset(tmp_path)


def test_a_link_is_looked_into_and_a_circle_of_links_ends(tmp_path):
    tree(tmp_path, "far/bad/0.png", "line/1.png")
    os.symlink(tmp_path / "far", tmp_path / "line/more")
    os.symlink(tmp_path / "line", tmp_path / "far/back")
    with pytest.raises(DataError, match="may hold more than good images"):
        load_dataset(tmp_path / "line")
