"""Folders as people have them: each public layout is understood, and whatever may hide defects is refused."""

import os

import pytest

from uniad_fast.data.datasets import composition, load_dataset
from uniad_fast.data.samples import DataError


def tree(root, *paths):
    """Empty files; a path may name several by commas in its last part."""
    for path in paths:
        folder, _, names = path.rpartition("/")
        for name in names.split(","):
            (root / folder).mkdir(parents=True, exist_ok=True)
            (root / folder / name).touch()
    return root


def shown(samples, root):
    return sorted(
        (s.class_name, s.kind, str(s.path.relative_to(root)), s.mask and str(s.mask.relative_to(root))) for s in samples
    )


def counts(dataset):
    return {name: (good, tests, masks) for name, good, tests, masks in composition(dataset)}


LAYOUTS = {
    "MVTec AD": (
        ["bottle/train/good/0.png,1.png", "bottle/test/good/0.png", "bottle/test/broken_large/0.png,1.png",
         "bottle/ground_truth/broken_large/0_mask.png,1_mask.png", "bottle/license.txt", "readme.txt"],
        {"bottle": (2, "1 good, 2 broken_large", "2 of 2")},
    ),
    "MVTec AD 2": (
        ["can/train/good/000_regular.png", "can/validation/good/001_regular.png",
         "can/test_public/good/000_regular.png", "can/test_public/bad/000_regular.png",
         "can/test_public/ground_truth/bad/000_regular_mask.png",
         "can/test_private/000.png", "can/test_private_mixed/000_mixed.png", "can/license.txt"],
        {"can": (2, "1 good, 1 bad", "1 of 1")},
    ),
    "MVTec LOCO": (
        ["box/train/good/000.png", "box/validation/good/000.png", "box/test/good/000.png",
         "box/test/logical_anomalies/000.png", "box/test/structural_anomalies/000.png",
         "box/ground_truth/logical_anomalies/000/000.png,001.png", "box/ground_truth/structural_anomalies/000/000.png",
         "box/defects_config.json"],
        {"box": (2, "1 good, 1 logical_anomalies, 1 structural_anomalies", "2 of 2")},
    ),
    "MVTec 3D-AD": (
        ["bagel/train/good/rgb/000.png,001.png", "bagel/train/good/xyz/000.tiff,001.tiff",
         "bagel/validation/good/rgb/000.png", "bagel/validation/good/xyz/000.tiff",
         "bagel/test/good/rgb/000.png", "bagel/test/good/gt/000.png", "bagel/test/good/xyz/000.tiff",
         "bagel/test/hole/rgb/000.png", "bagel/test/hole/gt/000.png", "bagel/test/hole/xyz/000.tiff",
         "bagel/calibration/camera_parameters.json"],
        {"bagel": (3, "1 good, 1 hole", "1 of 1")},
    ),
    "VisA": (
        ["candle/Data/Images/Normal/0000.JPG,0001.JPG,0002.JPG,0003.JPG,0004.JPG",
         "candle/Data/Images/Anomaly/000.JPG,001.JPG", "candle/Data/Masks/Anomaly/000.png,001.png",
         "candle/image_anno.csv"],
        {"candle": (4, "1 good, 2 Anomaly", "2 of 2")},
    ),
    "VisA_pytorch": (
        ["candle/train/good/0836.JPG", "candle/test/good/0837.JPG", "candle/test/bad/000.JPG",
         "candle/ground_truth/bad/000.png"],
        {"candle": (1, "1 good, 1 bad", "1 of 1")},
    ),
    "BTAD": (
        ["01/train/ok/0.bmp", "01/test/ok/0.bmp", "01/test/ko/0.bmp,1.bmp", "01/ground_truth/ko/0.png,1.png",
         "01/ground_truth/ok/0.png", "02/train/ok/0.png", "02/test/ok/0.png", "02/test/ko/0.png",
         "02/ground_truth/ko/0.png"],
        {"01": (1, "1 good, 2 ko", "2 of 2"), "02": (1, "1 good, 1 ko", "1 of 1")},
    ),
    "other words and cases": (
        ["Cup/Train/Good/0.PNG", "Cup/Test/OK/0.png", "Cup/Test/NG/0.png", "Cup/Ground_Truth/NG/0_GT.PNG",
         "pen/train/Normal/0.jfif", "pen/test/normal/0.jp2", "pen/test/scratch/0.avif", "pen/masks/scratch/0.tif"],
        {"Cup": (1, "1 good, 1 NG", "1 of 1"), "pen": (1, "1 good, 1 scratch", "1 of 1")},
    ),
    "kinds without a split": (
        ["good/0.png,1.png,2.png,3.png,4.png", "bad/0.png,1.png", "mask/0.png,1.png"],
        {"data": (4, "1 good, 2 bad", "2 of 2")},
    ),
    "good images alone": (["0.png", "camera 1/0.png,1.jpg", "camera 2/0.png", "notes.txt"], {"data": (4, "", "")}),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_public_layouts_are_understood(name, tmp_path):
    paths, expected = LAYOUTS[name]
    dataset = load_dataset(tree(tmp_path / "data", *paths))
    assert counts(dataset) == expected
    assert not {s.path for s in dataset.train} & {s.path for s in dataset.test}
    assert not any("xyz" in s.path.parts or "gt" in s.path.parts for s in (*dataset.train, *dataset.test))


def test_a_class_folder_by_itself(tmp_path):
    root = tree(tmp_path / "bottle", "train/good/0.png", "test/cut/0.png", "ground_truth/cut/0_mask.png")
    assert counts(load_dataset(root)) == {"bottle": (1, "1 cut", "1 of 1")}


def test_what_is_not_looked_at_is_said(tmp_path):
    root = tree(
        tmp_path / "d", "can/train/good/0.png,a.heic,b,c.tif.part", "can/train/bad/0.png,1.png", "can/test/good/0.png",
        "can/test_private/0.png", "can/extra/0.png", "can/test/0.png", "can/0.png", "loose.png",
    )  # fmt: skip
    notes = "\n".join(load_dataset(root).notes)
    for part in (
        "1 .heic, 1 .part, 1 no extension", "can/train/bad: 2 images, to learn from are those in good alone",
        "can/test_private: 1 images, without labels", "can/extra: 1 images, neither train, validation nor test",
        "can/test: 1 images in none of its folders", "can: 1 images in none", "1 images beside the classes' folders",
    ):  # fmt: skip
        assert part in notes, notes


DOUBTFUL = {
    "tests without a train folder": (["bottle/test/good/0.png", "bottle/test/bad/0.png"], "test"),
    "an unknown kind to learn from": (["a/train/type_a/0.png", "a/test/type_a/0.png"], "none of its folders"),
    "no kinds in train": (["a/train/0.png", "a/test/good/0.png"], "none of its folders"),
    "classes and others": (["a/train/good/0.png", "b/0.png"], "in b there are images"),
    "kinds with an unknown one": (["good/0.png", "bad/0.png", "other/0.png"], "bad"),
    "good beside something": (["good/0.png", "weird/0.png"], "weird beside good"),
    "masks among the images": (["0.png", "0_mask.png"], "masks such as 0_mask.png"),
    "a folder of masks": (["images/0.png", "ground_truth/0.png"], "ground_truth"),
    "defects deeper down": (["a/b/c/defects/0.png", "a/0.png"], "defects"),
    "a split one level too deep": (["set/a/train/good/0.png"], "train"),
    "tests inside of good": (["a/train/good/test/0.png", "a/test/good/0.png"], "test"),
    "a class that is called bad": (["bad/good/0.png", "bad/bad/0.png"], "bad"),
    "good inside of bad": (["a/train/good/0.png", "a/test/bad/good/0.png"], "good"),
}


@pytest.mark.parametrize("name", DOUBTFUL)
def test_what_may_hide_defects_is_refused_by_name(name, tmp_path):
    paths, named = DOUBTFUL[name]
    root = tree(tmp_path / "data", *paths)
    with pytest.raises(DataError, match=named):
        load_dataset(root)
    everything = load_dataset(root, all_good=True)
    assert len(everything.train) == len([p for p in root.rglob("*.png")]) and not everything.test


def test_a_folder_that_is_itself_called_test(tmp_path):
    with pytest.raises(DataError, match="test"):
        load_dataset(tree(tmp_path / "test", "0.png"))
    assert len(load_dataset(tree(tmp_path / "train/good", "0.png")).train) == 1


def test_links_are_followed_and_loops_are_not(tmp_path):
    root = tree(tmp_path / "data", "camera/0.png")
    tree(tmp_path / "elsewhere", "1.png")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "loop").symlink_to(root)
    (root / "nowhere.png").symlink_to(tmp_path / "gone.png")
    dataset = load_dataset(root)
    assert [s.path.name for s in dataset.train] == ["0.png", "1.png"]
    notes = "\n".join(dataset.notes)
    assert "a link to a folder that contains it" in notes and "a link to nothing" in notes


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission_is_said(tmp_path):
    root = tree(tmp_path / "data", "a/0.png", "b/1.png")
    (root / "b").chmod(0)
    assert any("Permission denied" in note for note in load_dataset(root).notes)
    (root / "b").chmod(0o700)


