"""Shared fixtures: seeds, and small data sets and weight files made on the spot."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from uniad_fast.recipes import FAST

BACKBONE = "resnet10t"
QUICK = ["--backbone", BACKBONE, "--image-size", "64"]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(scope="session")
def backbone_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weight file for a small backbone, random but the same in every test."""
    import timm

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / f"{BACKBONE}.pth"
    torch.save(timm.create_model(BACKBONE, pretrained=False).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def made_up_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five classes of striped pictures in MVTec layout; defects are bright squares, with pixel masks."""
    root = tmp_path_factory.mktemp("data") / "stripes"
    rng = np.random.default_rng(0)
    for number in range(5):
        folder = root / f"class{number}"
        for split, kind, count in (("train", "good", 8), ("test", "good", 4), ("test", "square", 4)):
            for index in range(count):
                picture, mask = striped_picture(rng, number, defective=kind == "square")
                save(picture, folder / split / kind / f"{index:03}.png")
                if kind == "square":
                    save(mask, folder / "ground_truth" / kind / f"{index:03}_mask.png")
    return root


def striped_picture(rng: np.random.Generator, number: int, defective: bool) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [64, 64, 3] and its mask [64, 64]."""
    wave = np.sin(np.arange(64) / (2 + number) + rng.uniform(0, 6))
    picture = 110 + 40 * wave[:, None] + rng.normal(0, 6, (64, 64))
    mask = np.zeros((64, 64), dtype=np.uint8)
    if defective:
        row, col = rng.integers(4, 40, 2)
        mask[row : row + 18, col : col + 18] = 255
        picture[mask > 0] = 250
    return np.repeat(picture.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2), mask


def save(array: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def quick_recipe():
    """The fast recipe, in seconds."""
    from dataclasses import replace

    return replace(FAST, epochs=3, batch_size=8, precision="float32")
