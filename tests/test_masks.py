"""Mask values read from a sample; masks as PNG."""

import io

import numpy as np
import pytest
from PIL import Image

from unet_ray.config import DataConfig, UserError
from unet_ray.masks import encode_png, infer_values


def stored(folder, *arrays):
    paths = []
    for number, array in enumerate(arrays):
        path = folder / f"{number}.png"
        Image.fromarray(np.array(array, np.uint8)).save(path)
        paths.append(str(path))
    return paths


@pytest.mark.parametrize(
    ("values", "classes", "expected"),
    [
        ([[0, 255]], 1, (0, 255)),
        ([[0, 1]], 1, (0, 1)),
        ([[0, 38]], 1, (0, 38)),
        ([[0, 2]], 4, (0, 1, 2, 3)),
        ([[0, 127, 255]], 3, (0, 127, 255)),
    ],
)
def test_values_become_classes_by_a_rule_for_the_whole_set(tmp_path, values, classes, expected):
    assert infer_values(stored(tmp_path, values, [[0, 0]]), classes, DataConfig()) == expected


def test_the_ignored_value_is_no_class(tmp_path):
    assert infer_values(stored(tmp_path, [[0, 1, 255]]), 1, DataConfig(ignore_index=255)) == (0, 1)


@pytest.mark.parametrize("values", [[[0, 1, 255]], [[0, 3, 7, 250]], [[0, 0]]])
def test_values_that_fit_no_rule_are_listed_with_the_remedy(tmp_path, values):
    with pytest.raises(UserError, match=r"--set data.mask_values='\[0, 255\]'"):
        infer_values(stored(tmp_path, values), 1, DataConfig())


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