def test_hidden_folders_are_no_kinds(tmp_path):
    root = tree(
        tmp_path / "d",
        "a/train/good/0.png",
        "a/test/.ipynb_checkpoints/0.png",
        "a/test/good/0.png",
        ".git/train/good/x.png",
    )
    assert counts(load_dataset(root)) == {"a": (1, "1 good", "")}


@pytest.mark.parametrize(
    "mask", ["1_mask.PNG", "1.bmp", "1_gt.tif", "1_label.jpg", "1-mask.png", "1.png", "1/000.png", "1_MASK.Tiff"]
)
def test_masks_by_any_name(mask, tmp_path):
    root = tree(
        tmp_path / "d", "a/train/good/0.png", "a/test/cut/1.png", f"a/ground_truth/cut/{mask}", "a/test/good/2.png"
    )
    (sample,) = (s for s in load_dataset(root).test if s.defective)
    assert sample.mask == (root / "a/ground_truth/cut" / mask.split("/")[0]).resolve()


def test_masks_lie_as_deep_as_their_images(tmp_path):
    root = tree(
        tmp_path / "d", "a/train/good/0.png", "a/test/cut/x/1.png", "a/test/cut/y/1.png",
        "a/ground_truth/cut/x/1_mask.png",
    )  # fmt: skip
    found = {s.path.parent.name: s.mask for s in load_dataset(root).test}
    assert found["x"] == (root / "a/ground_truth/cut/x/1_mask.png").resolve() and found["y"] is None
    tree(root, "a/ground_truth/cut/x/1_gt.png")
    with pytest.raises(DataError, match="2 masks for x/1.png"):
        load_dataset(root)


