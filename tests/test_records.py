"""Finding, pairing, splitting."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from unet_ray.config import DataConfig, UserError
from unet_ray.data.inputs import find_images
from unet_ray.data.masks import infer_values
from unet_ray.data.pairs import Pair, find_pairs
from unet_ray.data.rows import Decoder
from unet_ray.data.splits import group_of, leak_report, read_split, split_pairs, write_split


def touch(folder: Path, *names: str) -> str:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return str(folder)


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


def test_a_missing_and_an_empty_folder_are_errors(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        find_images(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no image in it"):
        find_images(touch(tmp_path / "texts", "readme.txt", ".hidden.jpg"))


def test_a_glob_and_a_single_file_are_inputs_too(tmp_path):
    folder = touch(tmp_path / "f", "a/1.jpg", "a/2.png", "b/3.jpg")
    assert [i.name for i in find_images(f"{folder}/*/*.jpg")] == ["a/1.jpg", "b/3.jpg"]
    assert [i.key for i in find_images(f"{folder}/a/2.png")] == ["2"]


def test_a_folder_may_be_a_uri(tmp_path):
    folder = touch(tmp_path / "with space", "1.jpg")
    assert [i.key for i in find_images("file://" + folder.replace(" ", "%20"))] == ["1"]


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


KEYS = [f"car{car:02d}_{view:02d}" for car in range(20) for view in range(4)]


def test_a_random_split_holds_out_the_fraction_and_depends_on_the_seed_only():
    train, val = split_pairs(KEYS, DataConfig(val_fraction=0.2), seed=1)
    assert (len(train), len(val)) == (64, 16)
    assert sorted(train + val) == list(range(80))
    assert split_pairs(KEYS, DataConfig(val_fraction=0.2), seed=2)[1] != val
    shuffled = random.Random(0).sample(KEYS, len(KEYS))
    _, other = split_pairs(shuffled, DataConfig(val_fraction=0.2), seed=1)
    assert {shuffled[i] for i in other} == {KEYS[i] for i in val}


def test_a_split_by_group_never_divides_a_car():
    train, val = split_pairs(KEYS, DataConfig(val_fraction=0.2, group_by="^[^_]+"), seed=1)
    cars = [{group_of(KEYS[i], "^[^_]+") for i in part} for part in (train, val)]
    assert len(cars[1]) == 4
    assert not cars[0] & cars[1]


def test_named_groups_are_always_held_out():
    config = DataConfig(val_fraction=0.1, group_by="^[^_]+", val_groups=("car03", "car11", "car19"))
    _, val = split_pairs(KEYS, config, seed=1)
    assert {group_of(KEYS[i], "^[^_]+") for i in val} == {"car03", "car11", "car19"}
    with pytest.raises(UserError, match="'car99': no image of that group"):
        split_pairs(KEYS, DataConfig(group_by="^[^_]+", val_groups=("car99",)), seed=1)


def test_a_fraction_takes_that_many_pairs():
    train, val = split_pairs(KEYS, DataConfig(fraction=0.25, val_fraction=0.2), seed=1)
    assert (len(train), len(val)) == (16, 4)


def test_a_group_that_is_not_in_a_name_is_an_error():
    with pytest.raises(UserError, match="finds nothing in 'nogroup'"):
        split_pairs(["nogroup", "a_1"], DataConfig(group_by="^[^_]+_"), seed=1)


def test_folds_hold_out_each_group_once():
    held_out = []
    for fold in range(3):
        config = DataConfig(group_by="^[^_]+", folds=3, fold=fold)
        train, val = split_pairs(KEYS, config, seed=0)
        assert sorted(train + val) == list(range(len(KEYS)))
        cars = {group_of(KEYS[i], "^[^_]+") for i in val}
        assert not cars & {group_of(KEYS[i], "^[^_]+") for i in train}
        held_out += sorted(cars)
    assert sorted(held_out) == [f"car{car:02d}" for car in range(20)]
    with pytest.raises(UserError, match="21 folds of 20 groups: use --folds 20 or fewer"):
        split_pairs(KEYS, DataConfig(group_by="^[^_]+", folds=21), seed=0)


def test_in_the_order_of_names_neighbours_stay_together():
    slices = [f"{n:02d}" for n in range(30)]
    blocks = [split_pairs(slices, DataConfig(split_order="name", folds=5, fold=k), seed=9)[1] for k in range(5)]
    assert blocks == [list(range(6 * k, 6 * k + 6)) for k in range(5)]
    assert split_pairs(slices, DataConfig(split_order="name", val_fraction=0.1), seed=9)[1] == [0, 1, 2]


@pytest.mark.parametrize(
    ("keys", "pattern"),
    [
        (KEYS, "^[^_]+(?=_)"),
        ([f"patient{p}/{z}" for p in range(4) for z in range(5)], "^.+(?=/)"),
        ([f"scan_{p:02d}_slice_{z}" for p in range(4) for z in range(5)], "^.+(?=[_-])"),
        ([f"{n:03d}" for n in range(20)], None),
        ([f"img_{n}" for n in range(20)], None),
    ],
)
def test_groups_are_seen_in_the_names(keys, pattern):
    report = leak_report(keys[::2], keys[1::2], None)
    assert (report.pattern, report.named) == (pattern, False)
    assert (report.shared > 0) == (pattern is not None)


def test_a_leak_is_counted_and_grouping_ends_it():
    for group_by, shared in ((None, 20), ("^[^_]+", 0)):
        train, val = split_pairs(KEYS, DataConfig(group_by=group_by, val_fraction=0.5), seed=1)
        report = leak_report([KEYS[i] for i in train], [KEYS[i] for i in val], group_by)
        assert report.groups == 20
        assert report.shared == shared if group_by else report.shared > 15


def test_a_split_is_written_and_read(tmp_path):
    sides = {"a,b": "train", 'q"uote': "val", "new\nline": "val"}
    write_split(str(tmp_path / "split.csv"), sides)
    assert read_split(str(tmp_path / "split.csv")) == sides
    assert read_split(str(tmp_path / "none.csv")) == {}
