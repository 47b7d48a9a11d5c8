"""Augmentation: image and mask together, the same for the same (seed, epoch, image)."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import disc

from unet_ray.config import AugmentConfig, UserError
from unet_ray.training.augment import AUGMENTATIONS, Brightness, Contrast, Elastic, Gamma, _recolour, augment

ALL = AugmentConfig(
    hflip=0.5,
    vflip=0.5,
    quarter_turns=True,
    shift=0.1,
    rotation=30,
    scale=0.2,
    elastic=3,
    brightness=0.1,
    contrast=0.2,
    gamma=0.2,
)
NOTHING = {"hflip": 0.0}


def scene(count=3, size=64):
    """Returns bright discs on dark ground, with a 32-pixel gap at one side: image, mask, and the mask as border map."""
    mask = torch.from_numpy(np.stack([disc(size, (20 + 3 * n, 26), 13) for n in range(count)]))
    return {"image": (mask * 180 + 40)[..., None].expand(-1, -1, -1, 3).contiguous(), "mask": mask, "border": mask}


def run(arrays, config, rows=None, **key):
    rows = range(len(arrays["mask"])) if rows is None else rows
    return augment(arrays, rows, config=config, **{"seed": 1, "epoch": 1, **key})


def test_all_of_it_keeps_image_and_masks_in_step():
    for epoch in range(5):
        out = run(scene(), ALL, epoch=epoch)
        assert out["image"].dtype == out["mask"].dtype == torch.uint8
        assert torch.equal(out["mask"], out["border"])
        gray = out["image"][..., 0].float()
        for image, mask in zip(gray, out["mask"], strict=True):
            inside = image > (image.min() + image.max()) / 2
            assert (inside & (mask == 1)).sum() / (inside | (mask == 1)).sum() > 0.9


def test_a_picture_does_not_depend_on_its_batch_but_on_seed_and_epoch():
    arrays = scene()
    whole = run(arrays, ALL)
    for row in range(3):
        alone = run({name: values[row : row + 1] for name, values in arrays.items()}, ALL, rows=[row])
        assert all(torch.equal(alone[name][0], whole[name][row]) for name in whole)
    assert not torch.equal(run(arrays, ALL, seed=2)["image"], whole["image"])
    assert not torch.equal(run(arrays, ALL, epoch=2)["image"], whole["image"])


def test_one_setting_does_not_change_anothers_draws():
    flips = run(scene(), AugmentConfig(hflip=0.5))["mask"]
    assert torch.equal(flips, run(scene(), AugmentConfig(hflip=0.5, brightness=0.3, gamma=0.2))["mask"])


def test_nothing_asked_changes_nothing():
    arrays = scene()
    out = run(arrays, AugmentConfig(**NOTHING))
    assert all(torch.equal(out[name], arrays[name]) for name in arrays)


def test_quarter_turns_are_exact_and_all_four_occur():
    arrays = {name: values[:1] for name, values in scene().items()}
    turned = [run(arrays, AugmentConfig(quarter_turns=True, **NOTHING), epoch=epoch) for epoch in range(30)]
    found = set()
    for out in turned:
        matching = [k for k in range(4) if torch.equal(out["mask"][0], torch.rot90(arrays["mask"][0], k, (0, 1)))]
        assert matching and torch.equal(out["image"][0], torch.rot90(arrays["image"][0], matching[0], (0, 1)))
        found.add(matching[0])
    assert found == {0, 1, 2, 3}


def centre(mask):
    return mask.nonzero().float().mean(dim=0)


def test_shifts_stay_within_their_share_of_the_side_and_mirror_what_is_outside():
    arrays = scene(1)
    for epoch in range(10):
        out = run(arrays, AugmentConfig(shift=0.1, **NOTHING), epoch=epoch)
        assert (centre(out["mask"][0]) - centre(arrays["mask"][0])).abs().max() <= 0.1 * 64 + 0.6
        assert out["image"].min() >= 40  # no black corners


@pytest.mark.parametrize(("setting", "low", "high"), [("scale", 1 / 1.3**2, 1.3**2), ("rotation", 0.97, 1.03)])
def test_scale_changes_the_area_and_rotation_does_not(setting, low, high):
    arrays = scene(1)
    arrays["mask"] = torch.from_numpy(disc(64, (32, 32), 14))[None]
    amount = 0.3 if setting == "scale" else 90.0
    areas = [
        run(arrays, AugmentConfig(**{setting: amount}, **NOTHING), epoch=e)["mask"].sum() / arrays["mask"].sum()
        for e in range(20)
    ]
    assert min(areas) >= low * 0.95 and max(areas) <= high * 1.05
    assert setting == "rotation" or (min(areas) < 0.85 and max(areas) > 1.15)


def test_a_rotation_of_a_rectangular_image_is_a_rotation_of_its_pixels():
    """A square in a 48x96 image keeps its area and its right angles."""
    mask = torch.zeros(1, 48, 96, dtype=torch.uint8)
    mask[0, 16:32, 40:56] = 1
    out = run({"image": mask[..., None] * 200, "mask": mask}, AugmentConfig(rotation=90, **NOTHING), epoch=3)["mask"]
    out[..., :28] = out[..., 68:] = 0  # what is mirrored in from above and below
    assert out.sum().item() == pytest.approx(256, rel=0.06)
    assert (centre(out[0]) - centre(mask[0])).abs().max() < 1
    spread = out[0].nonzero().float().std(dim=0)
    assert spread[0].item() == pytest.approx(spread[1].item(), rel=0.05)  # squeezed, the two would differ


def test_elastic_displacements_have_the_standard_deviation_asked_for():
    drawn = [Elastic().draw(AugmentConfig(elastic=10), np.random.default_rng(n)) for n in range(300)]
    assert np.std(drawn) == pytest.approx(10, rel=0.05)
    moved = run(scene(1), AugmentConfig(elastic=5, **NOTHING))["mask"]
    assert not torch.equal(moved, scene(1)["mask"])


def test_colours_by_hand():
    draws = {Brightness(): [0.1], Contrast(): [0.5], Gamma(): [2.0]}
    image = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(1, 1, 1, 3)
    expected = [round(255 * ((v / 255) ** 2 * 0.5 + 0.25 + 0.1)) for v in (0, 51, 255)]
    assert _recolour(image, draws).flatten().tolist() == expected


def test_flips_move_image_and_mask_together_and_depend_on_seed_epoch_and_image_only():
    image = torch.arange(4 * 4 * 6 * 1, dtype=torch.uint8).reshape(4, 4, 6, 1)
    config = AugmentConfig(hflip=0.5, vflip=0.5)

    def flipped(rows, epoch=1):
        arrays = {"image": image[rows], "mask": image[rows, ..., 0]}
        return tuple(augment(arrays, rows, config=config, seed=3, epoch=epoch).values())

    whole_image, whole_mask = flipped([0, 1, 2, 3])
    assert torch.equal(whole_image[..., 0], whole_mask)
    for row in range(4):
        assert torch.equal(flipped([row])[0][0], whole_image[row])
    assert any(not torch.equal(flipped([0, 1, 2, 3], epoch)[0], whole_image) for epoch in range(2, 6))
    arrays = {"image": image, "mask": image[..., 0]}
    always = augment(arrays, [0, 1, 2, 3], config=AugmentConfig(hflip=1), seed=0, epoch=1)
    assert torch.equal(always["image"], image.flip(2))


def test_every_setting_belongs_to_one_augmentation():
    settings = [setting for each in AUGMENTATIONS for setting in each.settings]
    assert sorted(settings) == sorted({field.name for field in dataclasses.fields(AugmentConfig)} - {"custom"})


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(AugmentConfig) if field.name != "custom"])
def test_a_setting_below_zero_is_refused(name):
    with pytest.raises(UserError, match=rf"augment\.{name} is -1"):
        AugmentConfig(**{name: -1})


def test_the_draws_are_those_of_earlier_versions():
    """Their order and number decide the result of a seed, so that an older run resumes as it would have gone on. New
    augmentations draw after them."""
    drawn = [each.draw(ALL, generator) for generator in [np.random.default_rng([1, 2, 3])] for each in AUGMENTATIONS]
    hflip, vflip, turns, affine, brightness, contrast, gamma, elastic, *_later = drawn
    generator = np.random.default_rng([1, 2, 3])
    assert hflip == (generator.random() < 0.5) and vflip == (generator.random() < 0.5)
    assert turns == generator.integers(4)
    assert affine.shift == (generator.uniform(-0.1, 0.1), generator.uniform(-0.1, 0.1))
    assert affine.angle == np.radians(generator.uniform(-30, 30))
    assert affine.scale == np.exp(generator.uniform(-np.log1p(0.2), np.log1p(0.2)))
    assert brightness == generator.uniform(-0.1, 0.1)
    assert contrast == np.exp(generator.uniform(-np.log1p(0.2), np.log1p(0.2)))
    assert gamma == np.exp(generator.uniform(-np.log1p(0.2), np.log1p(0.2)))
    assert np.array_equal(elastic, 3 * generator.standard_normal((2, 3, 3)))
