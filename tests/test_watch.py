"""A folder that fills: each file once, complete, whatever is killed; rows that no kill tears."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import call

from uniad_fast.deploy import watch as watching
from uniad_fast.deploy.journal import Journal
from uniad_fast.errors import UniadFastError

FIELDS = ("image", "score", "regions")


def row(number):
    return {"image": f"{number}.png", "score": number / 2, "regions": [1] * number}


def table(folder):
    with open(folder / "scores.csv", newline="") as file:
        return list(csv.DictReader(file))


def lines(folder):
    return [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]


def test_a_journal_goes_on_wherever_it_was_torn(tmp_path):
    journal = Journal(tmp_path, FIELDS)
    for number in range(3):
        journal.add(row(number))
    with pytest.raises(UniadFastError, match="another process writes into"):
        Journal(tmp_path, FIELDS)
    journal.close()
    rows, cells = (tmp_path / "scores.jsonl").read_bytes(), (tmp_path / "scores.csv").read_bytes()
    for end in range(len(rows) + 1):
        (tmp_path / "scores.jsonl").write_bytes(rows[:end])
        (tmp_path / "scores.csv").write_bytes(cells[: end * len(cells) // len(rows)])
        journal = Journal(tmp_path, FIELDS)
        whole = rows[:end].count(b"\n")
        assert journal.rows == [row(number) for number in range(whole)]
        journal.add(row(9))
        journal.close()
        assert lines(tmp_path) == [*(row(number) for number in range(whole)), row(9)]
        assert [one["image"] for one in table(tmp_path)] == [one["image"] for one in lines(tmp_path)]
        assert table(tmp_path)[-1] == {"image": "9.png", "score": "4.5", "regions": "9"}


def test_a_file_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "scores.jsonl").write_text("{}\nmy notes\n")
    with pytest.raises(UniadFastError, match="line 2 is no row of scores"):
        Journal(tmp_path, FIELDS)
    assert (tmp_path / "scores.jsonl").read_text() == "{}\nmy notes\n"


def start(bundle, folder, output, *options):
    code = "from uniad_fast.cli.main import main; main()"
    command = [sys.executable, "-c", code, "watch", bundle, folder, "-o", output, "--engine", "torch", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True, env=environment)


def wait_for(condition, process, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)


def scored(output):
    path = output / "scores.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def test_files_are_scored_when_they_are_complete(bundle, made_up_classes, tmp_path):
    folder, output = tmp_path / "in", tmp_path / "in/out"
    (folder / "deep").mkdir(parents=True)
    square = made_up_classes / "class0/test/square/000.png"
    shutil.copy(square, folder / "first.png")
    told = tmp_path / "told.txt"
    script = tmp_path / "tell.sh"
    script.write_text(f'#!/bin/sh\necho "$@" >> {told}\n')
    script.chmod(0o755)
    process = start(bundle, folder, output, "--settle", 0.5, "--on-defect", f"{script} 'a b'")
    wait_for(lambda: scored(output) == 1, process)
    content = square.read_bytes()
    with open(folder / "deep/slow.png", "wb") as slow:  # longer than it takes to settle
        for start_of in range(0, len(content), len(content) // 8 + 1):
            slow.write(content[start_of : start_of + len(content) // 8 + 1])
            slow.flush()
            time.sleep(0.2)
    (folder / "junk.png").write_text("junk")
    (folder / "notes.txt").write_text("no image")
    (folder / "empty.png").touch()
    shutil.copy(square, folder / ".hidden.png")
    shutil.copy(square, tmp_path / "moved.png")
    os.replace(tmp_path / "moved.png", folder / "moved.png")
    wait_for(lambda: scored(output) == 4, process)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    found = {os.path.relpath(one["image"], folder): one for one in lines(output)}
    assert found.keys() == {"first.png", "deep/slow.png", "junk.png", "moved.png"}
    assert "no image" in found["junk.png"]["error"] and found["junk.png"]["score"] is None
    scores = {found[name]["score"] for name in ("first.png", "deep/slow.png", "moved.png")}
    assert max(scores) - min(scores) < 0.05 * max(1, max(scores) / 10)
    assert (output / "heatmaps/deep/slow.png").is_file() and "left out: " in said
    defective = [one for one in found.values() if one["label"]]
    assert (told.read_text().count("a b") if told.exists() else 0) == len(defective)
    again = start(bundle, folder, output, "--settle", 0.1)
    shutil.copy(made_up_classes / "class1/test/good/000.png", folder / "moved.png")  # another one of that name
    wait_for(lambda: scored(output) == 5, again)
    time.sleep(1)
    again.send_signal(signal.SIGINT)
    assert again.wait(60) == 128 + signal.SIGINT and scored(output) == 5
    assert [one["image"] for one in table(output)] == [one["image"] for one in lines(output)]


def test_killed_again_and_again_each_is_scored_once(bundle, made_up_classes, tmp_path):
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    source = sorted(made_up_classes.glob("*/test/*/*.png"))
    total = 0

    def arrive(count):
        nonlocal total
        for _ in range(count):
            shutil.copy(source[total % len(source)], folder / f"{total:03}.png")
            total += 1

    for _ in range(3):
        process = start(bundle, folder, output, "--settle", 0, "--batch-size", 4)
        before = scored(output)
        arrive(12)
        wait_for(lambda before=before: scored(output) > before + 3, process)
        process.kill()
        process.wait()
    process = start(bundle, folder, output, "--settle", 0)
    arrive(5)
    wait_for(lambda: scored(output) >= total, process)
    process.send_signal(signal.SIGTERM)
    process.wait()
    names = [os.path.basename(one["image"]) for one in lines(output)]
    assert sorted(names) == [f"{number:03}.png" for number in range(total)]
    assert [one["image"] for one in table(output)] == [one["image"] for one in lines(output)]
    assert len(list((output / "heatmaps").glob("*.png"))) == total


def test_what_can_not_be_watched(bundle, tmp_path):
    (tmp_path / "in").mkdir()
    for output in (tmp_path / "in", tmp_path):
        text = call("watch", bundle, tmp_path / "in", "-o", output, code=2)
        assert "write to a folder in it, or elsewhere" in text
    text = call("watch", bundle, tmp_path / "in", "-o", tmp_path / "o", "--on-defect", "alarm 'x", code=2)
    assert "can't be understood" in text
    text = call("watch", bundle, tmp_path / "in", "-o", tmp_path / "o", "--on-defect", "no-such-alarm 1", code=2)
    assert "there is no program 'no-such-alarm'" in text
    assert "is no folder" in call("watch", bundle, tmp_path / "nothing", "-o", tmp_path / "o", code=2)
    assert call("watch", tmp_path / "no-bundle", tmp_path, "-o", tmp_path / "o", code=2)


def test_a_link_back_into_the_folder_is_no_way_around(bundle, made_up_classes, tmp_path):
    """Its own pictures are never scored; and nobody else writes where it does."""
    folder, good = tmp_path / "in", made_up_classes / "class0/test/good/000.png"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    shutil.copy(good, folder / "first.png")
    process = start(bundle, folder, tmp_path / "link/out", "--settle", 0)
    wait_for(lambda: scored(folder / "out") == 1, process)
    text = call("score", bundle, good, "-o", folder / "out", "-q", code=2)
    assert "uniad-fast watch writes into" in text
    shutil.copy(good, folder / "second.png")
    wait_for(lambda: scored(folder / "out") == 2, process)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    process.wait()
    assert sorted(os.path.basename(one["image"]) for one in lines(folder / "out")) == ["first.png", "second.png"]
    assert "write to a folder in it" in call("watch", bundle, folder, "-o", tmp_path / "link", code=2)


def test_an_empty_file_is_waited_for_longer_and_then_said(tmp_path, monkeypatch):
    monkeypatch.setattr(watching, "_EMPTY", 0.3)
    (tmp_path / "empty.png").touch()
    (tmp_path / "full.png").write_bytes(b"x")
    arriving, found = watching._Arriving(tmp_path, tmp_path / "out"), {}
    for path in tmp_path.iterdir():
        arriving.seen(path)
    (tmp_path / "circle.png").symlink_to(tmp_path / "circle.png")
    arriving.seen(tmp_path / "circle.png")  # which is no image, and no end of the watching either
    began = time.monotonic()
    while len(found) < 2 and time.monotonic() - began < 20:
        found |= {path.name: time.monotonic() - began for path, _ in arriving.complete(0.0, 9)}
    assert found["full.png"] < 0.3 <= found["empty.png"]


def test_every_image_has_a_picture_of_its_own():
    names = ["a.png", "a.jpg", "a.jpg.png", "a.jpg.png.png", "b.c.png", "a.PNG"]
    assert len({watching._name_of(Path(name)) for name in names}) == len(names)
    assert watching._name_of(Path("d/a.png")) == Path("d/a.png")
