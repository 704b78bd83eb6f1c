"""What a folder's name says: a defect that is learnt as good is never found again."""

import os

import pytest
from test_folder_layouts import tree

from uniad_fast.data.datasets import load_dataset
from uniad_fast.data.folder_names import is_defective, is_defective_alone, is_doubtful, is_of_masks
from uniad_fast.data.samples import DataError

DOUBTFUL = [
    "reject", "rejects", "rejected", "scrap", "not_ok", "not good", "bad_parts", "BAD_2024", "defects_2024", "defect1",
    "defective_parts", "anomaly_1", "scratches", "scratch_01", "cracks", "dent", "contamination", "fault", "failures",
    "damage", "n.g.", "NG1", "negative", "outliers", "NOK_3", "BadParts", "NotOK", "no-good", "不良品", "gt_masks",
    "masks_old",
]  # fmt: skip
INNOCENT = [
    "defect-free", "no_defects", "crackers", "default", "identical", "bottle", "batch_ok", "NonDefective", "kodak",
    "screw_bag", "dental", "faultless", "flawless", "2024-11-25", "camera_1",
]  # fmt: skip


@pytest.mark.parametrize("name", DOUBTFUL)
def test_a_folder_that_speaks_of_defects_is_not_learnt_from(name, tmp_path):
    assert is_doubtful(name) and (is_defective(name) or is_of_masks(name))
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


def test_a_link_is_looked_into_and_a_circle_of_links_ends(tmp_path):
    tree(tmp_path, "far/bad/0.png", "line/1.png")
    os.symlink(tmp_path / "far", tmp_path / "line/more")
    os.symlink(tmp_path / "line", tmp_path / "far/back")
    with pytest.raises(DataError, match="may hold more than good images"):
        load_dataset(tmp_path / "line")
