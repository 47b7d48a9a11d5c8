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


def pairs_in(images, masks, **settings) -> list[Pair]:
    def text(location):
        return tuple(map(str, location)) if isinstance(location, tuple) else str(location)

    return find_pairs(DataConfig(images=text(images), masks=text(masks), **settings), say=True)


def names(pairs: list[Pair]) -> list[tuple[str, str, str]]:
    """Returns (key, name of the image, names of the masks) of each pair."""
    return [(p.key, Path(p.image).name, "+".join(Path(f).name for f in p.mask.split("\0"))) for p in pairs]


def test_kaggles_layout_is_paired(tmp_path):
    images = touch(tmp_path / "train", "a_01.jpg", "a_02.jpg")
    masks = touch(tmp_path / "train_masks", "a_02_mask.gif", "a_01_mask.gif")
    assert pairs_in(images, masks) == [
        Pair("a_01", f"{images}/a_01.jpg", f"{masks}/a_01_mask.gif"),
        Pair("a_02", f"{images}/a_02.jpg", f"{masks}/a_02_mask.gif"),
    ]


def test_train1_never_matches_train10(tmp_path):
    images = touch(tmp_path / "i", "train1.png", "train10.png")
    masks = touch(tmp_path / "m", "train10.png", "train1.png")
    assert [(Path(p.image).name, Path(p.mask).name) for p in pairs_in(images, masks)] == [
        ("train1.png", "train1.png"),
        ("train10.png", "train10.png"),
    ]


def test_equal_stems_in_different_folders_are_different_images(tmp_path):
    images = touch(tmp_path / "i", "x/1.jpg", "y/1.jpg")
    masks = touch(tmp_path / "m", "x/1.png", "y/1_mask.png")
    assert [p.key for p in pairs_in(images, masks)] == ["x/1", "y/1"]


def test_images_and_masks_may_share_a_folder(tmp_path):
    folder = touch(tmp_path / "both", "1.jpg", "1_mask.png", "two words.jpg", "two words_mask.png")
    assert [p.key for p in pairs_in(folder, folder)] == ["1", "two words"]


@pytest.mark.parametrize(
    ("images", "masks", "message"),
    [
        (["1.jpg"], ["2.png"], "no mask belongs to an image, such as '1.jpg' and '2.png'"),
        (["1.jpg"], ["1.png", "1_mask.gif"], "several masks (1: 1.png, 1_mask.gif)"),
        (["1.jpg", "1.png"], ["1.png"], "two images of the same name"),
    ],
)
def test_what_cannot_be_told_apart_is_an_error(tmp_path, images, masks, message):
    with pytest.raises(UserError) as error:
        pairs_in(touch(tmp_path / "i", *images), touch(tmp_path / "m", *masks))
    assert message in str(error.value)


def test_images_without_a_mask_and_masks_without_an_image_are_left_out_and_said(tmp_path, caplog):
    images = touch(tmp_path / "i", "1.jpg", "2.jpg", "3.jpg")
    masks = touch(tmp_path / "m", "2.png", "9.png")
    assert names(pairs_in(images, masks)) == [("2", "2.jpg", "2.png")]
    assert "2 images have no mask: they are left out ('1.jpg', '3.jpg')" in caplog.text
    assert "1 masks have no image: they are left out ('9.png')" in caplog.text


@pytest.mark.parametrize(
    ("images", "masks", "match", "found"),
    [
        (["21_training.tif"], ["21_manual1.gif"], r"^[0-9]+", [("21_training", "21_training.tif", "21_manual1.gif")]),
        (["a_0000.png"], ["a.png"], r"(.+?)(?:_0000)?$", [("a_0000", "a_0000.png", "a.png")]),
        (["s/x.jpg", "t/x.jpg"], ["t/x-l.png"], r"(.+?)(?:-l)?$", [("t/x", "x.jpg", "x-l.png")]),
        (["1.jpg"], ["1_ids.png", "1_colour.png"], r"(.+?)(?:_ids)?$", [("1", "1.jpg", "1_ids.png")]),
    ],
)
def test_match_finds_what_both_names_have(tmp_path, images, masks, match, found):
    pairs = pairs_in(touch(tmp_path / "i", *images), touch(tmp_path / "m", *masks), match=match)
    assert names(pairs) == found