def test_identical_splits_for_a_seed(tmp_path):
    root = tree(tmp_path / "d", "good/" + ",".join(f"{i}.png" for i in range(20)), "bad/0.png")
    one, again, other = (load_dataset(root, seed=seed) for seed in (0, 0, 1))
    assert one == again and one.train != other.train and len(one.train) == 16


def test_to_be_tested_on_a_class_needs_no_images_to_learn_from(tmp_path):
    tree(tmp_path, "bolt/test/good/0.png", "bolt/test/bent/0.png", "nut/train/good/0.png", "nut/test/good/0.png")
    dataset = load_dataset(tmp_path, only_test=True)
    assert counts(dataset) == {"bolt": (0, "1 good, 1 bent", "0 of 1"), "nut": (1, "1 good", "")}
    assert counts(load_dataset(tmp_path / "bolt", only_test=True))["bolt"][1] == "1 good, 1 bent"
    with pytest.raises(DataError):
        load_dataset(tmp_path)


def test_a_test_folder_beside_classes_is_not_all_there_is(tmp_path):
    tree(tmp_path / "a", "bolt/train/good/0.png", "bolt/test/good/0.png", "test/good/1.png")
    with pytest.raises(DataError, match="and no such folders"):
        load_dataset(tmp_path / "a", only_test=True)
    tree(tmp_path / "b", "good/0.png", "bad/1.png", "test/good/2.png")
    with pytest.raises(DataError, match="may hold more than good images"):
        load_dataset(tmp_path / "b", only_test=True)
