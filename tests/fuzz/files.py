"""Whatever is read from a disk: a result equal to what was written, or an error of the documented class."""

import contextlib
import copy
import csv
import functools
import hashlib
import io
import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from hypothesis import strategies as st
from PIL import Image

from uniad_fast import AnomalyDetector, UniAD
from uniad_fast.data.datasets import composition, load_dataset
from uniad_fast.data.feature_cache import cached_features
from uniad_fast.data.images import EXTENSIONS, UnreadableImage, read_image, read_mask
from uniad_fast.data.samples import DataError
from uniad_fast.detect.calibration import Calibration
from uniad_fast.detect.public_config import ConfigError, read_config
from uniad_fast.errors import UniadFastError
from uniad_fast.interop import checkpoints as weights
from uniad_fast.models.architecture import Architecture
from uniad_fast.models.backbone import Backbone

JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 5), st.just(2**70), st.floats(), st.text(max_size=6), st.just([]),
    st.just({}), st.just([1, 2, 3, 4]), st.just({"a": {"b": []}}), st.just(["good", None]), st.just("x" * 300),
)  # fmt: skip


@contextlib.contextmanager
def folder():
    """A folder for a moment, in memory where the system has such a place."""
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory, prefix="fuzz-") as name:
        yield Path(name)


