"""Images of any height and width: from training to a file for another engine, the two never exchanged."""

import hashlib
import json

import numpy as np
import pytest
import torch
from conftest import BACKBONE, call, run_command, save
from PIL import Image

from uniad_fast import AnomalyDetector
from uniad_fast.data.features import key_of
from uniad_fast.data.images import to_tensor
from uniad_fast.data.masks import read_mask, read_roi
from uniad_fast.deploy.engine_files import EngineFiles
from uniad_fast.deploy.exported import load_exported
from uniad_fast.deploy.graph import resized
from uniad_fast.deploy.plans import plans_here, runner
from uniad_fast.detect.pipeline import to_maps
from uniad_fast.detect.settings import DetectorSettings
from uniad_fast.errors import UniadFastError
from uniad_fast.image_size import in_json, in_words, read_size
from uniad_fast.interop import checkpoints
from uniad_fast.models.architecture import Architecture
from uniad_fast.models.backbone import Backbone
from uniad_fast.models.timm_features import create, default_out_indices
from uniad_fast.state_dicts import WeightsError
from uniad_fast.training.build import build_model
from uniad_fast.training.recipes import PAPER

SIZE, GRID, PICTURE = (64, 128), (4, 8), (72, 150)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A class of pictures of 72 x 150 with stripes; defects are bright, in the lower right quarter."""
    root = tmp_path_factory.mktemp("data") / "wide" / "belt"
    rng = np.random.default_rng(0)
    for split, kind, count in (("train", "good", 12), ("test", "good", 4), ("test", "spot", 4)):
        for index in range(count):
            wave = np.sin(np.arange(PICTURE[0]) / 3 + rng.uniform(0, 6))
            picture = 110 + 40 * wave[:, None] + rng.normal(0, 6, PICTURE)
            if kind == "spot":
                row, col = rng.integers(40, 50), rng.integers(100, 125)
                mask = np.zeros(PICTURE, np.uint8)
                mask[row : row + 18, col : col + 18] = 255
                picture[mask > 0] = 250
                save(mask, root / "ground_truth" / kind / f"{index:03}_mask.png")
            grey = picture.clip(0, 255).astype(np.uint8)
            save(np.repeat(grey[..., None], 3, axis=2), root / split / kind / f"{index:03}.png")
    return root.parent


@pytest.fixture(scope="module")
def wide_bundle(wide, backbone_weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide")
    options = ["--backbone", BACKBONE, "--backbone-weights", backbone_weights, "--epochs", 3, "--cache", folder / "c"]
    call("train", wide, "-o", folder / "bundle", "--image-size", "64x128", *options, "-q")
    return folder / "bundle"


@pytest.fixture
def detector(wide_bundle):
    """In float32 as an exported file is."""
    found = AnomalyDetector.load(wide_bundle)
    found.pipeline.precision = "float32"
    return found


@pytest.fixture(scope="module")
def defects(wide):
    return sorted(wide.glob("belt/test/spot/*.png"))


def test_a_bundle_keeps_height_and_width(detector, wide_bundle, tmp_path):
    config = json.loads((wide_bundle / "config.json").read_text())
    assert config["settings"]["image_size"] == list(SIZE) and config["feature_size"] == list(GRID)
    assert detector.settings.image_size == detector.pipeline.image_size == SIZE
    windows = {layer.self_attn.neighbor_size for layer in detector.pipeline.model.transformer.encoder.layers}
    assert windows == {(2, 4)}
    detector.save(tmp_path / "again")
    again = AnomalyDetector.load(tmp_path / "again")
    assert again.settings == detector.settings
    assert AnomalyDetector.from_settings(detector.settings).settings == detector.settings


def test_defects_are_found_where_they_are(detector, defects):
    for path in defects:
        found = detector.predict(path)
        mask = read_mask(path.parents[2] / "ground_truth/spot" / f"{path.stem}_mask.png", PICTURE)
        assert found.anomaly_map.shape == SIZE and found.label
        row, col = np.unravel_index(found.anomaly_map.argmax(), SIZE)
        assert row > SIZE[0] / 2 and col > SIZE[1] / 2
        row, col = map(int, found.regions[0].peak)  # in pixels of the picture, right to a token
        assert mask[row - 18 : row + 18, col - 18 : col + 18].any()
        left, top, width, height = found.regions[0].box
        assert left >= 0 and left + width <= PICTURE[1] and top >= 0 and top + height <= PICTURE[0]


def test_the_region_of_interest(detector, defects, tmp_path):
    with_defect = detector.predict(defects[0])
    left = np.zeros((3, 4))
    left[:, :2] = 1
    detector.look_at(left)
    assert detector.pipeline.roi.shape == SIZE
    elsewhere = detector.pipeline(to_tensor(Image.open(defects[0]), SIZE)[None])[0]
    assert not elsewhere[:, 64:].any() and elsewhere[:, :64].all()
    assert detector.predict(defects[0]).score < with_defect.score / 2
    detector.save(tmp_path / "b")
    again = AnomalyDetector.load(tmp_path / "b")
    assert again.pipeline.roi.shape == SIZE and not again.pipeline.roi[:, 64:].any()


def test_commands(wide_bundle, wide, tmp_path):
    text = call("eval", wide_bundle, wide, "-o", tmp_path / "e", "-q")
    assert "belt" in text
    measured = json.loads((tmp_path / "e/metrics.json").read_text())["by_class"]["belt"]
    assert measured["image_auroc"] > 0.9 and measured["pixel_auroc"] > 0.9
    assert (tmp_path / "e/pictures/belt/hit-1.png").is_file()
    call("score", wide_bundle, wide / "belt/test", "-o", tmp_path / "s", "--maps", "npy", "-q", code=1)
    lines = [json.loads(line) for line in (tmp_path / "s/scores.jsonl").read_text().splitlines()]
    assert sum("spot" in line["image"] and line["label"] for line in lines) == 4
    for line in lines:
        assert Image.open(line["heat_map"]).height > PICTURE[0]
    assert {np.load(path).shape for path in (tmp_path / "s/maps").rglob("*.npy")} == {SIZE}
    call("report", wide_bundle, wide, "-o", tmp_path / "r.html", "-q")
    assert "at 64x128 pixels" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize("name", ["d.onnx", "d.pt2"])
def test_exported(wide_bundle, detector, defects, tmp_path, name):
    """Compared by the command: resized and not, one by one and several at a time."""
    form = {"d.onnx": "onnx", "d.pt2": "torch"}[name]
    rng = np.random.default_rng(0)
    for shape in (SIZE, PICTURE, (150, 90), (40, 200)):
        smooth = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize(shape[::-1])
        save(np.asarray(smooth), tmp_path / f"pictures/{shape}.png")
    call("export", wide_bundle, "-o", tmp_path / name, "--format", form, "--check", tmp_path / "pictures")
    file = load_exported(tmp_path / name, trusted=True)
    assert file.metadata["image_size"] == list(SIZE)
    found = file(np.asarray(Image.open(defects[0])).transpose(2, 0, 1)[None])
    assert found["anomaly_map"].shape == (1, *SIZE) and found["score_map"].shape == (1, *GRID)
    own = detector.predict(defects[0])
    assert found["score"][0] == pytest.approx(own.score, rel=0.02)
    assert np.unravel_index(found["anomaly_map"].argmax(), SIZE)[1] > 64


def test_engines(detector, defects, tmp_path):
    truth, files = detector.predict(defects), EngineFiles(detector, tmp_path)
    for plan in (plan for plan in plans_here() if plan.precision == "float32"):
        detector.engine = runner(plan, detector.pipeline, files)
        for own, one in zip(truth, detector.predict(defects), strict=True):
            assert one.score == pytest.approx(own.score, rel=0.01), plan


def test_the_service_measures_and_takes_no_detector_of_another_size(wide_bundle, defects, bundle):
    from uniad_fast.deploy.service import Service, _decoded

    service = Service(wide_bundle)
    try:
        read = _decoded("a", defects[0].read_bytes(), service.batches.detector.settings, False)
        assert read.image.shape == (3, *SIZE) and read.size == PICTURE
        assert service.batches.submit(read.image, read.size).result().prediction.anomaly_map.shape == SIZE
        with pytest.raises(UniadFastError, match="takes images of 64 pixels, this one images of 64x128"):
            service.batches.exchange(AnomalyDetector.load(bundle))
    finally:
        service.close()


def test_a_square_is_stored_as_it_was(bundle):
    """A square is written as its side, so that whatever an earlier release wrote, or hashed, is still the same."""
    square = DetectorSettings("x", 64, stride=16)
    assert square.image_size == (64, 64) and square.to_json()["image_size"] == 64
    assert json.loads((bundle / "config.json").read_text())["settings"]["image_size"] == 64
    wide = DetectorSettings("x", SIZE, stride=16)
    for one, stored in ((square, 64), (square, [64, 64]), (wide, [64, 128])):
        content = json.loads(json.dumps(one.to_json())) | {"image_size": stored}
        assert DetectorSettings.from_json(content) == one
    assert DetectorSettings("x", np.int64(96)).to_json()["image_size"] == 96
    assert type(DetectorSettings("x", [np.int64(96), 64]).image_size[0]) is int


def test_the_key_of_a_cache_says_height_and_width():
    class Named:
        def fingerprint(self):
            return "named"

    def key(words):
        return hashlib.sha256(f"3 named {words}\n".encode()).hexdigest()[:32]

    assert key_of(Named(), 224, "float32", [], []) == key_of(Named(), (224, 224), "float32", [], []) == key("224")
    oblong = key_of(Named(), (256, 512), "float32", [], [])
    assert oblong == key("256x512") != key_of(Named(), (512, 256), "float32", [], [])


@pytest.mark.parametrize(
    "size", [8, 5000, (64, 31), (4097, 64), (64,), (64, 64, 64), "64x64", 64.0, True, (64, None), None], ids=repr
)
def test_sizes_that_are_none(size):
    with pytest.raises(UniadFastError) as caught:
        AnomalyDetector(BACKBONE, image_size=size)
    assert str(caught.value).startswith("image_size must be") and str(caught.value).endswith(f"got {size!r}")


def test_a_stride_beyond_the_shorter_side():
    with pytest.raises(UniadFastError, match="stride must be a number of pixels, got 65"):
        DetectorSettings("x", SIZE, stride=65)


@pytest.mark.parametrize(
    "text", ["0x5", "abc", "256x", "5000", "x64", "64X128", "64x128x3", "64.5", "-64", "", "9" * 999]
)
def test_words_that_are_no_size(text, tmp_path):
    with pytest.raises(UniadFastError, match="image_size must be"):
        read_size(text)
    for command in (["train", tmp_path], ["convert", tmp_path / "x.pth"]):
        code, output = run_command(*command, "-o", tmp_path / "b", f"--image-size={text}")
        assert code == 2 and "image_size must be" in " ".join(output.split()) and "Traceback" not in output


def test_words():
    assert read_size("448") == (448, 448) and read_size("256x512") == (256, 512)
    assert in_words(448) == in_words((448, 448)) == "448" and in_words((256, 512)) == "256x512"
    assert in_json((448, 448)) == 448 and in_json((256, 512)) == [256, 512]


def test_rows_and_columns_of_pictures_and_masks(tmp_path):
    picture = np.zeros((10, 30, 3), np.uint8)
    picture[:, 20:] = 255
    tensor = to_tensor(Image.fromarray(picture), (40, 60))
    assert tensor.shape == (3, 40, 60) and tensor[0, :, 45].min() == 1 and tensor[0, :, :30].max() == 0
    for size in ((4, 6), (40, 60), (21, 50)):
        ours = resized(torch.from_numpy(picture.transpose(2, 0, 1)[None]), size)[0]
        assert (ours - to_tensor(Image.fromarray(picture), size)).abs().max() < 1.5 / 255
    save(picture, tmp_path / "mask.png")
    mask = read_mask(tmp_path / "mask.png", (5, 60))
    assert mask.shape == (5, 60) and mask[:, 40:].all() and not mask[:, :40].any()
    thin = np.zeros((600, 300), bool)
    thin[598, 7] = True
    found = read_roi(thin, (6, 30))
    assert found.shape == (6, 30) and found.sum() == 1 and found[5, 0]
    scores = torch.arange(6.0).view(1, 2, 3)
    maps = to_maps(scores, (4, 9))
    assert maps.shape == (1, 4, 9) and maps[0, -1, -1] == 5 and maps[0, 0, -1] == 2


@pytest.mark.parametrize(
    ("grid", "window"), [((4, 8), (2, 4)), ((2, 16), (1, 8)), ((8, 4), (4, 2)), ((14, 14), (7, 7))]
)
def test_the_window_is_half_of_each_axis(grid, window):
    assert Architecture().kwargs(grid)["neighbor_mask"]["neighbor_size"] == window


def test_a_backbone_that_is_built_for_one_size():
    name = "vit_tiny_patch16_224"
    state = create(name, SIZE, default_out_indices(name, SIZE)).state_dict()
    backbone = Backbone.from_state(name, SIZE, None, state)
    assert backbone.feature_size(SIZE) == GRID
    with pytest.raises(WeightsError, match="pos_embed"):
        Backbone.from_state(name, (64, 64), None, state)


@pytest.mark.parametrize("positions", ["learned", "sine"])
def test_checkpoints(backbone_weights, tmp_path, positions):
    """A learned table tells the grid. Of sines, which are not stored, it follows from the size of the images."""
    channels = Backbone.pretrained(BACKBONE, SIZE, backbone_weights).channels
    architecture = Architecture(hidden_dim=16, num_encoder_layers=1, num_decoder_layers=1, pos_embed_type=positions)
    path = tmp_path / "n.pth"
    checkpoints.save(build_model(channels, 16, (2, 8), PAPER, None, architecture), path, "reconstruction")
    learned = positions == "learned"
    assert checkpoints.load_network(path).feature_size == ((2, 8) if learned else (4, 4))
    assert checkpoints.load_network(path, checkpoints.NotInTensors(grid=(2, 8))).feature_size == (2, 8)
    options = {"backbone": BACKBONE, "backbone_weights": backbone_weights}
    for size in (None, (32, 128)) if learned else ((32, 128),):
        found = checkpoints.load(path, image_size=size, **options)
        assert found.pipeline.model.feature_size == (2, 8) and found.settings.image_size == (32, 128)
        assert found.predict(np.zeros((9, 9), np.uint8)).anomaly_map.shape == (32, 128)
    wrong = (
        r"grid of \(2, 8\), but images of 64x128 pixels give \(4, 8\)" if learned else r"\(4, 4\), but images of 64x128"
    )
    with pytest.raises(WeightsError, match=wrong):
        checkpoints.load(path, image_size=SIZE, **options)
    call("convert", path, "-o", tmp_path / "b", "--image-size", "32x128", "--backbone", BACKBONE,
         "--backbone-weights", backbone_weights, "-q")  # fmt: skip
    assert AnomalyDetector.load(tmp_path / "b").settings.image_size == (32, 128)


def test_the_public_configuration_has_height_and_width():
    from uniad_fast.detect.public_config import read_config

    net = [
        {"name": "backbone", "type": "models.backbones.efficientnet_b4", "kwargs": {"outlayers": [1, 2, 3, 4]}},
        {"name": "neck", "kwargs": {"outstrides": [16]}},
        {"name": "reconstruction", "type": "models.reconstructions.UniAD", "kwargs": {}},
    ]
    assert read_config({"net": net, "dataset": {"input_size": [256, 512]}}).image_size == (256, 512)
