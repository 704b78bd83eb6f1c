"""Which images a detector has learnt from, whatever they are called."""

import shutil

import pytest

from uniad_fast.data.samples import DataError, Sample
from uniad_fast.detect.seen_images import marks_of, refuse_if_seen, without_copies


def samples(folder, contents, class_name="bolt"):
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [Sample(folder / name, class_name) for name in contents]


def test_copies_of_a_class_are_used_once_and_counted(tmp_path):
    given = samples(tmp_path / "a", {"0.png": b"one", "1.png": b"two", "2.png": b"one", "3.png": b"one"})
    given += samples(tmp_path / "b", {"0.png": b"one"}, "nut")
    given.append(Sample(tmp_path / "gone.png", "bolt"))  # which is for others to say
    notes: list[str] = []
    kept = without_copies(given, notes)
    assert [s.path.relative_to(tmp_path).as_posix() for s in kept] == ["a/0.png", "a/1.png", "b/0.png", "gone.png"]
    assert len(notes) == 1 and notes[0].startswith("2 images are copies of others") and "2.png" in notes[0]
    assert without_copies(kept, notes) == kept and len(notes) == 1
    assert without_copies([kept[0], kept[0]], notes) == [kept[0]] and len(notes) == 2


def test_what_was_learnt_from_is_known_by_its_content(tmp_path):
    learnt = samples(tmp_path / "a", {f"{i}.png": bytes([i]) for i in range(5)})
    marks = marks_of(learnt)
    shutil.copy(learnt[3].path, tmp_path / "renamed.png")
    others = samples(tmp_path / "b", {f"{i}.png": bytes([9, i]) for i in range(3)})
    refuse_if_seen(others, marks)
    refuse_if_seen(learnt, "")  # of a bundle that remembers none
    with pytest.raises(DataError, match="has learnt from 5 of these 5 images"):
        refuse_if_seen(learnt, marks_of(others, marks))  # of one that went on learning
    with pytest.raises(DataError, match=r"has learnt from 1 of these 4 images, such as .*renamed\.png"):
        refuse_if_seen([*others, Sample(tmp_path / "renamed.png", "other")], marks)


def test_a_file_that_has_changed_is_another(tmp_path):
    (one,) = samples(tmp_path / "a", {"0.png": b"one"})
    marks = marks_of([one])
    one.path.write_bytes(b"another")
    refuse_if_seen([one], marks)