def damaged(draw, content: bytes) -> bytes:
    """The bytes with some of them changed, cut off, put in or doubled."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        how = draw(st.sampled_from(["flip", "cut", "insert", "double", "zero"]))
        if how == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "cut":
            del content[at:]
        elif how == "insert":
            content[at:at] = draw(st.binary(min_size=1, max_size=6))
        elif how == "double":
            content[at:at] = content[at : at + 40]
        else:
            content[at : at + 4] = b"\0" * min(4, len(content) - at)
    return bytes(content)


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


# --- bundles, checkpoints, configurations ---------------------------------------------------------------------------


@functools.cache
def _detector() -> AnomalyDetector:
    import timm

    torch.manual_seed(0)
    file = Path(tempfile.mkdtemp(prefix="fuzz-")) / "weights.pth"
    torch.save(timm.create_model("resnet10t").state_dict(), file)
    frozen = Backbone.pretrained("resnet10t", 32, file, (1, 2))
    shutil.rmtree(file.parent)
    architecture = Architecture(hidden_dim=8, nhead=2, num_encoder_layers=1, num_decoder_layers=1, dim_feedforward=8)
    detector = AnomalyDetector("resnet10t", 32, out_indices=(1, 2), architecture=architecture, device="cpu")
    detector._scorer = detector._new_scorer(frozen).eval()
    detector._calibration = Calibration(3.5, 0.1, (0.0, 2.0), 9, 2.0, 0.5)
    detector.classes = ["cup"]
    return detector


@functools.cache
def _bundle() -> tuple[bytes, bytes]:
    with folder() as root:
        _detector().save(root / "b")
        return (root / "b/config.json").read_bytes(), (root / "b/model.safetensors").read_bytes()


def changed(draw, content: Any) -> Any:
    """The nested value with one of its parts replaced, removed or added."""
    content = copy.deepcopy(content)
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in items:
            places.append((value, key))
            walk(inner)

    walk(content)
    if not places:
        return content
    parent, key = draw(st.sampled_from(places))
    how = draw(st.sampled_from(["replace", "remove", "add", "nudge"]))
    if how == "remove":
        del parent[key]
    elif how == "add" and isinstance(parent, dict):
        parent[draw(st.text(max_size=4))] = draw(JUNK)
    elif how == "nudge" and isinstance(parent[key], (int, float)) and not isinstance(parent[key], bool):
        parent[key] = draw(st.sampled_from([-1, 0, 1, 2, 10**6, 10**12, 0.5, float("nan"), float("inf"), -parent[key]]))
    else:
        parent[key] = draw(JUNK)
    return content


@st.composite
def bundle_cases(draw):
    """(config.json, model.safetensors, whether either is not what was written)."""
    config, tensors = _bundle()
    part = draw(
        st.sampled_from(["config", "config with its checksum", "bytes of config", "bytes of tensors", "nothing"])
    )
    if part.startswith("config"):
        content = changed(draw, json.loads(config))
        if part != "config" and isinstance(content, dict):
            content.pop("config_sha256", None)
            content["config_sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return json.dumps(content).encode(), tensors, part == "config" and content != json.loads(config)
    if part == "bytes of config":
        other = damaged(draw, config)
        return other, tensors, other != config
    if part == "bytes of tensors":
        other = damaged(draw, tensors)
        if draw(st.booleans()):
            return config, other, other != tensors
        content = json.loads(config) | {"sha256": hashlib.sha256(other).hexdigest()}
        content.pop("config_sha256")
        content["config_sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return json.dumps(content).encode(), other, False
    return config, tensors, False


def check_bundle(case) -> None:
    config, tensors, differs = case
    with folder() as root:
        (root / "config.json").write_bytes(config)
        (root / "model.safetensors").write_bytes(tensors)
        try:
            detector = AnomalyDetector.load(root, "cpu")
        except UniadFastError as error:
            assert str(error)
            return
    if differs:  # spaces and the like, which change no value
        assert detector.calibration == _detector().calibration
    try:
        score, _, anomaly_map = detector.predict(np.full((40, 40, 3), 90, np.uint8))
    except UniadFastError:  # whoever writes a bundle's tensors can make scores that are not finite
        assert not differs and (config, tensors) != _bundle()
        return
    assert np.isfinite(score) and np.isfinite(anomaly_map).all()
    if differs or (config, tensors) == _bundle():
        assert score == _detector().predict(np.full((40, 40, 3), 90, np.uint8)).score


@functools.cache
def _network() -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in _detector().scorer.model.state_dict().items()}


@st.composite
def checkpoint_cases(draw):
    """(content of a torch file, whether it is a network as it should be)."""
    state: dict[Any, Any] = {name: t.clone() for name, t in _network().items()}
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(sorted(_network())))
        how = draw(st.sampled_from(["drop", "reshape", "dtype", "nan", "junk", "add", "rename", "sparse"]))
        if name not in state:
            continue
        if how == "drop":
            del state[name]
        elif how == "reshape":
            state[name] = torch.zeros(draw(st.lists(st.integers(0, 3), max_size=3)))
        elif how == "dtype":
            state[name] = torch.zeros(
                _network()[name].shape, dtype=draw(st.sampled_from([torch.int64, torch.complex64, torch.bool]))
            )
        elif how == "nan":
            state[name] = torch.full_like(_network()[name], float("nan"))
        elif how == "junk":
            state[name] = draw(JUNK)
        elif how == "add":
            state[draw(st.one_of(st.text(max_size=5), st.integers(0, 3)))] = torch.zeros(2)
        elif how == "rename":
            state[f"transformer.encoder.layers.{draw(st.integers(0, 10**6))}.x"] = state.pop(name)
        else:
            state[name] = _network()[name].to_sparse()
    buffer = io.BytesIO()
    torch.save(draw(st.sampled_from([state, {"state_dict": state, "arch": draw(JUNK)}, {"net": state}])), buffer)
    content = buffer.getvalue()
    if draw(st.integers(0, 3)) == 0:
        content = damaged(draw, content)
        return content, False
    whole = state.keys() == _network().keys() and all(
        isinstance(t, torch.Tensor)
        and t.dtype == _network()[n].dtype
        and t.layout == torch.strided
        and torch.equal(t, _network()[n])
        for n, t in state.items()
    )
    return content, whole


def check_checkpoint(case) -> None:
    content, whole = case
    with folder() as root:
        (root / "c.pth").write_bytes(content)
        try:
            found = weights.load(root / "c.pth", nhead=2)
        except UniadFastError as error:
            assert not whole, error
            return
    assert isinstance(found, UniAD)
    assert all(p.isfinite().all() for p in found.parameters())
    if whole:
        assert all(torch.equal(t, _network()[name]) for name, t in found.state_dict().items())


_CONFIGURATION = yaml.safe_load("""
dataset: {input_size: [64, 64], pixel_mean: [0.4, 0.5, 0.6], pixel_std: [0.2, 0.25, 0.3], batch_size: 4, hflip: False}
evaluator: {key_metric: mean_pixel_auc}
trainer:
  max_epoch: 1000
  clip_max_norm: 0.1
  lr_scheduler: {type: StepLR, kwargs: {step_size: 800, gamma: 0.1}}
  optimizer: {type: AdamW, kwargs: {lr: 0.0001, betas: [0.9, 0.999], weight_decay: 0.0001}}
