"""Colours that are one for all images, and the picture of a verdict."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from uniad_fast.detect.heatmap import heat_map, strips
from uniad_fast.detect.picture import draw_picture, map_image
from uniad_fast.detect.prediction import Prediction
from uniad_fast.detect.regions import find_regions

CALIBRATION = SimpleNamespace(
    color_range=(-1.0, 9.0), pixel_threshold=5.0, threshold=SimpleNamespace(value=3.0)
)  # what a picture needs of one


def test_heat_maps_have_one_scale():
    image = Image.new("RGB", (40, 20), (128, 128, 128))
    low, high = (np.asarray(heat_map(image, np.full((8, 8), value), (1.0, 3.0))) for value in (1.0, 3.0))
    assert low.shape == (20, 40, 3)
    assert low.max() < 100 and np.ptp(low) == 0  # a good image stays dark, and grey
    assert high.astype(int).sum(axis=2).min() > 500  # and what is not glows, whatever colours one sees
    beyond = np.asarray(heat_map(image, np.full((8, 8), 9.0), (1.0, 3.0)))
    np.testing.assert_array_equal(beyond, high)
    half = np.full((8, 8), 1.0)
    half[:, 4:] = 3.0
    sided = np.asarray(heat_map(image, half, (1.0, 3.0)))
    np.testing.assert_array_equal(sided[:, :10], low[:, :10])


def test_colours_rise_in_brightness_alone():
    ramp = np.tile(np.linspace(0, 1, 64), (4, 1))
    image = Image.new("RGB", (64, 4))
    grey = np.asarray(heat_map(image, ramp, (0.0, 1.0)).convert("L"), dtype=int)[0]
    assert (np.diff(grey) >= 0).all() and grey[-1] - grey[0] > 200


@pytest.mark.parametrize("size", [(40, 200), (333, 131), (8, 8), (3, 5)])
def test_strips_are_the_whole(size):
    values = np.random.default_rng(0).normal(size=(14, 11)).astype(np.float32)
    parts = [part for _, part in strips(values, size)]
    whole = Image.fromarray(values).resize(size, Image.Resampling.BILINEAR)
    np.testing.assert_allclose(np.concatenate(parts), np.asarray(whole), atol=1e-5)


def drawn(size=(400, 300), label=True, name="brick", mask=None):
    grid = np.zeros((16, 16), np.float32)
    grid[4:8, 10:12] = 8.0
    regions = find_regions(grid, 5.0, size[::-1])
    prediction = Prediction(7.25, label, grid, regions, name)
    return np.asarray(draw_picture(Image.new("RGB", size, (90, 120, 150)), prediction, CALIBRATION, mask=mask))


def test_a_picture_shows_image_map_and_verdict():
    mask = np.zeros((300, 400), bool)
    mask[100:150, 260:300] = True
    picture, good, true = drawn(), drawn(label=False), drawn(mask=mask)
    assert picture.shape[0] > 300 and picture.shape[1] > 2 * 400
    top = picture.shape[0] - 300 - 6
    image = picture[top : top + 300, 6:406]
    assert (image == (90, 120, 150)).all()
    heat = picture[top : top + 300, 412:812]
    assert (heat == (120, 200, 255)).all(axis=2).sum() > 100  # a box
    assert (heat == (255, 255, 255)).all(axis=2).sum() > 100  # an outline
    assert heat[110, 270].sum() > 400 > 300 > heat[10, 10].sum()
    assert (picture[:top] != good[:top]).any()  # another verdict, in another colour
    green = (true == (70, 255, 160)).all(axis=2)
    assert green[top : top + 300, 6:406].sum() > 100 and green[top : top + 300, 412:812].sum() > 100
    assert not (picture == (70, 255, 160)).all(axis=2).any()


def test_pictures_of_odd_sizes_and_names():
    for size in ((1, 1), (3000, 4), (4, 3000), (20, 20)):
        assert drawn(size=size).shape[1] >= 2 * size[0]
    assert drawn(name="x" * 5000).shape[1] < 2000
    assert drawn(name="\x1b[31m中\n").shape == drawn(name=None).shape
    assert drawn(label=None).shape == drawn().shape


def test_a_map_alone_keeps_its_scores():
    values = np.linspace(-40, 300, 400, dtype=np.float32).reshape(20, 20)
    pixels = np.asarray(map_image(values, (20, 20)))
    assert pixels.dtype == np.uint16
    back = pixels / 256.0 - 32
    inside = (values > -32) & (values < 223)
    np.testing.assert_allclose(back[inside], values[inside], atol=1 / 500)
    assert pixels[values < -32].max() == 0 and pixels[values > 224].min() == 65535


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here")
def test_a_large_picture_needs_little_memory():
    code = """
import numpy as np
from pathlib import Path
from PIL import Image
from test_heatmap import CALIBRATION, Prediction, draw_picture
image, grid = Image.new("RGB", (6000, 6000)), np.zeros((16, 16), np.float32)
grid[8:] = 8
assert draw_picture(image, Prediction(7.0, True, grid), CALIBRATION).height > 6000
print(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.split()[1]) < 1_000_000, run.stdout  # KB of a whole process with torch
