"""Pictures in tiles: all of a picture is seen, at its own resolution, once or more, and blended without a seam."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import call, run_command, save, saved_anew, striped_picture
from PIL import Image

from uniad_fast import AnomalyDetector
from uniad_fast.data import feature_cache
from uniad_fast.data.feature_cache import cached_features
from uniad_fast.data.tiling import STEP, Tiling
from uniad_fast.detect.mosaic import Mosaic, Pictures, by_majority, pictures_of
from uniad_fast.errors import UniadFastError

SIZES = [(64, 64), (65, 64), (200, 331), (63, 500), (40, 30), (1000, 64), (257, 255)]


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tiles_cover_a_picture_evenly(size, overlap):
    tiling = Tiling((64, 64), overlap)
    corners = tiling.corners(size)
    seen = np.zeros(size, int)
    for top, left in corners:
        assert top % STEP == left % STEP == 0
        assert top < size[0] and left < size[1]
        seen[top : top + 64, left : left + 64] += 1
    assert seen.min() >= 1 and len(set(corners)) == len(corners)
    for axis in (0, 1):
        starts = sorted({corner[axis] for corner in corners})
        assert starts[0] == 0 and starts[-1] + 64 - max(size[axis], 64) < STEP
        gaps = np.diff(starts)
        assert not len(gaps) or (gaps.max() <= max(STEP, 64 * (1 - overlap)) + STEP and np.ptp(gaps) <= STEP)


def test_a_tile_is_the_picture_there_and_mirrored_beyond():
    pixels = np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    tile = Tiling((64, 64), 0.0).cut(picture, (0, 28)).permute(1, 2, 0) * 255
    np.testing.assert_array_equal(tile[:50, :62], pixels[:, 28:])
    np.testing.assert_array_equal(tile[50:, :62], pixels[:35:-1, 28:])
    np.testing.assert_array_equal(tile[:50, 62:], pixels[:, :87:-1])


@pytest.mark.parametrize(
    ("tile", "overlap", "message"),
    [((64, 64), 0.95, "0.95"), ((64, 64), -0.1, "-0.1"), ((64, 64), "a", "'a'"), ((66, 64), 0.1, "66x64")],
)
def test_what_can_not_be_cut(tile, overlap, message):
    with pytest.raises(UniadFastError, match=message):
        Tiling(tile, overlap)


def test_maps_are_blended_without_a_seam():
    """Tiles that all say what a plane is at their place give that plane; one bright tile fades towards its edges."""
    tiling, size = Tiling((64, 32), 0.5), (150, 100)
    mosaic = Mosaic(tiling, size)
    corners = tiling.corners(size)

    def plane(top, left):  # at the centres of the first and the last values of a tile
        rows = torch.linspace(top, top + 64 - STEP, 4)[:, None]
        return rows * 0.5 + torch.linspace(left, left + 32 - STEP, 2)

    mosaic.add(corners, torch.stack([plane(*corner) for corner in corners]))
    expected = torch.arange(0, 150, STEP)[:, None] * 0.5 + torch.arange(0, 100, STEP)
    torch.testing.assert_close(mosaic.map(), expected)
    mosaic = Mosaic(tiling, (64, 500))
    corners = tiling.corners((64, 500))
    bright = torch.zeros(len(corners), 4, 2)
    bright[len(corners) // 2] = 1
    mosaic.add(corners, bright)
    found = mosaic.map()
    assert found.max() > 0.7 and found.diff(dim=1).abs().max() < 0.3


def test_a_picture_s_tiles_are_found_among_others():
    tiling = Tiling((64, 64), 0.0)
    sizes = [(64, 128), (64, 64)]
    corners = [corner for size in sizes for corner in tiling.corners(size)]
    pictures = Pictures(tiling, np.array([0, 0, 1]), corners, sizes)
    assert [rows.tolist() for rows in pictures.whole(np.array([0, 2, 1]))] == [[0, 2], [1]]
    assert [rows.tolist() for rows in pictures.whole(np.array([1, 2]))] == [[1]]  # the other lacks a tile
    maps = list(pictures.maps(np.array([0, 1, 2]), torch.tensor([1.0, 2.0, 3.0])[:, None, None].expand(3, 2, 2)))
    assert [tuple(one.shape) for one in maps] == [(1, 16, 32), (1, 16, 16)]
    assert maps[0][0, 0, 0] == 1 and maps[0][0, 0, 31] == 2 and (maps[1] - 3).abs().max() < 1e-5
    assert by_majority(np.array([2, 2, 0, 1]), np.array([5, 5, 5, 9])).tolist() == [2, 2, 2, 1]


def test_features_of_tiles_are_those_of_their_pixels(backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, "_SHARD_IMAGES", 3)  # a picture's tiles lie in several shards
    pixels = np.random.default_rng(0).integers(0, 256, (100, 150, 3), dtype=np.uint8)
    save(pixels, tmp_path / "0.png")
    (tmp_path / "1.png").write_text("no image")
    turned = Image.fromarray(pixels[:, ::-1].transpose(1, 0, 2).copy())
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "2.png", exif=exif)
    paths = sorted(tmp_path.glob("*.png"))
    found = cached_features(backbone, 64, paths, tmp_path / "c", quiet=True, overlap=0.25)
    tiling = Tiling((64, 64), 0.25)
    sizes = [(100, 150), None, found.tiles.sizes[2]]
    assert found.tiles.sizes == sizes and sizes[2] in ((100, 150), (150, 100))
    counts = [len(tiling.corners(sizes[0])), 0, len(tiling.corners(sizes[2]))]
    assert [found.used.count(number) for number in range(3)] == counts
    assert len(found.unreadable) == 1 and "1.png" in found.unreadable[0]
    expected = backbone(tiling.cut(Image.fromarray(pixels), tiling.corners((100, 150))[4])[None])
    np.testing.assert_allclose(found.tokens[4], expected[0].flatten(1).T, rtol=1e-4, atol=1e-4)
    assert cached_features(backbone, 64, paths, tmp_path / "c", quiet=True, overlap=0.5).key != found.key
    assert pictures_of([found, found]).numbers.max() == 5


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two classes of wide pictures; a defect is 10 of their 64 x 240 pixels wide, and what is good is twice a tile."""
    root = tmp_path_factory.mktemp("wide") / "wide"
    rng = np.random.default_rng(0)
    for number in (1, 4):
        for split, kind, count in (("train", "good", 12), ("test", "good", 4), ("test", "square", 4)):
            for index in range(count):
                parts = [striped_picture(rng, number, False)[0] for _ in range(4)]
                picture = np.concatenate(parts, 1)[:, :240]
                mask = np.zeros((64, 240), np.uint8)
                if kind == "square":
                    row, col = rng.integers(5, 45), rng.integers(130, 220)
                    picture[row : row + 10, col : col + 10] = 250
                    mask[row : row + 10, col : col + 10] = 255
                    save(mask, root / f"class{number}/ground_truth/square/{index:03}_mask.png")
                save(picture, root / f"class{number}/{split}/{kind}/{index:03}.png")
    return root


