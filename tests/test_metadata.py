"""Files that list a data set: the same samples whatever the encoding, and every malformed line by its number."""

import json

import pytest

from uniad_fast.data.datasets import load_dataset
from uniad_fast.data.samples import DataError

LINE = '{{"filename": "cup/{}.png", "label": {}, "label_name": "crack", "clsname": "cup é"}}'
GOOD_AND_BAD = LINE.format("a", 0) + "\n" + LINE.format("b", 1) + "\n"
CSV = "object,split,label,image,mask\ncup,train,Normal,cup/a.png,\ncup,test,anomaly,cup/b.png,cup/m.png\n"


def read(tmp_path, content, name="list.jsonl"):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_dataset(tmp_path / name)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_encodings_and_line_ends(tmp_path, encoding, ends):
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    dataset = read(tmp_path, (mark + GOOD_AND_BAD).replace("\n", ends).encode(encoding))
    assert [(s.class_name, s.kind, s.path.name) for s in (*dataset.train, *dataset.test)] == [
        ("cup é", "good", "a.png"), ("cup é", "crack", "b.png")
    ]  # fmt: skip
    table = read(tmp_path, (mark + CSV).replace("\n", ends).encode(encoding), "LIST.CSV")
    assert [s.path.name for s in (*table.train, *table.test)] == ["a.png", "b.png"]
    assert table.test[0].mask.name == "m.png" and not table.train[0].defective


def test_a_line_separator_inside_a_value_ends_no_line(tmp_path):
    line = json.dumps({"filename": "a\u2028b\x85c.png", "label": 0}, ensure_ascii=False)
    assert read(tmp_path, line).train[0].path.name == "a\u2028b\x85c.png"


def test_backslashes_and_repeats(tmp_path):
    dataset = read(tmp_path, (LINE.format("x", 0) + "\n") * 2 + '{"filename": "pen\\\\a.png", "label": 0}\n')
    assert [str(s.path.relative_to(tmp_path)) for s in dataset.train] == ["cup/x.png", "pen/a.png"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"filename": 5, "label": 0}', "line 2: filename must be the name of a file, got '5'"),
        ('{"filename": null, "label": 0}', "line 2: filename must be"),
        ('{"filename": ["a"], "label": 0}', "line 2: filename must be"),
        ('{"filename": "", "label": 0}', "line 2: filename must be"),
        ('{"filename": ".", "label": 0}', "leaves the image root"),
        ('{"filename": "a\\u0000b", "label": 0}', "line 2: filename must be"),
        ('{"filename": "a", "label": "0"}', "line 2: needs"),
        ('{"filename": "a", "label": [0]}', "line 2: needs"),
        ('{"filename": "a", "label": 1, "maskname": 5}', "line 2: maskname must be"),
        ('{"filename": "a", "label": 1, "label_name": {}}', "line 2: label_name must be a name"),
        ('{"filename": "a", "label": 0, "clsname": [1]}', "line 2: clsname must be a name"),
        ("[" * 100_000, "line 2: not JSON"),
        ("\udc80", "line 2: neither UTF-8 nor UTF-16"),
    ],
    ids=range(13),
)
def test_malformed_lines(tmp_path, line, message):
    content = (LINE.format("a", 0) + "\n").encode() + line.encode("utf-8", "surrogateescape")
    with pytest.raises(DataError, match=message):
        read(tmp_path, content)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("cup,train,normal", "line 3: 3 cells under 5 names"),
        ('cup,train,normal,"a.png', "not CSV"),
        ("cup,train,normal," + "a" * 200_000 + ",", "not CSV"),
        ("cup,maybe,normal,a.png,", "line 3: split must be train or test"),
        ("cup,train,normal,,", "line 3: image must be"),
        (",train,normal,a/b/c/d.png,", None),
    ],
    ids=range(6),
)
def test_malformed_rows(tmp_path, row, message):
    content = "\ufeffobject,split,label,image,mask\ncup,train,normal,ok.png,\n" + row + "\n"
    if message is None:
        assert read(tmp_path, content, "x.csv").train[1].class_name == "a"
        return
    with pytest.raises(DataError, match=message):
        read(tmp_path, content, "x.csv")


def test_aders_meta(tmp_path):
    def entry(path, bad):
        return {
            "img_path": path,
            "mask_path": "m//x.png" if bad else "",
            "cls_name": "cup",
            "specie_name": "",
            "anomaly": bad,
        }

    content = {
        "train": {"cup": [entry("cup/train/good//0.png", 0)]},
        "validation": {"cup": [entry("cup/v.png", 0)]},
        "test": {"cup": [entry("cup/t.png", 0), entry("cup/u.png", 1)]},
    }
    (tmp_path / "meta.json").write_text(json.dumps(content))
    for source in (tmp_path, tmp_path / "meta.json"):
        dataset = load_dataset(source)
        assert [s.path.name for s in dataset.train] == ["0.png", "v.png"]
        assert [(s.kind, s.mask and s.mask.name) for s in dataset.test] == [("good", None), ("defective", "x.png")]
    content["test"]["cup"].append({"img_path": "a.png"})
    (tmp_path / "meta.json").write_text(json.dumps(content, indent=1))
    with pytest.raises(DataError, match="test of cup, entry 3"):
        load_dataset(tmp_path)


def test_which_part_of_a_list_is_for_what(tmp_path):
    lines = "".join(LINE.format(i, int(i >= 10)) + "\n" for i in range(12))
    split = read(tmp_path, lines)
    assert (len(split.train), len(split.test)) == (8, 4) and "kept for testing" in split.notes[0]
    assert not {s.path for s in split.train} & {s.path for s in split.test}
    tests = read(tmp_path, lines, "test.json")
    assert not tests.train and len(tests.test) == 12
    with pytest.raises(DataError, match="no train.json"):
        load_dataset(tmp_path)
    (tmp_path / "train.json").write_text(LINE.format("t", 0))
    for source in (tmp_path, tmp_path / "train.json"):
        both = load_dataset(source)
        assert (len(both.train), len(both.test)) == (1, 12)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_no_path_leaves_the_root_however_it_is_named(tmp_path, name, monkeypatch):
    inside = tmp_path / "in"
    inside.mkdir()
    (tmp_path / "out.png").touch()
    (inside / "link.png").symlink_to(tmp_path / "out.png")
    monkeypatch.chdir(inside)
    for path in ("../out.png", "link.png", str(tmp_path / "out.png")):
        row = (
            json.dumps({"filename": path, "label": 0})
            if name.endswith("l")
            else f"object,split,label,image,mask\nx,train,ok,{path},"
        )
        (inside / name).write_text(row)
        for source in (name, inside / name):
            with pytest.raises(DataError, match="leaves the image root"):
                load_dataset(source)


def test_an_image_is_no_metadata_file(tmp_path):
    with pytest.raises(DataError, match="is an image: give the folder"):
        read(tmp_path, b"\x89PNG", "photo.png")
