"""Splitting pairs into training and validation."""

import random

import pytest

from unet_ray.config import DataConfig, UserError
from unet_ray.data.splits import group_of, leak_report, read_split, split_pairs, write_split

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
