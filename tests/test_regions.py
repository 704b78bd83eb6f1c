"""Regions: found, counted, and placed in the image's own pixels."""

import json

import numpy as np
import pytest
from conftest import call, save, saved_anew, striped_picture
from PIL import Image

from uniad_fast import AnomalyDetector
from uniad_fast.data.samples import Sample
from uniad_fast.detect.regions import find_regions


def test_regions_by_hand():
    anomaly_map = np.zeros((4, 8), dtype=np.float32)
    anomaly_map[0, 1:3] = 2, 3
    anomaly_map[1, 3] = 5  # touches the corner of the first
    anomaly_map[3, 6:8] = 4, 9
    found = find_regions(anomaly_map, 1.5, (40, 160))  # a pixel of the map is 10 high and 20 wide
    assert [region.to_json() for region in found] == [
        {"bbox": [120, 30, 40, 10], "area": 400, "peak": [35, 150], "score": 9.0, "mean": 6.5},
        {"bbox": [20, 0, 60, 20], "area": 600, "peak": [15, 70], "score": 5.0, "mean": pytest.approx(10 / 3)},
    ]
    assert len(find_regions(anomaly_map, 2.5, (4, 8))) == 2 and find_regions(anomaly_map, 9.0, (4, 8)) == ()
    (everything,) = find_regions(anomaly_map, -1.0, (4, 8))
    assert everything.box == (0, 0, 8, 4) and everything.area == 32


def test_a_region_inside_anothers_box_is_not_counted_twice():
    ring = np.ones((5, 5), dtype=np.float32)
    ring[1:4, 1:4] = 0
    ring[2, 2] = 7
    inner, outer = find_regions(ring, 0.5, (5, 5))
    assert (inner.area, inner.score, inner.box) == (1, 7.0, (2, 2, 1, 1))
    assert (outer.area, outer.score, outer.mean) == (16, 1.0, 1.0)


def test_good_images_have_regions_no_more_often_than_promised(bundle, made_up_classes, tmp_path):
    """The threshold's own images: at a rate of 1 in 9, the eighth of eight has the highest pixel of all, and none
    more.
    """
    detector = AnomalyDetector.load(bundle)
    files = sorted(saved_anew(made_up_classes / "class0/train/good", tmp_path).iterdir())
    detector.calibrate([Sample(path, "class0") for path in files], false_alarm_rate=1 / 9, quiet=True)
    predictions = detector.predict(files, "class0")
    assert len(files) == 8 and all(prediction.regions == () for prediction in predictions)
    highest = max(prediction.anomaly_map.max() for prediction in predictions)
    assert detector.calibration.pixel_threshold == pytest.approx(highest, rel=1e-4)


def test_score_lists_them_in_pixels_of_the_image(bundle, made_up_classes, tmp_path):
    """A defect in a picture of another size and shape than the network's square."""
    picture = np.repeat(np.repeat(striped_picture(np.random.default_rng(0), 0, False)[0], 2, axis=0), 5, axis=1)
    picture[80:120, 200:290] = 250
    detector = AnomalyDetector.load(bundle)
    detector.calibrate(saved_anew(made_up_classes, tmp_path / "anew"), false_alarm_rate=0.3, quiet=True)
    detector.save(tmp_path / "b")
    bundle = tmp_path / "b"
    save(picture, tmp_path / "in/a.png")
    assert Image.open(tmp_path / "in/a.png").size == (320, 128)
    call("score", bundle, tmp_path / "in", "-o", tmp_path / "o", "--threshold", -1e9, "--class", "class0", "-q", code=1)
    (line,) = map(json.loads, (tmp_path / "o/scores.jsonl").read_text().splitlines())
    worst = line["regions"][0]
    left, top, width, height = worst["bbox"]
    row, col = worst["peak"]
    assert 60 <= row <= 128 and 150 <= col <= 320, worst
    assert 0 <= left < left + width <= 320 and 0 <= top < top + height <= 128
    assert left <= col <= left + width and top <= row <= top + height and 0 < worst["area"] <= width * height
    options = ["--threshold", -1e9, "--class", "class0", "--min-area", 320 * 128 + 1, "--no-heat-maps", "-q"]
    call("score", bundle, tmp_path / "in", "-o", tmp_path / "p", *options, code=1)
    (line,) = map(json.loads, (tmp_path / "p/scores.jsonl").read_text().splitlines())
    assert line["regions"] == [] and line["label"] == 1
