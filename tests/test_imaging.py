"""Decoding and resizing: formats, modes, orientation; masks keep their values."""

import io

import numpy as np
import pytest
from conftest import disc
from PIL import Image

from unet_ray.config import IGNORE, DataConfig
from unet_ray.data.imaging import ImageError, _pixels, _resized, decode_image, decode_mask, stored_values

GRAY = np.linspace(0, 255, 12 * 8).astype(np.uint8).reshape(8, 12)
RGB = np.stack([GRAY, GRAY[::-1], GRAY[:, ::-1]], axis=-1)
BINARY = DataConfig(mask_values=(0, 255))


def encoded(image: Image.Image | np.ndarray, format: str, **options) -> bytes:
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, format, **options)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("format", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("JPEG", {"quality": 95, "subsampling": 0}, 12),
    ],
)
def test_colour_formats_are_read(format, options, tolerance):
    array, size = decode_image(encoded(RGB, format, **options), 3, None)
    assert array.dtype == np.uint8
    assert size == (8, 12)
    assert np.abs(array.astype(int) - RGB).max() <= tolerance


def palette_image() -> Image.Image:
    image = Image.fromarray((GRAY > 99).astype(np.uint8))
    image.putpalette([10, 20, 30, 200, 100, 50])
    return image


@pytest.mark.parametrize(
    ("image", "format", "expected"),
    [
        (Image.fromarray(GRAY), "PNG", np.repeat(GRAY[..., None], 3, axis=-1)),
        (Image.fromarray(RGB).convert("RGBA"), "PNG", RGB),
        (palette_image(), "GIF", np.where((GRAY > 99)[..., None], [200, 100, 50], [10, 20, 30])),
        (palette_image(), "PNG", np.where((GRAY > 99)[..., None], [200, 100, 50], [10, 20, 30])),
        (Image.fromarray(GRAY > 99), "PNG", np.repeat((GRAY > 99)[..., None] * 255, 3, axis=-1)),
        (Image.fromarray(GRAY.astype(np.uint16) * 257), "PNG", np.repeat(GRAY[..., None], 3, axis=-1)),
        (Image.fromarray(GRAY.astype(np.uint16) * 257), "TIFF", np.repeat(GRAY[..., None], 3, axis=-1)),
    ],
    ids=["gray", "rgba", "gif", "palette", "1-bit", "16-bit png", "16-bit tiff"],
)
def test_modes_are_converted(image, format, expected):
    assert np.array_equal(decode_image(encoded(image, format), 3, None)[0], expected)


def test_images_have_the_requested_number_of_channels():
    for channels in (1, 2, 3, 4):
        assert decode_image(encoded(RGB, "PNG"), channels, (4, 6))[0].shape == (4, 6, channels)


def test_exif_orientation_is_applied_with_and_without_resizing():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    large = np.zeros((80, 200, 3), np.uint8)
    large[:, :100] = 255
    data = encoded(large, "JPEG", exif=exif, quality=95)
    array, size = decode_image(data, 3, None)
    assert array.shape == (200, 80, 3)
    assert size == (200, 80)
    assert array[:90].min() > 240 and array[110:].max() < 15
    small, size = decode_image(data, 3, (50, 20))
    assert size == (200, 80)
    assert small[:22].min() > 240 and small[28:].max() < 15


def test_a_large_jpeg_is_decoded_small_and_looks_the_same():
    y, x = np.mgrid[:960, :1280]
    picture = np.stack([x % 256 // 2 + 60, y % 256 // 2 + 40, (x + y) // 9], axis=-1).astype(np.uint8)
    picture = np.asarray(Image.fromarray(picture).resize((1280, 960)))
    scaled, size = decode_image(encoded(picture, "JPEG", quality=95), 3, (120, 160))
    whole = np.asarray(Image.fromarray(picture).resize((160, 120), Image.Resampling.BILINEAR))
    assert size == (960, 1280)
    assert np.abs(scaled.astype(int) - whole).mean() < 4


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"not an image at all", "not an image"),
        (encoded(np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8), "JPEG")[:900], "truncated"),
        (encoded(RGB, "PNG")[:60], "cannot be decoded"),
        (encoded(Image.fromarray(GRAY.astype(np.float32)), "TIFF"), "floating-point"),
    ],
    ids=["empty", "text", "jpeg", "png", "float"],
)
def test_an_unreadable_file_says_why(data, reason):
    with pytest.raises(ImageError, match=reason):
        decode_image(data, 3, (8, 8))


