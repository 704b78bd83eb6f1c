"""The study "paper": data in the paper's layouts, and tables beside what is published."""

import csv
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from conftest import BACKBONE, call
from PIL import Image

from uniad_fast.data.samples import DataError
from uniad_fast.studies import paper
from uniad_fast.studies.cifar10 import CLASSES, load_cifar10, normal_classes, write_cifar10
from uniad_fast.studies.paper import paper_tables
from uniad_fast.studies.published import CIFAR_10, MVTEC_AD, VISA, published
from uniad_fast.studies.systems import System
from uniad_fast.training.recipes import FAST

SMALL = dict(hidden_dim=32, nhead=4, num_encoder_layers=1, num_decoder_layers=2, dim_feedforward=64)
EACH = 1  # images of a class in each file of the archive


@pytest.fixture
def options(backbone_weights, tmp_path, monkeypatch):
    """Of a study that is short, and of small networks."""
    monkeypatch.setattr(paper, "System", partial(System, options=SMALL))
    monkeypatch.setattr(paper, "FAST", replace(FAST, min_steps=0, epochs=2))
    found = ["--backbone", BACKBONE, "--backbone-weights", backbone_weights, "--image-size", 64, "--seeds", 1]
    return [*found, "--cache", tmp_path / "cache", "--quiet", "--epochs", 2, "-o", tmp_path / "out"]


@pytest.fixture
def archive(tmp_path):
    """CIFAR-10's binary version in small: red says the label, green the file and the image; a blue corner is marked."""
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        records = []
        for index in range(EACH):
            for label in range(10):
                picture = np.zeros((3, 32, 32), np.uint8)
                picture[0], picture[1], picture[2, 0, 31] = 20 * label, 20 * number + 5 * index, 255
                picture[2, 8:, 8:] = 25 * (label % 2)
                records.append(bytes([label]) + picture.tobytes())
        (folder / f"{name}.bin").write_bytes(b"".join(records))
    return folder


def measured(output):
    """{(system, setting, class): row} of a finished study."""
    with open(output / "results.csv", newline="") as file:
        return {(row["system"], row["setting"], row["class"]): row for row in csv.DictReader(file)}


def cells(table, name):
    """Those of the first line of a table that is called so."""
    return next(line for line in table.splitlines() if line.startswith(f"| {name} |")).split(" | ")[1:]


def as_visa(folder, root):
    images, masks = root / "Data/Images", root / "Data/Masks/Anomaly"
    shutil.copytree(folder / "test/square", images / "Anomaly")
    shutil.copytree(folder / "train/good", images / "Normal")
    shutil.copytree(folder / "ground_truth/square", masks)


@pytest.mark.parametrize(
    ("known", "names", "escaped"),
    [(MVTEC_AD, ("bottle", "metal_nut"), r"metal\_nut"), (VISA, ("pcb1", "pcb2"), "pcb2")],
)
def test_the_tables_of_one_command(known, names, escaped, made_up_classes, options, tmp_path):
    root = tmp_path / "set"
    for number, name in enumerate(names):
        source = made_up_classes / f"class{number}"
        as_visa(source, root / name) if known is VISA else shutil.copytree(source, root / name)
    text = call("study", "paper", root, *options)
    table = (tmp_path / "out" / "table.md").read_text()
    rows = measured(tmp_path / "out")
    assert table in text and known.source in table
    parts = table.split("## ")[1:]
    titles = [f"{m} AUROC in percent, {s}" for s in ("unified", "separate") for m in ("Image", "Pixel")]
    assert [part.splitlines()[0] for part in parts] == titles
    for part, title in zip(parts, titles, strict=True):
        column = f"{title.split(', ')[1]} {title.split()[0].lower()}"
        metric = "image_auroc_max" if title.startswith("Image") else "pixel_auroc"
        told = [known.figure(name, column) for name in names]
        shown = cells(part, escaped)
        assert shown[0] == f"{told[1]:.1f}"
        for place, system in ((1, "paper"), (3, "fast")):
            own = 100 * float(rows[system, title.split(", ")[1], names[1]][metric])
            assert float(shown[place]) == pytest.approx(own, abs=0.051)
            difference = shown[place + 1].rstrip(" |")
            assert float(difference.strip("*")) == pytest.approx(own - told[1], abs=0.051)
            assert difference.startswith("**") == (abs(own - told[1]) >= 1)
        assert cells(part, "mean")[0] == f"{np.mean(told):.1f}"


def test_one_model_for_all_alone_and_classes_nobody_published(made_up_classes, options, tmp_path):
    root = tmp_path / "set"
    for number in range(2):
        shutil.copytree(made_up_classes / f"class{number}", root / f"a|b{number}")
    text = call("study", "paper", root, *options, "--unified-only")
    assert "separate" not in text and "No figures are published for these classes" in text
    assert cells(text, r"a\|b1")[0] == ""
    assert {setting for _, setting, _ in measured(tmp_path / "out")} == {"unified"}


def test_cifar10_from_the_archive_to_the_table(archive, options, tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "FAST", replace(paper.FAST, residual_score="l2"))  # is fitted in no time
    call("data", "cifar10", archive, tmp_path / "cifar", "--quiet")
    text = call("study", "paper", tmp_path / "cifar", *options)
    rows = measured(tmp_path / "out")
    assert CIFAR_10.source in text and "Pixel" not in text
    for name in ("01234", "56789", "02468", "13579"):
        shown = cells(text, name)
        assert shown[0] == f"{CIFAR_10.figure(name, 'unified image'):.1f}"
        mean_of_map = 100 * float(rows["paper", "separate", name]["image_auroc_mean"])
        assert float(shown[1]) == pytest.approx(mean_of_map, abs=0.051)
    assert cells(text, "mean")[0] == "86.5"


