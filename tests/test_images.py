"""Every kind of image file: shown as a viewer would, or reported by name."""

import numpy as np
import pytest
import torch
from PIL import Image

from uniad_fast.data.image_files import list_images
from uniad_fast.data.images import UnreadableImage, as_image, read_image, to_rgb, to_tensor
from uniad_fast.data.masks import read_mask

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


def test_to_tensor_resizes():
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


# --- masks ----------------------------------------------------------------------------------------------------------

MARKED = np.zeros((96, 96), dtype=bool)
MARKED[30:54, 40:64] = True


def palette_mask():
    image = Image.fromarray(MARKED.astype(np.uint8), "P")
    image.putpalette([0, 0, 0, 128, 0, 0])
    return image


def colored(*color):
    return Image.fromarray((MARKED[..., None] * np.array(color, dtype=np.uint8)).astype(np.uint8))


MASKS = {
    "0/1": Image.fromarray(MARKED.astype(np.uint8)),
    "0/100": Image.fromarray(MARKED * np.uint8(100)),
    "0/255": Image.fromarray(MARKED * np.uint8(255)),
    "one bit": Image.fromarray(MARKED),
    "palette": palette_mask(),
    "red": colored(255, 0, 0),
    "blue": colored(0, 0, 255),
    "dark green": colored(0, 1, 0),
    "16 bit, 1": Image.fromarray(MARKED.astype(np.uint16)),
    "16 bit, 255": Image.fromarray(MARKED.astype(np.uint16) * 255),
    "32 bit, 255": Image.fromarray(MARKED.astype(np.int32) * 255),
    "32 bit, beyond 16": Image.fromarray(MARKED.astype(np.int32) * 100_000),
    "float": Image.fromarray(MARKED.astype(np.float32) * 0.5),
    "see-through": Image.merge("RGBA", [*[Image.new("L", (96, 96), 255)] * 3, Image.fromarray(MARKED * np.uint8(255))]),
}  # fmt: skip


@pytest.mark.parametrize("kind", MASKS)
def test_what_is_not_black_is_defective_whatever_the_masks_depth_and_colour(tmp_path, kind):
    path = tmp_path / ("m.tif" if MASKS[kind].mode in ("F", "I") else "m.png")
    MASKS[kind].save(path)
    assert read_mask(path, 96).sum() == 576
    np.testing.assert_array_equal(read_mask(path, 96), MARKED)


def test_blurred_edges_of_a_jpeg_mask_are_no_defects(tmp_path):
    MASKS["0/255"].save(tmp_path / "m.jpg", quality=50)
    assert read_mask(tmp_path / "m.jpg", 96).sum() == 576


def test_thin_defects_do_not_vanish(tmp_path):
    line = np.zeros((1024, 1024), dtype=np.uint8)
    line[:, 3:5] = 255
    Image.fromarray(line).save(tmp_path / "m.png")
    mask = read_mask(tmp_path / "m.png", 224)
    assert mask.sum() in (224, 448) and mask[:, :2].any()


def test_a_folder_of_masks_is_their_union(tmp_path):
    for name, rows in (("000.png", slice(0, 2)), ("001.png", slice(6, 7))):
        part = np.zeros((8, 8), dtype=np.uint8)
        part[rows] = 236
        Image.fromarray(part).save(tmp_path / name)
    assert read_mask(tmp_path, 8).sum() == 24
    (tmp_path / "none").mkdir()
    with pytest.raises(UnreadableImage, match="a folder of masks without one"):
        read_mask(tmp_path / "none", 8)


def test_a_mask_is_turned_like_its_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (16, 8)).save(tmp_path / "image.jpg", exif=exif)  # upright: 8 wide, 16 high
    stored = np.zeros((8, 16), dtype=np.uint8)
    stored[:, :4] = 255
    Image.fromarray(stored).save(tmp_path / "stored.png")
    upright = np.zeros((16, 8), dtype=np.uint8)
    upright[:4] = 255
    Image.fromarray(upright).save(tmp_path / "upright.png")
    for name in ("stored.png", "upright.png"):
        mask = read_mask(tmp_path / name, 16, tmp_path / "image.jpg")
        assert mask[:4].all() and not mask[4:].any(), name
    Image.new("L", (10, 500)).save(tmp_path / "other.png")
    with pytest.raises(UnreadableImage, match="a mask of 10 x 500 pixels for an image of 8 x 16"):
        read_mask(tmp_path / "other.png", 16, tmp_path / "image.jpg")


# --- what is not an image as it should be ---------------------------------------------------------------------------


def test_no_reader_that_runs_programs_is_asked(tmp_path, monkeypatch):
    """A PostScript file under another name started Ghostscript."""
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a program was started"))
    for name in ("picture.png", "picture.eps"):
        (tmp_path / name).write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")
        with pytest.raises(UnreadableImage, match="no image, or of a format that is not read"):
            read_image(tmp_path / name)


@pytest.mark.parametrize("suffix", ["tif", "gif", "webp", "png"])
def test_further_pages_and_frames_are_not_overlooked(tmp_path, suffix):
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    first.save(tmp_path / f"two.{suffix}", save_all=True, append_images=[second])
    with pytest.raises(UnreadableImage, match="holds 2 pictures"):
        read_image(tmp_path / f"two.{suffix}")


def test_a_wrong_checksum_is_noticed(tmp_path):
    path = tmp_path / "x.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(path)
    content = bytearray(path.read_bytes())
    end = content.index(b"IEND") - 8  # of IDAT's checksum
    content[end] ^= 1
    path.write_bytes(content)
    with pytest.raises(UnreadableImage, match=r"x\.png"):
        read_image(path)


def test_samples_of_few_bits_in_sixteen_are_remarked_on(tmp_path):
    deep = np.linspace(0, 4095, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert "use 12 of 16 bits" in read_image(tmp_path / "deep.png").info["note"]
    Image.fromarray(deep * 16).save(tmp_path / "whole.png")
    assert "note" not in read_image(tmp_path / "whole.png").info


def test_large_images_can_be_allowed(tmp_path, monkeypatch):
    from uniad_fast.data.images import allow_pixels

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    Image.new("RGB", (20, 20)).save(tmp_path / "large.png")
    with pytest.raises(UnreadableImage, match="more than 100 pixels.*--max-pixels"):
        read_image(tmp_path / "large.png")
    allow_pixels(400)
    assert read_image(tmp_path / "large.png").size == (20, 20)


def test_whether_a_failure_may_pass(tmp_path, monkeypatch):
    from uniad_fast.data import images

    def passing(path):
        with pytest.raises(UnreadableImage) as caught:
            read_image(path)
        return caught.value.passing

    (tmp_path / "junk.png").write_text("junk")
    assert not passing(tmp_path / "junk.png") and not passing(tmp_path) and passing(tmp_path / "gone.png")
    monkeypatch.setattr(images.Path, "read_bytes", lambda _: (_ for _ in ()).throw(OSError(24, "Too many open files")))
    assert passing(tmp_path / "junk.png")
