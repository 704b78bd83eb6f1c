"""Colours that are one for all images."""

import numpy as np
from PIL import Image

from uniad_fast.detect.heatmap import heat_map


def test_heat_maps_have_one_scale():
    image = Image.new("RGB", (40, 20), (128, 128, 128))
    low, high = (np.asarray(heat_map(image, np.full((8, 8), value), (1.0, 3.0))) for value in (1.0, 3.0))
    assert low.shape == (20, 40, 3)
    assert np.abs(low.astype(int) - 128).max() < 12  # a good image keeps its look
    assert high[..., 0].min() > 170 and high[..., 2].max() < 80  # red
    beyond = np.asarray(heat_map(image, np.full((8, 8), 9.0), (1.0, 3.0)))
    np.testing.assert_array_equal(beyond, high)
    half = np.full((8, 8), 1.0)
    half[:, 4:] = 3.0
    sided = np.asarray(heat_map(image, half, (1.0, 3.0)))
    np.testing.assert_array_equal(sided[:, :10], low[:, :10])