@pytest.fixture(scope="module")
def tiled(pictures, options, tmp_path_factory):
    target = tmp_path_factory.mktemp("tiled") / "bundle"
    rest = [one for i, one in enumerate(options) if "--image-size" not in options[max(0, i - 1) : i + 1]]
    call("train", pictures, "-o", target, *rest, "--tile", "64", "--overlap", 0.25, "--epochs", 4)
    return target


def test_a_detector_of_tiles_finds_small_defects_where_they_are(tiled, pictures, tmp_path):
    detector = AnomalyDetector.load(tiled)
    assert detector.settings.tiling == Tiling((64, 64), 0.25) and detector.classes == ("class1", "class4")
    for path in sorted((pictures / "class4/test/square").iterdir()):
        found = detector.predict(path)
        assert found.anomaly_map.shape == (16, 60) and found.class_name == "class4"
        assert found.anomaly_map.argmax() % 60 > 30  # the right half
        assert all(region.peak[1] > 120 and region.box[0] + region.box[2] <= 240.5 for region in found.regions[:1])
    call("eval", tiled, pictures, "-o", tmp_path / "e", "-q")
    metrics = json.loads((tmp_path / "e/metrics.json").read_text())
    assert metrics["mean"]["image_auroc"] == 1.0 and metrics["mean"]["pixel_auroc"] > 0.9, metrics["mean"]
    code, output = run_command("score", tiled, pictures / "class1/test", "-o", tmp_path / "s", "--maps", "npy", "-q")
    assert code in (0, 1) and "of 8 images are defective" in output
    assert np.load(next((tmp_path / "s/maps").rglob("*.npy"))).shape == (16, 60)