net:
  - {name: backbone, type: models.backbones.efficientnet_b4, kwargs: {pretrained: True, outlayers: [1, 2, 3, 4]}}
  - {name: neck, prev: backbone, type: models.necks.MFCN, kwargs: {outstrides: [16]}}
  - name: reconstruction
    type: models.reconstructions.UniAD
    kwargs: {pos_embed_type: learned, hidden_dim: 32, nhead: 4, num_encoder_layers: 2, num_decoder_layers: 1,
             dim_feedforward: 64, dropout: 0.2, activation: gelu, normalize_before: False,
             feature_jitter: {scale: 10.0, prob: 0.5},
             neighbor_mask: {neighbor_size: [3, 1], mask: [True, False, True]},
             save_recon: {save_dir: x}, initializer: {method: xavier_uniform}}
""")


@st.composite
def configuration_cases(draw):
    """A configuration of the public code, or the text of one, with something changed."""
    if draw(st.booleans()):
        return changed(draw, _CONFIGURATION)
    return damaged(draw, yaml.safe_dump(_CONFIGURATION).encode())


def check_configuration(case) -> None:
    with folder() as root:
        source: Any = case
        if isinstance(case, bytes):
            source = root / "config.yaml"
            source.write_bytes(case)
        try:
            found = read_config(source)
        except ConfigError as error:
            assert str(error)
            return
    assert found.image_size > 0 and all(np.isfinite(found.mean)) and min(found.std) > 0
    assert all(t >= 0 for t in found.out_indices) and found.recipe.epochs > 0


# --- caches ---------------------------------------------------------------------------------------------------------


class _TinyBackbone:
    """Features that are worth nothing, in no time."""

    channels, mean = 3, torch.zeros(1)

    def grid(self, image_size: int) -> tuple[int, int]:
        return 2, 2

    def fingerprint(self) -> str:
        return "tiny"

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images, 2)


@functools.cache
def _images() -> Path:
    root = Path(tempfile.mkdtemp(prefix="fuzz-images-"))
    rng = np.random.default_rng(0)
    for number in range(5):
        Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8)).save(root / f"{number}.png")
    (root / "2.png").write_text("no image")
    return root


@st.composite
def cache_cases(draw):
    """What is done to the files of a cache, finished or not: a list of (which file, new content)."""
    with folder() as root:
        paths = sorted(_images().iterdir())
        cached_features(_TinyBackbone(), 16, paths, root, quiet=True)
        (rows,), (info,) = list(root.glob("*.f32")), list(root.glob("*.json"))
        contents = {rows.name: rows.read_bytes(), info.name: info.read_bytes()}
    if draw(st.booleans()):  # as if it had been killed: the same files under their partial names
        contents = {name.replace(".", ".partial.", 1): content for name, content in contents.items()}
    for name in draw(st.sets(st.sampled_from(sorted(contents)), min_size=1)):
        if name.endswith(".json") and draw(st.booleans()):
            contents[name] = json.dumps(changed(draw, json.loads(contents[name]))).encode()
        else:
            contents[name] = damaged(draw, contents[name])
    return contents


def check_cache(contents) -> None:
    """Whatever lies there, the features are those of the images."""
    paths = sorted(_images().iterdir())
    with folder() as root, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        truth = cached_features(_TinyBackbone(), 16, paths, root / "other", quiet=True)
        expected = np.array(truth.tokens)
        for name, content in contents.items():
            (root / name).write_bytes(content)
        found = cached_features(_TinyBackbone(), 16, paths, root, quiet=True)
        assert found.used == truth.used and [m.split(":")[0] for m in found.unreadable] == [str(paths[2])], contents
        np.testing.assert_array_equal(np.array(found.tokens), expected)
