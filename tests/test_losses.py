"""Losses against values worked by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from unet_ray.config import IGNORE, OptimizationConfig
from unet_ray.training import losses

BIG = 30.0  # a logit whose sigmoid is 1 in float32


def of(name, classes=1, **settings):
    return losses.build(OptimizationConfig(loss=name, **settings), classes)


def mask(*rows):
    return torch.tensor([rows], dtype=torch.uint8)


def test_bce_of_undecided_pixels_is_log_2():
    assert of("bce")(torch.zeros(1, 1, 2, 2), mask([0, 1], [1, 0])).tolist() == pytest.approx([math.log(2)])


def test_dice_by_hand():
    logits = torch.tensor([[[[BIG, BIG], [-BIG, -BIG]]]])  # predicts the top row; the ground truth is the left column
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


def test_focal_by_hand():
    # An undecided pixel: (1 - 0.5)² log 2.
    assert of("focal")(torch.zeros(1, 1, 2, 2), mask([0, 1], [1, 0])).tolist() == pytest.approx([0.25 * math.log(2)])
    assert of("focal", focal_gamma=0)(torch.zeros(1, 1, 1, 1), mask([1])).item() == pytest.approx(math.log(2))


def test_tversky_by_hand():
    logits = torch.tensor([[[[BIG, BIG], [-BIG, -BIG]]]])  # one hit, one false positive, one miss
    loss = of("tversky", tversky_alpha=0.3)
    assert loss(logits, mask([1, 0], [1, 0])).item() == pytest.approx(1 - 2 / (1 + 0.3 + 0.7 + 1))
    assert loss(logits, mask([1, 0], [0, 0])).item() == pytest.approx(1 - 2 / (1 + 0.3 + 1))


def test_class_weights_are_torchs():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 3, 6, 7, generator=generator)
    target = torch.randint(0, 3, (1, 6, 7), generator=generator).to(torch.uint8)
    target[0, 0] = IGNORE
    weights = (0.5, 1.0, 4.0)
    ours = of("ce", 3, class_weights=weights)(logits, target)
    theirs = F.cross_entropy(logits, target.long(), weight=torch.tensor(weights), ignore_index=IGNORE)
    assert ours.item() == pytest.approx(theirs.item())
    # One class: background and foreground. log 2 each, so the weights' own mean is 1.
    assert of("bce", class_weights=weights[:2])(torch.zeros(1, 1, 2, 2), mask([0, 1], [1, 1])).item() == pytest.approx(
        math.log(2)
    )
    dice = of("dice", 3, class_weights=weights)(logits, target)
    each = [of("dice", 3, class_weights=tuple(1e-9 + (k == c) for k in range(3)))(logits, target) for c in range(3)]
    assert dice.item() == pytest.approx(sum(w * e.item() for w, e in zip(weights, each, strict=True)) / 5.5, rel=1e-5)


def test_border_weights_by_hand():
    logits = torch.tensor([[[[0.0, BIG]]]])  # an undecided background pixel, a certain foreground pixel
    border = torch.tensor([[[255, 0]]], dtype=torch.uint8)
    loss = of("bce", border_weight=10)
    assert loss(logits, mask([0, 1]), border).item() == pytest.approx(11 * math.log(2) / 12)
    assert loss(logits, mask([IGNORE, 1]), border).item() == pytest.approx(0, abs=1e-6)


MASKS = {
    "random": lambda g: torch.randint(0, 2, (1, 9, 11), generator=g),
    "empty": lambda _: torch.zeros(1, 9, 11),
    "full": lambda _: torch.ones(1, 9, 11),
    "single pixel": lambda _: torch.zeros(1, 9, 11).index_put((*map(torch.tensor, ([0], [4], [5])),), torch.ones(1)),
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("ignored", [0, 4])
@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("term", ["dice", "focal", "tversky"])
def test_losses_are_monais(term, classes, kind, ignored):
    """The values are those of MONAI, on the columns that are not ignored."""
    from monai import losses as monai

    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(1, classes, 9, 11, generator=generator)
    target = MASKS[kind](generator).to(torch.uint8)
    if classes == 3 and kind == "random":
        target = torch.randint(0, 3, (1, 9, 11), generator=generator).to(torch.uint8)
    seen = slice(0, 11 - ignored)
    act = {"sigmoid": True} if classes == 1 else {"softmax": True}
    one_hot = {"to_onehot_y": classes > 1, "reduction": "none"}
    smooth = {"smooth_nr": 1, "smooth_dr": 1}
    theirs = {
        "dice": lambda: monai.DiceLoss(**act, **one_hot, **smooth),
        "focal": lambda: monai.FocalLoss(use_softmax=classes > 1, gamma=2, **one_hot),
        "tversky": lambda: monai.TverskyLoss(alpha=0.3, beta=0.7, **act, **one_hot, **smooth),
    }[term]()(logits[..., seen], target[:, None, :, seen].float())
    expected = theirs.sum(dim=1).mean() if term == "focal" else theirs.mean()
    target[..., 11 - ignored :] = IGNORE
    assert of(term, classes)(logits, target).item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("term", ["bce", "ce", "dice", "focal", "tversky"])
def test_losses_of_bfloat16_are_those_of_the_same_numbers_and_their_slopes_are_finite(term):
    generator = torch.Generator().manual_seed(0)
    classes = 3 if term == "ce" else 1
    logits = (20 * torch.randn(2, classes, 16, 16, generator=generator)).bfloat16().requires_grad_()
    target = torch.randint(0, 2, (2, 16, 16), generator=generator).to(torch.uint8)
    loss = of(term, classes)
    value = loss(logits, target)
    assert torch.equal(value, loss(logits.detach().float(), target))
    value.sum().backward()
    assert torch.isfinite(logits.grad).all() and logits.grad.abs().sum() > 0
