"""Data as people have them, and damaged: metadata, folder trees, images."""

import contextlib
import csv
import io
import json
import os
import warnings
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from uniad_fast.data.datasets import composition, load_dataset
from uniad_fast.data.image_files import EXTENSIONS
from uniad_fast.data.images import UnreadableImage, read_image
from uniad_fast.data.masks import read_mask
from uniad_fast.data.samples import DataError

from .damage import JUNK, damaged, folder

# --- metadata -------------------------------------------------------------------------------------------------------

_NAMES = st.one_of(
    st.sampled_from(
        ["a/b.png", "a\\b.png", "../a.png", "/etc/x", "a/../../b", "", " ", "ü/ñ.png", "a\u2028b.png", "\0", "."]
    ),
    st.text(st.characters(blacklist_categories=("Cs",)), max_size=8),
)


@st.composite
def metadata_cases(draw):
    """(file name, content, expected (file, class, defective) or None)."""
    kind = draw(st.sampled_from(["lines", "csv", "ader", "bytes"]))
    if kind == "bytes":
        return draw(st.sampled_from(["a.jsonl", "a.csv", "meta.json"])), draw(st.binary(max_size=200)), None
    entries = [
        (f"{draw(st.sampled_from(['a', 'b']))}/{i}.png", draw(st.sampled_from(["cup", "pen é"])), draw(st.booleans()))
        for i in range(draw(st.integers(1, 5)))
    ]
    expected: Any = sorted(entries)
    odd = {i: draw(_NAMES) for i in draw(st.sets(st.integers(0, len(entries) - 1), max_size=1))}
    if odd or draw(st.booleans()):
        expected = None if odd else expected
    names = [odd.get(i, name) for i, (name, _, _) in enumerate(entries)]
    if kind == "lines":
        rows: list[Any] = [
            {"filename": n, "label": int(bad), "label_name": "crack" if bad else "good", "clsname": c}
            for n, (_, c, bad) in zip(names, entries, strict=True)
        ]
        if draw(st.booleans()):
            victim, key = (
                draw(st.sampled_from(rows)),
                draw(st.sampled_from(["filename", "label", "label_name", "clsname", "maskname"])),
            )
            victim[key] = draw(JUNK)
            expected = None
        text, name = "\n".join(json.dumps(row, ensure_ascii=draw(st.booleans())) for row in rows), "list.jsonl"
    elif kind == "csv":
        out = io.StringIO()
        writer = csv.writer(out, lineterminator=draw(st.sampled_from(["\n", "\r\n"])))
        writer.writerow(["object", "split", "label", "image", "mask"])
        writer.writerows(
            [c, "test", "anomaly" if bad else "Normal", n, ""] for n, (_, c, bad) in zip(names, entries, strict=True)
        )
        text, name = out.getvalue(), draw(st.sampled_from(["list.csv", "LIST.CSV"]))
    else:
        test: dict[str, list[Any]] = {}
        for n, (_, c, bad) in zip(names, entries, strict=True):
            test.setdefault(c, []).append(
                {"img_path": n, "mask_path": "", "cls_name": c, "specie_name": "", "anomaly": int(bad)}
            )
        content: Any = {"train": {}, "test": test}
        if draw(st.booleans()):
            content[draw(st.sampled_from(["train", "test", "validation"]))] = draw(JUNK)
            expected = None
        text, name = json.dumps(content), "meta.json"
    encoding = draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))
    content = text.encode(encoding, "surrogatepass")
    if draw(st.integers(0, 2)) == 0:
        content, expected = damaged(draw, content), None
    return name, content, expected


def check_metadata(case) -> None:
    name, content, expected = case
    with folder() as root:
        (root / name).write_bytes(content)
        try:
            dataset = load_dataset(root / name)
        except DataError as error:
            assert expected is None, (error, case)
            return
        samples = {*dataset.train, *dataset.test}
        for sample in samples:
            for path in (sample.path, sample.mask):
                assert path is None or os.path.realpath(path).startswith(os.path.realpath(root) + os.sep), case
        assert all(not sample.defective for sample in dataset.train)
        composition(dataset)
        if expected is not None:
            found = sorted((str(s.path.relative_to(root)), s.class_name, s.defective) for s in samples)
            assert found == expected, case


# --- folders --------------------------------------------------------------------------------------------------------

_WORDS = [
    "train", "test", "good", "ok", "Good", "NORMAL", "bad", "ko", "ng", "anomaly", "Anomaly", "Normal", "ground_truth",
    "mask", "masks", "validation", "rgb", "gt", "xyz", "Data", "Images", "Masks", "cam1", "cup", "pen", "scratch",
    "test_public", "test_private", "split_csv", "Test", "TRAIN",
]  # fmt: skip
_NOT_GOOD = {
    "test", "bad", "ko", "ng", "anomaly", "ground_truth", "mask", "masks", "gt", "scratch", "test_public",
    "test_private",
}  # fmt: skip
_FILES = ["0.png", "1.PNG", "0_mask.png", "2.jpg", "notes.txt", ".hidden.png", "1.tiff", "3.jfif"]


