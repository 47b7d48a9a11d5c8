"""A network that finds nothing: the likely reason is said, and the command fails if it lies in the data."""

import dataclasses

import numpy as np
import pytest
from conftest import make_discs
from PIL import Image
from runs import config_for

from unet_ray.data.pairs import find_pairs
from unet_ray.ray_backend.session import LOCAL
from unet_ray.training.nothing_found import share_found, why_nothing
from unet_ray.training.run import train


@pytest.mark.parametrize(
    "counts, share",
    [
        ([[0, 5, 9]], 0.0),
        ([[3, 5, 1]], 0.75),
        ([[0, 7, 0]], None),
        ([[900, 0, 0], [0, 0, 10], [0, 0, 0]], 0.0),  # the background, which is found, does not count
    ],
)
def test_the_share_that_was_found(counts, share):
    assert share_found(counts) == share


def config_of(discs, *settings):
    return config_for(discs, ("data.mask_values", "[0, 255]"), *settings)


def test_what_is_found_needs_no_reason(discs):
    config = config_of(discs)
    assert why_nothing(find_pairs(config.data), config, 0.001, 500) is None


def test_masks_without_foreground_and_black_images_are_the_reason(discs, tmp_path):
    config = config_of(discs)
    pairs = find_pairs(config.data)
    wrong = dataclasses.replace(config, data=dataclasses.replace(config.data, mask_values=((0, 255), 7)))
    assert why_nothing(pairs, wrong, 0.0, 500) == (
        "no pixel of 12 training masks is foreground, with values [0, 255], 7: `unet-ray doctor` prints the values that"
        " occur",
        True,
    )
    dark = dataclasses.replace(config, data=dataclasses.replace(config.data, value_range=(0.0, 65535.0)))
    text, lasting = why_nothing(pairs, dark, 0.0, 500)
    assert (
        lasting and "data.value_range" in text and text.startswith("no value of 12 training images is above 1 of 255")
    )


def test_small_objects_and_short_trainings_are_the_reason(discs, tmp_path):
    config = config_of(discs)
    pairs = find_pairs(config.data)
    assert why_nothing(pairs, config, 0.0, 40) == (
        "the network finds nothing yet, after 40 steps: raise --epochs",
        False,
    )
    assert "lower --lr" in why_nothing(pairs, config, 0.0, 4000)[0]
    assert "no validation image has foreground" in why_nothing(pairs, config, None, 4000)[0]
    images, masks = make_discs(tmp_path / "small", 4)
    for path in masks.iterdir():
        mask = np.zeros((64, 64), np.uint8)
        mask[20, 20] = 255
        Image.fromarray(mask).save(path)
        Image.new("RGB", (64, 64), (200, 100, 50)).save(images / path.name)
    small = config_of((images, masks), ("data.image_size", 64))
    text, lasting = why_nothing(find_pairs(small.data), small, 0.0, 4000)
    assert lasting and text.startswith("what there is to find covers 0.02% of the pixels at 64x64: raise --image-size")


def test_a_training_on_the_wrong_values_says_so(discs, tmp_path):
    wrong = config_for(discs, ("data.mask_values", "[[0, 255], 7]"), ("train.epochs", 1))
    result = train(wrong, str(tmp_path / "run"), runtime=LOCAL)
    assert result.problem.startswith("no pixel of 9 training masks is foreground") or "no pixel" in result.problem
    assert train(config_of(discs, ("train.epochs", 30)), str(tmp_path / "good"), runtime=LOCAL).problem == ""
