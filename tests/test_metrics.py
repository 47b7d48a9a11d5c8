"""Scores against values worked by hand and against a plain re-count."""

import math

import numpy as np
import pytest
import torch

from unet_ray import metrics
from unet_ray.config import IGNORE


def counts_of(predicted, truth, classes=1):
    predicted, truth = (torch.tensor([values], dtype=torch.uint8) for values in (predicted, truth))
    return metrics.count(predicted, truth, classes).numpy()


def score(counts, pixels, names=("foreground",)):
    surface = np.full((*counts.shape[:2], 3), np.nan)
    each = metrics.ImageScores(tuple(f"{n}.png" for n in range(len(counts))), counts, np.array(pixels), surface, names)
    return metrics.score(each, tolerance=2)


def test_counts_by_hand():
    predicted, truth = [[1, 1], [0, 0]], [[1, 0], [1, IGNORE]]
    assert counts_of(predicted, truth).tolist() == [[[1, 1, 1]]]
    # For two classes: class 0 is missed where class 1 is predicted and the other way round.
    assert counts_of(predicted, truth, 2).tolist() == [[[0, 1, 1], [1, 1, 1]]]


def test_dice_iou_and_accuracy_by_hand():
    counts = counts_of([[1, 1], [0, 0]], [[1, 0], [1, 0]])
    assert metrics.dice(counts).item() == pytest.approx(2 / 4)
    assert metrics.iou(counts).item() == pytest.approx(1 / 3)
    assert metrics.pixel_accuracy(counts, np.array([4])).item() == pytest.approx(2 / 4)


def test_each_image_of_a_batch_is_counted_by_itself():
    generator = np.random.default_rng(0)
    predicted, truth = generator.integers(0, 4, (2, 5, 9, 11)).astype(np.uint8)
    truth[generator.random(truth.shape) < 0.2] = IGNORE
    counts = metrics.count(torch.from_numpy(predicted), torch.from_numpy(truth), 4).numpy()
    for n in range(5):
        valid = truth[n] != IGNORE
        for k in range(4):
            p, t = predicted[n][valid] == k, truth[n][valid] == k
            assert counts[n, k].tolist() == [(p & t).sum(), (p & ~t).sum(), (~p & t).sum()]


def test_an_empty_mask_predicted_empty_is_right_and_one_wrong_pixel_is_all_wrong():
    empty = [[0, 0], [0, 0]]
    assert metrics.image_mean(metrics.dice(counts_of(empty, empty))).item() == 1
    assert metrics.image_mean(metrics.dice(counts_of([[0, 1], [0, 0]], empty))).item() == 0


def test_a_class_that_is_nowhere_does_not_count_and_a_named_background_neither():
    counts = counts_of([[0, 1]], [[0, 0]], 3)  # class 0: 1 hit, 1 miss; class 1: 1 false; class 2: nowhere
    ratios = metrics.dice(counts)
    assert math.isnan(ratios[0, 2])
    assert metrics.image_mean(ratios).item() == pytest.approx((2 / 3 + 0) / 2)
    assert metrics.image_mean(ratios, ("background", "car", "tree")).item() == 0


def test_mean_over_images_and_over_pixels_differ_and_both_are_given():
    # A small image half right (Dice 2/3), a large one all right.
    counts = np.array([[[1, 1, 0]], [[98, 0, 0]]])
    scores = score(counts, [10, 200])
    assert scores.dice.mean == pytest.approx((2 / 3 + 1) / 2)
    assert scores.dice.total == pytest.approx(198 / 199)
    assert scores.pixel_accuracy.mean == pytest.approx((0.9 + 1) / 2)
    assert scores.per_class == {}
    low, high = scores.dice.ci95
    assert low == pytest.approx(2 / 3) and high == pytest.approx(1)


def test_scores_by_class_are_named_and_json_has_no_nan():
    counts = np.array([[[5, 0, 0], [0, 0, 0], [2, 1, 0]]])
    scores = score(counts, [8], ("sky", "pole", "road"))
    assert scores.per_class["sky"]["dice"] == 1
    assert all(scores.per_class["pole"][name] is None for name in ("dice", "dice_global", "iou", "iou_global"))
    assert scores.per_class["road"]["iou"] == pytest.approx(2 / 3)
    assert scores.dice.mean == pytest.approx((1 + 4 / 5) / 2)
    assert set(scores.to_json()["dice"]) == {"mean", "ci95", "global"}


def test_the_interval_is_the_same_every_time_and_holds_the_mean():
    generator = np.random.default_rng(0)
    counts = generator.integers(1, 50, (40, 1, 3))
    first, second = (score(counts, [500] * 40) for _ in range(2))
    assert first.means["dice"] == second.means["dice"]
    assert first.dice.ci95[0] < first.dice.mean < first.dice.ci95[1]