@st.composite
def folder_cases(draw):
    """(paths of files below a root, name of the root, whether all is said to be good)."""
    parts = st.lists(st.sampled_from(_WORDS), max_size=4)
    paths = {"/".join([*draw(parts), draw(st.sampled_from(_FILES))]) for _ in range(draw(st.integers(1, 10)))}
    return sorted(paths), draw(st.sampled_from(["parts", "test", "good", "a b"])), draw(st.integers(0, 5)) == 0


def check_folder(case) -> None:
    """No image is learnt from whose path says that it may not be, and none is both learnt from and tested on."""
    paths, name, all_good = case
    with folder() as above:
        root = above / name
        for path in paths:
            target = root / path
            with contextlib.suppress(FileExistsError, NotADirectoryError):
                target.parent.mkdir(parents=True, exist_ok=True)
                target.touch()
        try:
            dataset = load_dataset(root, all_good=all_good)
        except DataError as error:
            assert str(error)
            return
        composition(dataset)
        train, test = ({s.path for s in samples} for samples in (dataset.train, dataset.test))
        assert not train & test and len(train) == len(dataset.train) and len(test) == len(dataset.test), case
        for sample in (*dataset.train, *dataset.test):
            assert sample.path.suffix.lower() in EXTENSIONS and not sample.path.name.startswith("."), case
        for path in [] if all_good else train:
            parts = [part.lower() for part in path.relative_to(root.resolve()).parts[:-1]]
            # Kinds without a split keep some good images for testing; those lie beside the defective ones.
            assert not _NOT_GOOD & set(parts), (path, case)
        for sample in dataset.test:
            kind = [part.lower() for part in sample.path.relative_to(root.resolve()).parts[:-1]]
            if kind and kind[-1] in ("bad", "ko", "ng", "anomaly", "scratch"):
                assert sample.defective, (sample, case)


# --- images ---------------------------------------------------------------------------------------------------------


@st.composite
def image_cases(draw):
    """(suffix, content, pixels as written or None, mask as written or None)."""
    height, width = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    mode = draw(st.sampled_from(["L", "RGB", "1", "P", "I;16", "RGBA", "LA", "CMYK", "F", "I"]))
    suffix = draw(st.sampled_from(["png", "bmp", "tiff", "gif", "jpeg", "webp", "ppm"]))
    grey = rng.integers(0, 256, (height, width), dtype=np.uint8)
    marked = grey > draw(st.sampled_from([0, 128, 250, 255]))
    pixels: Any = None
    if mode == "I;16":
        image, pixels = Image.fromarray(grey.astype(np.uint16) * 257), np.repeat(grey[..., None], 3, 2)
    elif mode == "P":
        image = Image.fromarray(grey).convert("P")
        pixels = np.asarray(image.convert("RGB"))
    elif mode in ("F", "I"):
        image = Image.fromarray(grey.astype(np.float32 if mode == "F" else np.int32))
    else:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)
        if mode in ("L", "RGB", "1"):
            pixels = np.asarray(image.convert("RGB"))
    value = draw(st.sampled_from([1, 100, 255]))
    written = {"L": np.uint8, "I;16": np.uint16, "I": np.int32}.get(mode)
    is_mask = written is not None and draw(st.booleans())
    if is_mask:
        image = Image.fromarray((marked * value).astype(written))
    buffer = io.BytesIO()
    try:
        image.save(buffer, format=suffix)
    except (OSError, ValueError, KeyError):
        return suffix, draw(st.binary(max_size=100)), None, None
    content = buffer.getvalue()
    if suffix in ("jpeg", "webp", "gif") or (suffix != "png" and mode in ("1", "I", "I;16")):
        pixels, marked = None, None
    if draw(st.integers(0, 1)):
        return suffix, damaged(draw, content), None, None
    return suffix, content, None if is_mask else pixels, marked if is_mask else None


def check_image(case) -> None:
    suffix, content, pixels, marked = case
    with folder() as root:
        path = root / f"picture.{suffix}"
        path.write_bytes(content)
        for read in (read_image, lambda p: read_mask(p, 16)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    got = read(path)
                except UnreadableImage as error:
                    assert path.name in str(error) and (pixels is None or read is not read_image), (error, case)
                    continue
            if read is read_image:
                assert got.mode == "RGB" and min(got.size) > 0
                if pixels is not None:
                    np.testing.assert_array_equal(np.asarray(got), pixels)
            else:
                assert got.shape == (16, 16) and got.dtype == bool
        if marked is not None:
            small = max(marked.shape)
            if marked.shape == (small, small):
                np.testing.assert_array_equal(read_mask(path, small), marked)
            assert read_mask(path, 16).any() == marked.any()
