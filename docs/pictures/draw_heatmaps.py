"""Draws docs/pictures/heatmaps.png: defects painted on the textures of scikit-image's wheel (CC0), and found.

    pip install -e '.[dev]' && python docs/pictures/draw_heatmaps.py

Good images are crops from the left part of each texture, the pictures shown are crops from the right part.
"""

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from skimage import data

from uniad_fast import AnomalyDetector
from uniad_fast.detect.heatmap import heat_map, side_by_side
from uniad_fast.detect.results import write_png

CROP, GOOD_CROPS, SPLIT = 176, 96, 320
TEXTURES = {"brick": data.brick, "grass": data.grass, "gravel": data.gravel}


def crop(texture: np.ndarray, columns: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    row = rng.integers(0, texture.shape[0] - CROP + 1)
    col = rng.integers(columns[0], columns[1] - CROP + 1)
    return Image.fromarray(texture[row : row + CROP, col : col + CROP]).convert("RGB")


def scratch(image: Image.Image) -> Image.Image:
    ImageDraw.Draw(image).line([(40, 130), (75, 95), (120, 60)], fill=(225, 225, 220), width=4)
    return image


def blot(image: Image.Image) -> Image.Image:
    ImageDraw.Draw(image).ellipse([100, 30, 140, 66], fill=(35, 30, 28))
    return image


def patch(image: Image.Image) -> Image.Image:
    image.paste(image.crop((20, 20, 60, 60)).rotate(90).resize((52, 52)), (30, 90))
    return image


def main() -> None:
    rng = np.random.default_rng(0)
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name, texture in TEXTURES.items():
            for index in range(GOOD_CROPS):
                write_png(crop(texture(), (0, SPLIT), rng), root / "data" / name / "train/good" / f"{index}.png")
        detector = AnomalyDetector("tf_efficientnet_lite0", cache_dir=root / "cache").fit(root / "data")
        for name, texture in TEXTURES.items():
            for spoil in (None, scratch if name != "grass" else patch, blot):
                image = crop(texture(), (SPLIT, 512), rng)
                image = spoil(image) if spoil else image
                prediction = detector.predict(image)
                print(name, spoil.__name__ if spoil else "good", prediction.score, prediction.label)
                pairs.append((image, heat_map(image, prediction.anomaly_map, detector.calibration.color_range)))
    write_png(side_by_side(pairs, height=120).quantize(128), Path(__file__).with_name("heatmaps.png"))


if __name__ == "__main__":
    main()
