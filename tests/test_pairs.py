"""Matching images with masks."""

from dataclasses import replace
from pathlib import Path

import pytest
from test_inputs import touch

from unet_ray.config import DataConfig, UserError
from unet_ray.data.masks import infer_values
from unet_ray.data.pairs import Pair, find_pairs
from unet_ray.data.rows import Decoder
from unet_ray.data.splits import group_of, split_pairs


def test_kaggles_layout_is_paired(tmp_path):
    images = touch(tmp_path / "train", "a_01.jpg", "a_02.jpg")
    masks = touch(tmp_path / "train_masks", "a_02_mask.gif", "a_01_mask.gif")
    assert find_pairs(images, masks) == [
        Pair("a_01", f"{images}/a_01.jpg", f"{masks}/a_01_mask.gif"),
        Pair("a_02", f"{images}/a_02.jpg", f"{masks}/a_02_mask.gif"),
    ]


def test_train1_never_matches_train10(tmp_path):
    images = touch(tmp_path / "i", "train1.png", "train10.png")
    masks = touch(tmp_path / "m", "train10.png", "train1.png")
    assert [(Path(p.image).name, Path(p.mask).name) for p in find_pairs(images, masks)] == [
        ("train1.png", "train1.png"),
        ("train10.png", "train10.png"),
    ]


def test_equal_stems_in_different_folders_are_different_images(tmp_path):
    images = touch(tmp_path / "i", "x/1.jpg", "y/1.jpg")
    masks = touch(tmp_path / "m", "x/1.png", "y/1_mask.png")
    assert [p.key for p in find_pairs(images, masks)] == ["x/1", "y/1"]


def test_images_and_masks_may_share_a_folder(tmp_path):
    folder = touch(tmp_path / "both", "1.jpg", "1_mask.png", "two words.jpg", "two words_mask.png")
    assert [p.key for p in find_pairs(folder, folder)] == ["1", "two words"]


@pytest.mark.parametrize(
    ("images", "masks", "message"),
    [
        (["1.jpg", "2.jpg"], ["1.png"], "no mask for '2.jpg'"),
        (["1.jpg"], ["1.png", "3_mask.png"], "no image for the mask(s) '3_mask.png'"),
        (["1.jpg"], ["1.png", "1_mask.gif"], "two masks (1: 1.png, 1_mask.gif)"),
        (["1.jpg", "1.png"], ["1.png"], "two images of the same name"),
        (["1.jpg", "1_mask.jpg"], ["1_mask.png"], "no mask for"),
    ],
)
def test_unmatched_and_ambiguous_names_are_listed(tmp_path, images, masks, message):
    with pytest.raises(UserError) as error:
        find_pairs(touch(tmp_path / "i", *images), touch(tmp_path / "m", *masks))
    assert message in str(error.value)


def test_the_real_carvana_files_are_paired_split_by_car_and_read(real_data):
    folder = real_data / "carvana"
    config = DataConfig(image_size=512, group_by="^[^_]+", val_fraction=0.2)
    pairs = find_pairs(str(folder / "train"), str(folder / "train_masks"))
    assert len(pairs) == 78
    assert all(Path(p.mask).name == f"{p.key}_mask.gif" for p in pairs)
    train, val = split_pairs([p.key for p in pairs], config, seed=42)
    cars = [{group_of(pairs[i].key, "^[^_]+") for i in part} for part in (train, val)]
    assert (len(cars[0]), len(cars[1])) == (11, 3) and not cars[0] & cars[1]
    assert infer_values([p.mask for p in pairs], 1, config) == (0, 1)
    decoder = Decoder(replace(config, mask_values=(0, 1)), 3)
    for pair in pairs[::20]:
        image, mask = decoder(pair.image, pair.mask).values()
        assert image.shape == (512, 512, 3) and mask.shape == (512, 512)
        assert 0.05 < mask.mean() < 0.6  # the car fills a good part of the picture
        assert image[mask == 0].mean() > image[mask == 1].mean()  # on a bright floor
