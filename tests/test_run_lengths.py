"""Masks as run lengths."""

import numpy as np
from pycocotools import mask as coco_mask

from unet_ray.data.imaging import stored_values
from unet_ray.data.run_lengths import box, coco_runs, row_runs


def random_masks():
    generator = np.random.default_rng(0)
    for number in range(60):
        height, width = generator.integers(1, 60, 2)
        mask = (generator.random((height, width)) < generator.choice([0, 0.02, 0.5, 0.98, 1])).astype(np.uint8)
        # Long runs, too: their differences take several characters.
        yield np.repeat(np.repeat(mask, generator.integers(1, 30), 0), 40, 1) if number % 3 == 0 else mask


def decoded_rows(text: str, shape: tuple[int, int]) -> np.ndarray:
    flat = np.zeros(shape[0] * shape[1], np.uint8)
    numbers = [int(word) for word in text.split()]
    for start, length in zip(numbers[::2], numbers[1::2], strict=True):
        assert start >= 1 and length >= 1
        flat[start - 1 : start - 1 + length] = 1
    return flat.reshape(shape)


def test_run_lengths_of_kaggle_are_decoded_to_the_mask():
    for mask in random_masks():
        assert (decoded_rows(row_runs(mask), mask.shape) == mask).all()
    assert row_runs(np.zeros((2, 3), np.uint8)) == ""
    assert row_runs(np.ones((2, 3), np.uint8)) == "1 6"
    assert row_runs(np.array([[0, 1, 1], [1, 0, 1]], np.uint8)) == "2 3 6 1"


def test_run_lengths_of_coco_are_those_of_pycocotools():
    for mask in random_masks():
        theirs = coco_mask.encode(np.asfortranarray(mask))
        assert coco_runs(mask) == theirs["counts"].decode()
        if mask.any():
            assert box(mask == 1) == coco_mask.toBbox(theirs).tolist()


def test_run_lengths_of_the_real_masks_come_back(real_data):
    for path in sorted((real_data / "carvana/train_masks").iterdir())[::10]:
        mask = stored_values(path.read_bytes())
        assert (decoded_rows(row_runs(mask), mask.shape) == mask).all()
        assert coco_runs(mask) == coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