def test_a_resized_mask_has_no_new_values():
    for size in (5, 13, 64):
        mask, own = decode_mask(encoded(disc(32, (16, 16), 9) * np.uint8(255), "PNG"), BINARY, (size, size))
        assert own == (32, 32)
        assert set(np.unique(mask)) == {0, 1}


@pytest.mark.parametrize(
    ("image", "format", "values"),
    [
        (Image.fromarray(disc(32, (16, 16), 9) * np.uint8(255)), "PNG", (0, 255)),
        (Image.fromarray(disc(32, (16, 16), 9)), "PNG", (0, 1)),
        (Image.fromarray(disc(32, (16, 16), 9).astype(bool)), "PNG", (0, 1)),
        (Image.fromarray(np.repeat(disc(32, (16, 16), 9)[..., None] * np.uint8(255), 3, -1)), "PNG", (0, 255)),
        (Image.fromarray(disc(32, (16, 16), 9).astype(np.uint16) * 1000), "PNG", (0, 1000)),
    ],
    ids=["0-255", "ids", "1-bit", "gray as colour", "16-bit"],
)
def test_stored_values_become_class_ids(image, format, values):
    mask, _ = decode_mask(encoded(image, format), DataConfig(mask_values=values), None)
    assert np.array_equal(mask, disc(32, (16, 16), 9))


def test_a_gifs_palette_indices_are_the_values_whatever_their_colours():
    image = Image.fromarray(disc(32, (16, 16), 9))
    image.putpalette([0, 0, 0, 255, 255, 255])
    assert set(np.unique(stored_values(encoded(image, "GIF")))) == {0, 1}


def test_255_is_ignored_only_if_ignore_index_says_so():
    values = np.array([[0, 1], [2, 255]], np.uint8)
    config = DataConfig(mask_values=(0, 1, 2), ignore_index=255)
    assert decode_mask(encoded(values, "PNG"), config, None)[0].tolist() == [[0, 1], [2, IGNORE]]
    with pytest.raises(ImageError, match="255 outside the classes"):
        decode_mask(encoded(values, "PNG"), DataConfig(mask_values=(0, 1, 2)), None)


def test_in_between_values_of_a_jpeg_mask_are_an_error_even_between_sampled_pixels():
    values = np.zeros((64, 64), np.uint8)
    values[3, 3] = 7
    with pytest.raises(ImageError, match=r"value\(s\) 7 outside"):
        decode_mask(encoded(values, "PNG"), BINARY, (8, 8))


def test_a_mask_in_colours_is_an_error():
    with pytest.raises(ImageError, match="in colours"):
        stored_values(encoded(RGB, "PNG"))


@pytest.mark.parametrize("size", [(640, 959), (3, 5), (1, 1), (300, 3), (64, 64), (700, 900)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_resizing_equals_pillows_except_for_rounding(size, mode):
    shape = (*size, 3) if mode == "RGB" else size
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8))
    expected = np.asarray(image.resize((64, 64), Image.Resampling.BILINEAR, reducing_gap=2.0))
    found = _resized(image, (64, 64))
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= 1


@pytest.mark.parametrize(("size", "channels"), [((301, 203), 4), ((2500, 2100), 3)])
def test_pillows_own_memory_and_a_copy_of_it_are_resized_to_the_same(size, channels, monkeypatch):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8))
    if hasattr(image, "__arrow_c_array__"):  # Pillow 11.2
        assert _pixels(image).shape == (*size, channels), "more than 16 MB are in pieces, and are copied"
    shared = _resized(image, (800, 640))
    monkeypatch.delattr(Image.Image, "__arrow_c_array__", raising=False)
    assert _pixels(image).shape == (*size, 3)
    assert np.array_equal(_resized(image, (800, 640)), shared)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_masks_drawn_on_images_as_they_are_stored_are_turned_like_them(orientation):
    stored = np.zeros((6, 10), np.uint8)
    stored[0, :4] = stored[1, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    Image.fromarray(np.repeat(stored[..., None], 3, axis=2)).save(stream, "PNG", exif=exif)
    image = stream.getvalue()
    shown, size = decode_image(image, 1, None)
    data = DataConfig(mask_values=(0, 255), mask_turn=True)
    mask, own = decode_mask(encoded(stored, "PNG"), data, None, image)
    assert own == size == mask.shape and (mask == (shown[..., 0] > 127)).all()
    assert (decode_mask(image, data, None, image)[0] == mask).all()  # it has the orientation itself
    as_it_is = decode_mask(encoded(stored, "PNG"), DataConfig(mask_values=(0, 255)), None, image)[0]
    assert (as_it_is == stored // 255).all()
