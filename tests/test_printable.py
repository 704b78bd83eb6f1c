"""Names from data: nothing in them is obeyed, by a terminal, a file system or a spreadsheet."""

import csv
import json
import os

import pytest
import torch
from conftest import run_command

from uniad_fast.detect.reconstructions import save_reconstructions
from uniad_fast.printable import file_name, printable, table_cell


@pytest.mark.parametrize(
    "text", ["a\x1b[2Jb", "a\nb", "a\rb", "\x9b31m", "a\u202eb", "a\u2028b", "\udcff", "\x00", "\x7f", "\u200b"]
)
def test_nothing_in_a_name_is_obeyed_by_a_terminal(text):
    shown = printable(text)
    assert shown.isprintable() and shown != text and "\\" in shown
    shown.encode("utf-8")


def test_ordinary_names_stay_as_they_are():
    for text in ("bottle", "été", "日本 語.png", "a-b_c (1)", "👍"):
        assert printable(text) == file_name(text) == table_cell(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "../../escaped",
        "/etc/passwd",
        "..",
        ".",
        "",
        ".hidden",
        "a/b",
        "a\\b",
        "x" * 300,
        "a\x00b",
        "a\nb",
        "\udcff",
        " ",
        "a.",
    ],
)
def test_every_text_becomes_a_file_name_of_its_own(text, tmp_path):
    name = file_name(text)
    assert name not in ("", ".", "..") and not name.startswith(".") and "/" not in name and len(name.encode()) < 200
    (tmp_path / name).mkdir()
    assert name != file_name(text + "x") and [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("text", ["=cmd|' /C calc'!A0", "+1", "-1", "@x", "\t=1"])
def test_no_cell_is_a_formula(text):
    assert table_cell(text) == f"'{text}" and table_cell(-1.5) == -1.5


def test_a_class_name_leads_nowhere(tmp_path):
    save_reconstructions(torch.zeros(1, 2, 3, 3), ["../../escaped"], ["x/../../../y/z.png"], tmp_path / "a/b")
    (written,) = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert written.is_relative_to(tmp_path / "a/b") and not (tmp_path / "escaped").exists()


def test_names_from_metadata_in_every_output(bundle, made_up_classes, tmp_path):
    name = "=ev\x1b[31mil\nmean"
    lines = [
        {"filename": f"class0/test/{kind}/00{i}.png", "label": int(kind == "square"), "clsname": name,
         "label_name": "../x"}
        for kind in ("good", "square") for i in range(2)
    ]  # fmt: skip
    (made_up_classes / "test-odd.json").write_text("\n".join(map(json.dumps, lines)))
    try:
        arguments = ["--save-reconstructions", tmp_path / "r/s", "-o", tmp_path / "o", "-q"]
        code, output = run_command("eval", bundle, made_up_classes / "test-odd.json", *arguments)
    finally:
        os.unlink(made_up_classes / "test-odd.json")
    assert code == 0 and "\x1b" not in output and "\\x1b[31mil\\nmean" in output
    with open(tmp_path / "o/metrics.csv", newline="", encoding="utf-8") as file:
        assert next(csv.DictReader(file))["class"] == f"'{name}"
    assert {p.name for p in tmp_path.iterdir()} == {"o", "r"} and {p.name for p in (tmp_path / "r").iterdir()} == {"s"}


def test_a_class_called_mean_is_told_from_the_mean(bundle, made_up_classes, tmp_path):
    import shutil

    shutil.copytree(made_up_classes / "class0", tmp_path / "d/mean")
    code, output = run_command("eval", bundle, tmp_path / "d", "-q", "-o", tmp_path / "o")
    assert code == 0 and "mean over classes" in output and "was not trained on this class" in output
