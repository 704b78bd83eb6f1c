"""Shared fixtures: seeds, and small data sets and weight files made on the spot."""

import os
from collections.abc import Iterator
from pathlib import Path

# Before the first import of torch: tests side by side share the processor instead of fighting over it.
if (workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of the kernels

from uniad_fast.models.backbone import Backbone
from uniad_fast.ops.dispatch import IMPLS

BACKBONE = "resnet10t"
QUICK = ["--backbone", BACKBONE, "--image-size", "64"]


def impls_and_dtypes(leave_out: str = "") -> list:
    """(impl, dtype) to be held to the error budget. Triton's interpreter computes bfloat16 wrongly."""
    return [
        pytest.param(impl, dtype, id=f"{impl}-{str(dtype)[6:]}")
        for impl in IMPLS
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
        if impl != leave_out and not (impl == "triton" and dtype == torch.bfloat16 and not torch.cuda.is_available())
    ]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(autouse=True)
def made_where_the_impl_runs(request: pytest.FixtureRequest) -> Iterator[None]:
    """On a machine with a GPU, a test of impl "triton" makes its tensors there: compiled kernels run nowhere else."""
    parameters = getattr(request.node, "callspec", None)
    if torch.cuda.is_available() and parameters and parameters.params.get("impl") == "triton":
        torch.set_default_device("cuda")
        yield
        torch.set_default_device(None)
    else:
        yield


@pytest.fixture(scope="session")
def backbone_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weight file for a small backbone, random but the same in every test."""
    import timm

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / f"{BACKBONE}.pth"
    torch.save(timm.create_model(BACKBONE, pretrained=False).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def backbone_tensors() -> dict[str, torch.Tensor]:
    """An EfficientNet-PyTorch b4's, random but the same in every test; not to be written to."""
    import public_efficientnet

    torch.manual_seed(1)
    return public_efficientnet.random_tensors()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of four pictures."""
    rng = np.random.default_rng(0)
    for index in range(4):
        save(striped_picture(rng, index, False)[0], tmp_path / "photos" / f"{index}.png")
    return tmp_path / "photos"


@pytest.fixture(scope="session")
def options(backbone_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> list:
    """Of `uniad-fast train`, for a small detector soon."""
    cache = tmp_path_factory.mktemp("cache")
    return [*QUICK, "--backbone-weights", backbone_weights, "--epochs", 3, "--cache", cache, "-q"]


@pytest.fixture(scope="module")
def backbone(backbone_weights: Path) -> Backbone:
    """A small one for images of 64 pixels."""
    return Backbone.pretrained("resnet10t", 64, backbone_weights)


@pytest.fixture(scope="session")
def bundle(made_up_classes: Path, options: list, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `uniad-fast train` makes of the made-up classes; not to be written to."""
    target = tmp_path_factory.mktemp("trained") / "bundle"
    call("train", made_up_classes, "-o", target, *options)
    return target


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


def saved_anew(folder: Path, to: Path) -> Path:
    """The same pictures in other files: what a detector has learnt from is not taken for its threshold."""
    for path in folder.rglob("*.png"):
        target = to / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).save(target, compress_level=1)
        assert target.read_bytes() != path.read_bytes()
    return to


def run_command(*arguments: object) -> tuple[int, str]:
    """(exit code, output) of a uniad-fast command."""
    from uniad_fast.cli.main import app

    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output + (repr(result.exception) if result.exit_code not in range(4) else "")


def call(*arguments: object, code: int = 0) -> str:
    """Output of a uniad-fast command that ends with this exit code."""
    ended, output = run_command(*arguments)
    assert ended == code, output
    return output


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