def test_tiles_of_a_picture_that_is_one_tile_are_the_picture(tiled):
    detector = AnomalyDetector.load(tiled)
    picture = Image.fromarray(striped_picture(np.random.default_rng(5), 1, True)[0])
    (told,) = [detector.trained.class_number("class1")]
    direct = detector.pipeline.measure(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255, [told])
    raw = torch.nn.functional.interpolate(direct.score_maps[None], (16, 16), mode="bilinear", align_corners=True)[0, 0]
    found = detector.predict(picture, "class1")
    expected = detector.calibration.of_map(raw.numpy(), told)
    np.testing.assert_allclose(found.anomaly_map, expected, rtol=1e-4, atol=1e-4)


def test_where_nobody_looks_in_a_picture_of_tiles(tiled, pictures):
    detector = AnomalyDetector.load(tiled)
    path = next((pictures / "class4/test/square").iterdir())
    mask = np.ones((64, 240), bool)
    mask[:, 120:] = False
    found = detector.look_at(mask).predict(path)
    assert not found.label and not found.regions


def test_a_place_is_judged_by_what_good_pictures_have_there(options, tmp_path):
    """What every good picture has at one place is good there: the mean map of good pictures is flatter."""
    rng = np.random.default_rng(3)
    for index in range(36):
        picture = np.concatenate([striped_picture(rng, 1, False)[0] for _ in range(3)], 1)
        picture[20:40, 150:170] = rng.integers(0, 256, (20, 20, 1))
        save(picture, tmp_path / f"data/{'train' if index < 24 else 'test'}/good/{index:02}.png")
    spreads = {}
    for name, chosen in (("aligned", ["--aligned"]), ("loose", [])):
        rest = [one for i, one in enumerate(options) if "--image-size" not in options[max(0, i - 1) : i + 1]]
        call("train", tmp_path / "data", "-o", tmp_path / name, *rest, "--tile", 64, *chosen)
        detector = AnomalyDetector.load(tmp_path / name)
        assert detector.settings.aligned == (name == "aligned") == (detector.pipeline.places is not None)
        found = detector.predict(sorted((tmp_path / "data/test/good").iterdir()))
        mean = np.mean([one.anomaly_map for one in found], axis=0)
        spreads[name] = mean.std() / np.std([one.anomaly_map - mean for one in found])
    assert spreads["aligned"] < 0.5 * spreads["loose"], spreads


def test_good_pictures_set_the_threshold_anew(tiled, pictures, tmp_path):
    detector = AnomalyDetector.load(tiled)
    before = detector.calibration
    detector.cache_dir = tmp_path
    detector.calibrate(saved_anew(pictures, tmp_path / "anew"))
    assert detector.calibration.images == before.images == (12, 12, 24)  # pictures, and not their tiles


def test_what_tiles_do_not_go_with(tiled, pictures, options, tmp_path):
    detector = AnomalyDetector.load(tiled)
    with pytest.raises(UniadFastError, match="cuts pictures"):
        detector.export(tmp_path / "d.onnx")
    output = call("train", pictures, "-o", tmp_path / "b", *options, "--tile", "64", code=2)
    assert "give one of them" in output
    with pytest.raises(UniadFastError, match="aligned"):
        AnomalyDetector("resnet10t", aligned=True)
    assert "there is no --tile" in call("train", pictures, "-o", tmp_path / "b", "--overlap", "0.2", code=2)
    rest = options[options.index("--backbone-weights") :]
    rest = rest[: rest.index("--cache")] + ["-q"]
    output = call(
        "train", pictures, "-o", tmp_path / "b", "--backbone", "resnet10t", *rest, "--tile", 64, "--no-cache", code=2
    )
    assert "have to be kept" in output


LARGE = """
import resource, sys
from uniad_fast import AnomalyDetector
from uniad_fast.detect.score_files import score_files
from pathlib import Path
detector = AnomalyDetector.load(sys.argv[1])
(batch,) = score_files(detector, [Path(sys.argv[2])], quiet=True)
print(batch.images[0].prediction.anomaly_map.shape)
before = int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
print(before)
"""


def test_memory_grows_with_the_picture_and_not_with_its_tiles(tiled, tmp_path):
    """Two pictures that differ 16-fold: what the larger one needs more is a few times its own bytes."""
    peaks = []
    for side in (512, 2048):
        pixels = np.random.default_rng(0).integers(100, 140, (side, side, 3), dtype=np.uint8)
        save(pixels, tmp_path / f"{side}.bmp")
        command = [sys.executable, "-c", LARGE, tiled, tmp_path / f"{side}.bmp"]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        shape, peak = done.stdout.splitlines()
        assert shape == f"({side // 4}, {side // 4})"
        peaks.append(int(peak) * 1024)
    assert peaks[1] - peaks[0] < 12 * 4 * 2048 * 2048, peaks