def test_the_archive_is_read_right(archive, tmp_path):
    write_cifar10(archive, tmp_path / "cifar", quiet=True)
    found = load_cifar10(tmp_path / "cifar")
    assert (len(found.train), len(found.test)) == (5 * 10 * EACH, 10 * EACH)
    for sample in (*found.train, *found.test):
        picture = np.asarray(Image.open(sample.path))
        label = CLASSES.index(sample.class_name)
        assert picture.shape == (32, 32, 3) and (picture[..., 0] == 20 * label).all() and picture[0, 31, 2] == 255
        assert (picture[0, 0, 1] >= 100) == (sample in found.test)
    assert normal_classes("02468") == ["airplane", "bird", "deer", "frog", "ship"]


def test_a_normal_set_is_its_classes_against_all_others(archive, backbone_weights, tmp_path):
    from uniad_fast.models.backbone import Backbone
    from uniad_fast.studies.data import ManyVersusMany

    write_cifar10(archive, tmp_path / "cifar", quiet=True)
    backbone = Backbone.pretrained(BACKBONE, 64, backbone_weights)
    whole = ManyVersusMany.load(load_cifar10(tmp_path / "cifar"), backbone, 64, tmp_path / "cache", quiet=True)
    part = whole.of_class("13579")
    assert len(part.train) == 5 * 5 * EACH and len(part.test) == 10 * EACH
    assert all(CLASSES.index(s.path.parent.name) % 2 for s in part.train)
    assert all(s.defective == (CLASSES.index(s.path.parent.name) % 2 == 0) for s in part.test)
    rows = [i for i, s in enumerate(whole.train) if CLASSES.index(s.class_name) % 2]
    assert (part.train_tokens == whole.train_tokens[rows]).all() and (part.test_tokens == whole.test_tokens).all()
    shutil.rmtree(tmp_path / "cifar" / "test" / "cat")
    (tmp_path / "cifar" / "test" / "cat").mkdir()
    with pytest.raises(DataError, match="no image of cat to test on"):
        ManyVersusMany.load(load_cifar10(tmp_path / "cifar"), backbone, 64, tmp_path / "cache", quiet=True)


def test_archives_that_are_not_read(archive, options, tmp_path):
    text = call("study", "paper", archive, *options, code=2)
    assert "uniad-fast data cifar10" in text
    pickled = tmp_path / "cifar-10-batches-py"
    pickled.mkdir()
    (pickled / "data_batch_1").write_bytes(b"\x80\x04cos\nsystem\n.")
    assert "pickle" in call("study", "paper", pickled, *options, code=2)
    damaged = archive / "data_batch_3.bin"
    whole = damaged.read_bytes()
    for content, message in (
        (whole[:-1], "bytes are no whole number"),
        (b"", "0 bytes"),
        (bytes([10]) + whole[1:], "a label of 10"),
    ):
        damaged.write_bytes(content)
        said = call("data", "cifar10", archive, tmp_path / "cifar", "--quiet", code=2)
        assert message in said and damaged.name in said and not (tmp_path / "cifar").exists()
    damaged.unlink()
    assert "is not there" in call("data", "cifar10", archive, tmp_path / "cifar", code=2)


def test_a_notable_difference_is_bold_and_seeds_have_a_spread():
    class Data:
        classes = ("01234", "56789")

    def row(system, name, seed, auroc):
        own = {"system": system, "setting": "unified", "seed": seed, "class": name, "epoch": 3, "score": "l2"}
        return own | {"image_auroc_max": auroc, "image_auroc_mean": 0.5, "pixel_auroc": None}

    figures = {"01234": (0.84, 0.86), "56789": (0.78, 0.79), "mean": (0.81, 0.825)}
    rows = [row(system, n, i, v) for system in ("paper", "fast") for n, vs in figures.items() for i, v in enumerate(vs)]
    table = paper_tables([*rows, {**rows[0], "epoch": 1, "image_auroc_max": 0.1}], Data())
    assert cells(table, "01234")[:3] == ["84.4", "85.0 ± 1.4", "+0.6"]
    assert cells(table, "56789")[:3] == ["79.6", "78.5 ± 0.7", "**-1.1**"]
    assert cells(table, "mean")[:3] == ["82.0", "81.8 ± 1.1", "-0.2"]


def test_published_means_are_those_of_the_abstracts():
    def mean(known, column):
        return round(float(np.mean(list(known.figures[column].values()))), 1)

    assert [mean(MVTEC_AD, f"unified {what}") for what in ("image", "pixel")] == [96.5, 96.8]
    assert [mean(MVTEC_AD, f"separate {what}") for what in ("image", "pixel")] == [95.8, 96.6]
    assert [mean(VISA, f"unified {what}") for what in ("image", "pixel")] == [91.4, 98.5]
    assert [mean(VISA, f"separate {what}") for what in ("image", "pixel")] == [90.6, 98.4]
    assert mean(CIFAR_10, "unified image") == 86.5
    assert [len(known.figures["unified image"]) for known in (MVTEC_AD, VISA, CIFAR_10)] == [15, 12, 4]
    assert published(["Metal Nut", "wood"]) is MVTEC_AD and published(["wood", "pcb1"]) is None
    assert published([]) is None
