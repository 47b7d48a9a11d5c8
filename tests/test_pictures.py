"""Masks as PNG files, and drawn over pictures."""

import io

import numpy as np
from PIL import Image

from unet_ray.data.pictures import encode_png, overlay


def test_a_binary_mask_is_a_one_bit_png():
    mask = np.random.default_rng(0).integers(0, 2, (13, 21)).astype(np.uint8)
    with Image.open(io.BytesIO(encode_png(mask, 1))) as image:
        assert image.mode == "1"
        assert np.array_equal(np.asarray(image), mask.astype(bool))


def test_a_mask_of_classes_is_a_palette_png_whose_indices_are_the_ids():
    mask = np.random.default_rng(0).integers(0, 12, (13, 21)).astype(np.uint8)
    with Image.open(io.BytesIO(encode_png(mask, 12))) as image:
        assert image.mode == "P"
        assert np.array_equal(np.asarray(image), mask)
        assert len({image.convert("RGB").getpixel((int(x), int(y))) for y, x in np.argwhere(mask >= 0)}) == 12


def test_an_overlay_shows_the_mask_in_colour_and_leaves_the_rest():
    picture = np.full((40, 60, 3), 200, np.uint8)
    mask = np.zeros((80, 120), np.uint8)
    mask[20:60, 30:90] = 1
    with Image.open(io.BytesIO(overlay(picture, mask, 1))) as image:
        drawn = np.asarray(image).astype(int)
    assert drawn.shape == (40, 60, 3)
    assert np.abs(drawn[2:6, 2:6] - 200).max() < 8
    assert np.abs(drawn[18:22, 28:32] - 200).max() > 40
