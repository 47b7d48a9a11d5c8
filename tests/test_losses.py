"""Losses against values worked by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from unet_ray import losses
from unet_ray.config import IGNORE, FitConfig

BIG = 30.0  # a logit whose sigmoid is 1 in float32


def of(name, classes=1, **settings):
    return losses.build(FitConfig(loss=name, **settings), classes)


def mask(*rows):
    return torch.tensor([rows], dtype=torch.uint8)


def test_bce_of_undecided_pixels_is_log_2():
    assert of("bce")(torch.zeros(1, 1, 2, 2), mask([0, 1], [1, 0])).tolist() == pytest.approx([math.log(2)])


def test_dice_by_hand():
    logits = torch.tensor([[[[BIG, BIG], [-BIG, -BIG]]]])  # predicts the top row; truth is the left column
    # overlap 1, sums 2 and 2: 1 - (2 * 1 + 1) / (2 + 2 + 1)
    assert of("dice")(logits, mask([1, 0], [1, 0])).item() == pytest.approx(1 - 3 / 5)
    assert of("dice")(logits, mask([1, 1], [0, 0])).item() == pytest.approx(0, abs=1e-6)


def test_dice_of_nothing_predicted_as_nothing_is_zero():
    assert of("dice")(torch.full((1, 1, 4, 4), -BIG), torch.zeros(1, 4, 4, dtype=torch.uint8)).item() == pytest.approx(
        0, abs=1e-6
    )


def test_cross_entropy_is_torchs_where_all_pixels_count():
    logits = torch.randn(2, 5, 6, 7, generator=torch.Generator().manual_seed(0))
    target = torch.randint(0, 5, (2, 6, 7), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    assert of("ce", 3)(logits, target).mean().item() == pytest.approx(F.cross_entropy(logits, target.long()).item())


@pytest.mark.parametrize(("name", "classes"), [("bce", 1), ("dice", 1), ("bce+dice", 1), ("ce", 3), ("ce+dice", 3)])
def test_ignored_pixels_change_nothing(name, classes):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, classes, 8, 8, generator=generator)
    target = torch.randint(0, max(2, classes), (2, 8, 8), generator=generator).to(torch.uint8)
    target[:, :, 4:] = IGNORE
    loss = of(name, classes)
    other = logits.clone()
    other[..., 4:] = 99
    assert torch.allclose(loss(logits, target), loss(other, target))
    assert torch.allclose(loss(logits, target), loss(logits[..., :4], target[..., :4]))


def test_an_image_without_valid_pixels_costs_nothing():
    target = torch.full((1, 4, 4), IGNORE, dtype=torch.uint8)
    assert of("bce+dice", 1)(torch.randn(1, 1, 4, 4), target).item() == pytest.approx(0)
    assert of("ce", 3)(torch.randn(1, 3, 4, 4), target).item() == 0


def test_a_sum_is_the_sum_and_auto_is_by_the_number_of_classes():
    logits, target = torch.randn(1, 1, 4, 4), mask(*[[0, 1, 1, 0]] * 4)
    both = of("auto", 1)(logits, target)
    assert torch.allclose(both, of("bce")(logits, target) + of("dice")(logits, target))


def test_the_mean_does_not_depend_on_how_a_batch_is_divided():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 1, 8, 8, generator=generator)
    target = torch.randint(0, 2, (4, 8, 8), generator=generator).to(torch.uint8)
    target[0, :6] = IGNORE
    loss = of("bce+dice", 1)
    halves = (loss(logits[:1], target[:1]).sum() + loss(logits[1:], target[1:]).sum()) / 4
    assert torch.allclose(loss(logits, target).mean(), halves)


def test_losses_of_bfloat16_logits_are_computed_in_float32():
    logits = torch.randn(1, 1, 64, 64).bfloat16()
    assert of("bce+dice", 1)(logits, torch.zeros(1, 64, 64, dtype=torch.uint8)).dtype == torch.float32
