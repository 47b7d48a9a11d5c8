"""Splitting pairs into training and validation."""

import random

import pytest

from unet_ray.config import DataConfig, UserError
from unet_ray.data.splits import divided, group_of, leak_report, likely_groups, read_split, split_pairs, write_split

KEYS = [f"car{car:02d}_{view:02d}" for car in range(20) for view in range(4)]


def test_a_random_split_holds_out_the_fraction_and_depends_on_the_seed_only():
    train, val = split_pairs(KEYS, DataConfig(val_fraction=0.2), seed=1)
    assert (len(train), len(val)) == (64, 16)
    assert sorted(train + val) == list(range(80))
    assert split_pairs(KEYS, DataConfig(val_fraction=0.2), seed=2)[1] != val
    shuffled = random.Random(0).sample(KEYS, len(KEYS))
    _, other = split_pairs(shuffled, DataConfig(val_fraction=0.2), seed=1)
    assert {shuffled[i] for i in other} == {KEYS[i] for i in val}


def test_a_split_by_group_keeps_each_car_on_one_side():
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
def test_groups_are_recognised_in_the_names(keys, pattern):
    report = leak_report(keys[::2], keys[1::2], None)
    assert (report.pattern, report.named) == (pattern, False)
    assert (report.shared > 0) == (pattern is not None)


def test_a_leak_is_counted_and_grouping_ends_it():
    for group_by, shared in ((None, range(16, 21)), ("^[^_]+", [0])):
        train, val = split_pairs(KEYS, DataConfig(group_by=group_by, val_fraction=0.5), seed=1)
        report = leak_report([KEYS[i] for i in train], [KEYS[i] for i in val], group_by)
        assert report.groups == 20
        assert report.shared in shared


def test_a_split_is_written_and_read(tmp_path):
    sides = {"a,b": "train", 'q"uote': "val", "new\nline": "val"}
    write_split(str(tmp_path / "split.csv"), sides)
    assert read_split(str(tmp_path / "split.csv")) == sides
    assert read_split(str(tmp_path / "none.csv")) == {}


# --- splits that exist ---

FOLDERS = ["images/training/1", "images/training/2", "images/valid/1", "images/testing/1"]


def parts(keys: list[str], **settings) -> list[list[str]]:
    return [[keys[i] for i in part] for part in divided(keys, DataConfig(**settings), 42)]


def test_folders_named_so_are_a_split_and_no_groups():
    assert parts(FOLDERS) == [FOLDERS[:2], FOLDERS[2:3], FOLDERS[3:]]
    assert likely_groups([f"{part}/{n}" for part in ("train", "val") for n in range(9)]) is None
    assert likely_groups([f"{kind}/{n}" for kind in ("good", "defect") for n in range(9)]) is None
    train, val, test = parts(FOLDERS, split="random", val_fraction=0.25)
    assert len(val) == 1 and sorted([*train, *val]) == sorted(FOLDERS) and not test


def test_without_a_folder_to_validate_on_some_to_train_on_are_drawn():
    keys = [f"train/{n}" for n in range(10)] + ["test/1"]
    train, val, test = parts(keys)
    assert test == ["test/1"] and len(val) == 2 and sorted([*train, *val]) == sorted(keys[:10])
    train, val, test = parts([*keys, "val/1"], folds=2)
    assert test == ["test/1"] and len(train) + len(val) == 11 and len(val) in (5, 6)


def test_one_image_outside_such_folders_means_a_random_split():
    train, val, test = parts([*FOLDERS, "other"])
    assert not test and len(train) + len(val) == 5


@pytest.mark.parametrize("kind", ["csv", "paths", "lists"])
def test_a_file_says_which_part_an_image_is_in(tmp_path, kind):
    keys = ["a/1", "a/2", "b/3", "b/4"]
    if kind == "lists":
        for part, names in (("train", "1\n2"), ("val", "3"), ("test", "")):
            (tmp_path / f"{part}.txt").write_text(f"{names}\n")
    else:
        column, end = ("key", "") if kind == "csv" else ("path", ".jpg")
        rows = [f"a/1{end},training", f"a/2{end},train", f"b/3{end},valid"]
        (tmp_path / "split.csv").write_text(f"{column},part\n" + "\n".join(rows))
    given = tmp_path if kind == "lists" else tmp_path / "split.csv"
    assert parts(keys, split=str(given)) == [["a/1", "a/2"], ["b/3"], []]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("key,part\n1,train\n7,val\n", "1 of 2 names are no image: '7'; the images are named like '1', '2'"),
        ("key,part\n1,train\n1,val\n", "'1' is in train and in val"),
        ("key,part\n1,teach\n", "the part is train, val or test"),
        ("1,train\n2,val\n", "its first line must name the columns key"),
        ("", "its first line must name the columns key"),
    ],
)
def test_a_split_file_that_does_not_fit_is_an_error(tmp_path, text, message):
    (tmp_path / "split.csv").write_text(text)
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        parts(["1", "2"], split=str(tmp_path / "split.csv"))


def test_a_split_file_or_list_that_is_missing_is_an_error(tmp_path):
    for name in ("none.csv", ""):
        with pytest.raises(UserError, match=r"no such file|no train\.txt in it"):
            parts(["1", "2"], split=str(tmp_path / name))


def test_one_image_can_be_trained_on_if_none_is_to_validate_on():
    with pytest.raises(UserError, match=r"there is 1 image: .*--set data\.val_fraction=0"):
        split_pairs(["a"], DataConfig(), seed=0)
    assert split_pairs(["a"], DataConfig(val_fraction=0), seed=0) == ([0], [])
    assert divided(["train/a", "test/b"], DataConfig(val_fraction=0), 0) == ([0], [], [1])


def test_a_name_that_is_a_key_means_that_key_whatever_lies_in_subfolders(tmp_path):
    keys = ["a", "b", "sub/a", "sub/b"]
    write_split(str(tmp_path / "split.csv"), {"a": "train", "sub/a": "val", "b": "train", "sub/b": "test"})
    assert parts(keys, split=str(tmp_path / "split.csv")) == [["a", "b"], ["sub/a"], ["sub/b"]]
