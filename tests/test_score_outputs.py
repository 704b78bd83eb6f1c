"""Nothing is lost for one bad image, a signal, a second process or a place that can't be written to."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import call
from PIL import Image

from uniad_fast.detect import results as report


def rows(output):
    with open(output / "scores.csv", newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (output / "scores.jsonl").read_text().splitlines()]
    assert len(table) == len(lines)
    return lines


def test_odd_names_cost_nothing(bundle, photos, tmp_path):
    odd = [
        "\udcff\udcfe.png",
        "x" * 240 + ".png",
        "new\nline.png",
        "\x1b[31mred.png",
        "=cmd|' .png",
        "a.b.png",
        "-rf.png",
    ]
    for name in odd:
        shutil.copy(photos / "0.png", photos / name)
    output = call("score", bundle, photos, "-o", tmp_path / "o", "--threshold", 1e9, "-q")
    found = rows(tmp_path / "o")
    assert {Path(row["image"]).name for row in found} == {*odd, *(f"{i}.png" for i in range(4))}
    assert all(Path(row["heat_map"]).is_file() for row in found)
    assert "\x1b" not in output and "new\\nline.png" in output


def test_an_image_that_goes_or_can_not_be_drawn_costs_its_own_row_alone(bundle, photos, tmp_path, monkeypatch):
    (photos / "5.png").write_text("junk")
    from uniad_fast.detect import score_outputs

    draw, names = score_outputs.draw_picture, []

    def fail(image, *rest):
        names.append(image.size)
        if len(names) == 2:
            raise MemoryError("too large")
        return draw(image, *rest)

    monkeypatch.setattr(score_outputs, "draw_picture", fail)
    output = call("score", bundle, photos, photos / "gone.png", "-o", tmp_path / "o", "--threshold", 1e9, "-q", code=3)
    assert len(rows(tmp_path / "o")) == 4 and "not drawn: " in output
    assert output.rstrip().endswith("0 of 4 images are defective (score above 1000000000.0000); 2 could not be read")


def test_both_defects_and_unreadable_images(bundle, photos, tmp_path):
    (photos / "junk.png").write_text("junk")
    output = call("score", bundle, photos, "-o", tmp_path / "o", "--threshold", -1e9, "-q", code=3)
    assert output.rstrip().endswith("4 of 4 images are defective (score above -1000000000.0000); 1 could not be read")
    assert all(row["label"] == 1 for row in rows(tmp_path / "o"))


def test_nothing_readable_is_an_error(bundle, tmp_path):
    output = call("score", bundle, tmp_path / "typo.png", "-o", tmp_path / "o", code=2)
    assert "none of 1 images could be read" in output and "defective" not in output


def test_a_full_disk_leaves_whole_rows(tmp_path, monkeypatch):
    row = dict(zip(report.SCORE_FIELDS, ("a.png", "cup", 1.0, 0, 2.0, None, []), strict=True))
    with pytest.raises(OSError, match="No space"), report.ScoreFiles(tmp_path) as out:
        out.add(row)
        wrapped = out._files[1]

        class Full:
            tell, truncate, fileno = wrapped.tell, wrapped.truncate, wrapped.fileno

            @staticmethod
            def write(content):
                return wrapped.write(content[: len(content) // 2])

        out._files[1] = Full()
        out.add(row)
    assert (tmp_path / "scores.jsonl").read_text() == json.dumps(row) + "\n"
    assert (tmp_path / "scores.csv").read_text().count("\n") == 3


def test_the_output_is_not_scored(bundle, photos):
    for _ in range(2):
        output = call("score", bundle, photos, "-o", photos / "out", "--threshold", 1e9, "-q")
        assert "0 of 4 images" in output


def test_names_of_heat_maps(bundle, photos, tmp_path):
    for name in ("0.jpg", "a.png/x.png"):
        (photos / name).parent.mkdir(exist_ok=True)
        Image.open(photos / "0.png").save(photos / name)
    Image.open(photos / "0.png").save(photos / "a.jpg")  # whose heat map would be called like the folder
    output = call("score", bundle, photos, "-o", tmp_path / "o", "--threshold", 1e9, "-q", code=3)
    drawn = {
        row["heat_map"] and str(Path(row["heat_map"]).relative_to(tmp_path / "o/heatmaps"))
        for row in rows(tmp_path / "o")
    }
    assert {"0.png", "0-2.png", "1.png"} <= drawn and len(rows(tmp_path / "o")) == 7 and "not drawn: " in output


def test_a_reader_that_leaves_costs_nothing(bundle, photos, tmp_path):
    code = "import sys; from uniad_fast.cli.main import app; app(sys.argv[1:])"
    arguments = ["score", bundle, photos, "-o", tmp_path / "o", "--threshold", "1e9", "-q"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    process.wait(120)
    assert len(rows(tmp_path / "o")) == 4, process.stderr.read()


@pytest.mark.parametrize("command", ["score", "eval"])
def test_a_file_where_results_should_go_is_told_before_the_work(command, bundle, photos, tmp_path):
    (tmp_path / "file").touch()
    output = call(command, bundle, photos, "-o", tmp_path / "file/o", code=2)
    assert "is a file, and results need a folder" in output


def test_reconstructions_of_one_name(bundle, made_up_classes, tmp_path):
    root = tmp_path / "d"
    shutil.copytree(made_up_classes / "class0", root / "class0")
    for part in ("x", "y"):
        target = root / "class0/test/good" / part / "img"
        target.mkdir(parents=True)
        shutil.copy(root / "class0/test/good/000.png", target / "000.png")
    call("eval", bundle, root, "--save-reconstructions", tmp_path / "rec", "-q")
    assert len(list((tmp_path / "rec/class0/img").iterdir())) == 2
