"""Every kind of image file: shown as a viewer would, or reported by name."""

import numpy as np
import pytest
import torch
from PIL import Image

from uniad_fast.images import UnreadableImage, as_image, list_images, read_image, read_mask, to_rgb, to_tensor

RAMP = np.linspace(0, 255, 12, dtype=np.uint8).reshape(3, 4)


def pixels(path) -> np.ndarray:
    image = read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def grey(ramp: np.ndarray) -> np.ndarray:
    return np.repeat(ramp[..., None], 3, axis=2)


def test_grey_and_rgb(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(pixels(tmp_path / "grey.png"), grey(RAMP))
    color = np.stack([RAMP, RAMP[::-1], RAMP.T.reshape(3, 4)], axis=-1)
    Image.fromarray(color).save(tmp_path / "color.bmp")
    np.testing.assert_array_equal(pixels(tmp_path / "color.bmp"), color)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_is_scaled_not_clipped(tmp_path, suffix):
    path = tmp_path / f"deep{suffix}"
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(path)
    np.testing.assert_array_equal(pixels(path), grey(RAMP))


def test_one_bit_and_palette(tmp_path):
    Image.fromarray(RAMP > 100).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(pixels(tmp_path / "bits.png"), grey((RAMP > 100) * np.uint8(255)))
    red = Image.new("P", (2, 2), 1)
    red.putpalette([0, 0, 0, 255, 0, 0])
    red.save(tmp_path / "palette.gif")
    assert (pixels(tmp_path / "palette.gif") == [255, 0, 0]).all()


def test_transparency_is_laid_over_white(tmp_path):
    rgba = np.zeros((1, 3, 4), dtype=np.uint8)
    rgba[0, :, 3] = [0, 128, 255]  # black, from see-through to solid
    Image.fromarray(rgba).save(tmp_path / "alpha.png")
    assert pixels(tmp_path / "alpha.png")[0, :, 0].tolist() == [255, 127, 0]
    Image.new("P", (2, 2), 0).save(tmp_path / "clear.png", transparency=0)
    assert (pixels(tmp_path / "clear.png") == 255).all()


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    picture = np.zeros((8, 16, 3), dtype=np.uint8)
    picture[:, :8] = 255  # white on the left: on top once turned
    Image.fromarray(picture).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    shown = pixels(tmp_path / "turned.jpg")
    assert shown.shape == (16, 8, 3) and shown[:4].min() > 200 and shown[-4:].max() < 50


def test_cmyk(tmp_path):
    Image.new("CMYK", (2, 2), (0, 0, 0, 0)).save(tmp_path / "print.jpg")
    assert (pixels(tmp_path / "print.jpg") >= 250).all()


@pytest.mark.parametrize("kind", ["empty", "text", "truncated", "missing", "float", "folder", "bomb"])
def test_unreadable_files_are_named(tmp_path, kind, monkeypatch):
    path = tmp_path / "bad.png"
    if kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("hello")
    elif kind == "truncated":
        rng = np.random.default_rng(0)
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "float":
        path = tmp_path / "bad.tif"
        Image.fromarray(RAMP.astype(np.float32)).save(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        Image.new("RGB", (64, 64)).save(path)
    with pytest.raises(UnreadableImage, match=path.name):
        read_image(path)


def test_to_tensor_resizes_to_the_square():
    tensor = to_tensor(Image.fromarray(grey(RAMP)), 8)
    assert tensor.shape == (3, 8, 8) and tensor.dtype == torch.float32
    assert tensor.min() >= 0 and tensor.max() <= 1 and tensor[0, 0, 0] < tensor[0, -1, -1]


def test_masks_are_resized_without_new_values(tmp_path):
    mask = np.zeros((10, 10), dtype=np.uint8)
    mask[2:5, 3:9] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png", 10), mask > 0)
    assert read_mask(tmp_path / "mask.png", 20).sum() == 4 * 18


@pytest.mark.parametrize(
    "given",
    [
        grey(RAMP),
        grey(RAMP) / 255,
        torch.from_numpy(grey(RAMP)).permute(2, 0, 1),
        torch.from_numpy(grey(RAMP)).permute(2, 0, 1).float() / 255,
        RAMP,
        Image.fromarray(RAMP),
    ],
    ids=["uint8", "float", "tensor", "float_tensor", "grey", "pillow"],
)
def test_as_image_takes_them_all(given):
    np.testing.assert_array_equal(np.asarray(as_image(given)), grey(RAMP))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((2, 2, 4), np.uint8), r"\(2, 2, 4\)"),
        (np.zeros((0, 2), np.uint8), r"\(0, 2\)"),
        (np.zeros((2, 2), np.int64), "int64"),
        (np.full((2, 2), 1.5), "1.5"),
        (np.full((2, 2), np.nan), "nan"),
        (torch.zeros(1, 2, 2), r"\(1, 2, 2\)"),
    ],
    ids=str,
)
def test_as_image_names_what_it_does_not_take(given, message):
    with pytest.raises(ValueError, match=message):
        as_image(given)


def test_wide_integers_are_refused():
    with pytest.raises(UnreadableImage, match="32-bit"):
        to_rgb(Image.fromarray(np.array([[70_000]], dtype=np.int32)))


def test_list_images_is_sorted_and_leaves_out_what_is_hidden(tmp_path):
    for name in ("b.PNG", "a/c.jpg", ".hidden.png", ".thumbs/x.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [str(p.relative_to(tmp_path)) for p in list_images(tmp_path)] == ["a/c.jpg", "b.PNG"]