def test_a_match_that_finds_nothing_or_too_little_is_an_error(tmp_path):
    images, masks = touch(tmp_path / "i", "a1.jpg", "b1.jpg"), touch(tmp_path / "m", "a1.png", "b1.png")
    with pytest.raises(UserError, match=r"--match 'z\+' finds nothing in the names of the images, such as 'a1.jpg'"):
        pairs_in(images, masks, match="z+")
    with pytest.raises(UserError, match=r"--match '\[0-9\]' finds '1' in more than one image"):
        pairs_in(images, masks, match="[0-9]")
    with pytest.raises(UserError, match=r"--match '\(' is not a regular expression"):
        pairs_in(images, masks, match="(")


def test_of_a_glob_the_key_is_what_its_stars_stand_for(tmp_path):
    folder = touch(tmp_path / "set", *(f"{part}/{kind}/1.png" for part in ("train", "test") for kind in ("i", "m")))
    found = pairs_in(f"{folder}/*/i", f"{folder}/*/m")
    assert [(p.key, p.mask.split("/")[-3]) for p in found] == [("test/1", "test"), ("train/1", "train")]
    both = touch(tmp_path / "both", "3_sat.jpg", "3_mask.png", "4_sat.jpg", "4_mask.png")
    assert [p.key for p in pairs_in(f"{both}/*_sat.jpg", f"{both}/*_mask.png")] == ["3", "4"]
    same = touch(tmp_path / "same", "a.png", "a_1stHO.png", "b.png", "b_1stHO.png")
    assert names(pairs_in(f"{same}/*.png", f"{same}/*_1stHO.png")) == [
        ("a", "a.png", "a_1stHO.png"),
        ("b", "b.png", "b_1stHO.png"),
    ]


def test_several_folders_are_told_apart_by_where_they_differ(tmp_path):
    folders = {
        (part, kind): touch(tmp_path / part / kind, "1.png", "2.png")
        for part in ("train", "val")
        for kind in ("images", "masks")
    }
    images, masks = (tuple(folders[part, kind] for part in ("train", "val")) for kind in ("images", "masks"))
    found = pairs_in(images, masks)
    assert [p.key for p in found] == ["train/1", "train/2", "val/1", "val/2"]
    assert all(Path(p.image).parts[-3] == Path(p.mask).parts[-3] for p in found)


def test_several_masks_are_objects_or_classes(tmp_path):
    images = touch(tmp_path / "i", "1.png", "2.png")
    masks = touch(tmp_path / "m", "1_a.png", "1_b.png", "2_a.png")
    with pytest.raises(UserError, match=r"--set data\.several_masks=union"):
        pairs_in(images, masks, match="^[0-9]+")
    found = pairs_in(images, masks, match="^[0-9]+", several_masks="union")
    assert names(found) == [("1", "1.png", "1_a.png+1_b.png"), ("2", "2.png", "2_a.png")]
    folders = touch(tmp_path / "c", "EX/1.png", "MA/1.png", "MA/2.png")
    found = pairs_in(images, folders, match="[0-9]+$", several_masks="classes")
    assert [[bool(file) for file in p.mask.split("\0")] for p in found] == [[True, True], [False, True]]


def test_the_real_carvana_files_are_paired_split_by_car_and_read(real_data):
    folder = real_data / "carvana"
    config = DataConfig(image_size=512, group_by="^[^_]+", val_fraction=0.2)
    pairs = pairs_in(folder / "train", folder / "train_masks")
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
