"""Scores against values worked by hand and against a plain re-count."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from unet_ray import metrics
from unet_ray.config import IGNORE


def counts_of(predicted, ground_truth, classes=1):
    predicted, ground_truth = (torch.tensor([values], dtype=torch.uint8) for values in (predicted, ground_truth))
    return metrics.count(predicted, ground_truth, classes).numpy()


def score(counts, pixels, names=("foreground",)):
    surface = np.full((*counts.shape[:2], 3), np.nan)
    each = metrics.ImageScores(tuple(f"{n}.png" for n in range(len(counts))), counts, np.array(pixels), surface, names)
    return metrics.score(each, tolerance=2)


def test_counts_by_hand():
    predicted, ground_truth = [[1, 1], [0, 0]], [[1, 0], [1, IGNORE]]
    assert counts_of(predicted, ground_truth).tolist() == [[[1, 1, 1]]]
    # For two classes: class 0 is missed where class 1 is predicted and the other way round.
    assert counts_of(predicted, ground_truth, 2).tolist() == [[[0, 1, 1], [1, 1, 1]]]


def test_dice_iou_and_accuracy_by_hand():
    counts = counts_of([[1, 1], [0, 0]], [[1, 0], [1, 0]])
    assert metrics.dice(counts).item() == pytest.approx(2 / 4)
    assert metrics.iou(counts).item() == pytest.approx(1 / 3)
    assert metrics.pixel_accuracy(counts, np.array([4])).item() == pytest.approx(2 / 4)


def test_each_image_of_a_batch_is_counted_by_itself():
    generator = np.random.default_rng(0)
    predicted, ground_truth = generator.integers(0, 4, (2, 5, 9, 11)).astype(np.uint8)
    ground_truth[generator.random(ground_truth.shape) < 0.2] = IGNORE
    counts = metrics.count(torch.from_numpy(predicted), torch.from_numpy(ground_truth), 4).numpy()
    for n in range(5):
        valid = ground_truth[n] != IGNORE
        for k in range(4):
            p, t = predicted[n][valid] == k, ground_truth[n][valid] == k
            assert counts[n, k].tolist() == [(p & t).sum(), (p & ~t).sum(), (~p & t).sum()]


def test_an_empty_mask_predicted_empty_is_right_and_one_wrong_pixel_is_all_wrong():
    empty = [[0, 0], [0, 0]]
    assert metrics.image_mean(metrics.dice(counts_of(empty, empty))).item() == 1
    assert metrics.image_mean(metrics.dice(counts_of([[0, 1], [0, 0]], empty))).item() == 0


def test_absent_classes_and_a_named_background_do_not_count():
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


def test_the_interval_is_the_same_every_time_and_contains_the_mean():
    generator = np.random.default_rng(0)
    counts = generator.integers(1, 50, (40, 1, 3))
    first, second = (score(counts, [500] * 40) for _ in range(2))
    assert first.means["dice"] == second.means["dice"]
    assert first.dice.ci95[0] < first.dice.mean < first.dice.ci95[1]


def square(top, left, side, size=12):
    ids = np.zeros((size, size), np.uint8)
    ids[top : top + side, left : left + side] = 1
    return ids


def test_surface_scores_by_hand():
    # A 4x4 square moved by 3 to the right: its edge has 12 pixels, and so has the other.
    [[hd95, pooled, surface_dice]] = metrics.surface_scores(square(2, 2, 4), square(2, 5, 4), 1, tolerance=1)
    assert hd95 == pooled == 3
    # Those at most 1 away on either side: the moved edge's left column (4) lies on the other's right column; two more
    # pixels a side lie beside it, above and below.
    near = sum(min(np.hypot(y - v, x - w) for v, w in edge_of(2, 5, 4)) <= 1 for y, x in edge_of(2, 2, 4))
    assert surface_dice == pytest.approx(near / 12)
    assert near == 6


def edge_of(top, left, side):
    cells = [(y, x) for y in range(top, top + side) for x in range(left, left + side)]
    return [(y, x) for y, x in cells if y in (top, top + side - 1) or x in (left, left + side - 1)]


def test_distances_to_nothing_are_not_defined_but_the_surface_dice_is():
    empty = np.zeros((12, 12), np.uint8)
    missed = metrics.surface_scores(empty, square(2, 2, 4), 1, tolerance=2)[0]
    nothing = metrics.surface_scores(empty, empty, 1, tolerance=2)[0]
    assert np.isnan(missed[:2]).all() and missed[2] == 0
    assert np.isnan(nothing).all()


MASKS = {
    "random": lambda g: (g.random((20, 17)) < 0.4).astype(np.uint8),
    "square": lambda _: square(3, 5, 6, 20)[:, :17],
    "at the border": lambda _: square(0, 0, 7, 20)[:, :17],
    "full": lambda _: np.ones((20, 17), np.uint8),
    "single pixel": lambda _: square(9, 9, 1, 20)[:, :17],
}


@pytest.mark.parametrize("predicted", MASKS)
@pytest.mark.parametrize("ground_truth", MASKS)
def test_scores_equal_monais(predicted, ground_truth):
    from monai import metrics as monai

    generator = np.random.default_rng(0)
    ours = [MASKS[kind](generator) for kind in (predicted, ground_truth)]
    one_hot = [torch.from_numpy(np.stack([ids == 0, ids == 1]))[None].float() for ids in ours]
    counts = metrics.count(*(torch.from_numpy(ids)[None] for ids in ours), 1).numpy()
    assert metrics.dice(counts).item() == pytest.approx(monai.compute_dice(*one_hot, include_background=False).item())
    assert metrics.iou(counts).item() == pytest.approx(monai.compute_iou(*one_hot, include_background=False).item())
    tp, fp, tn, fn = monai.get_confusion_matrix(*one_hot, include_background=False).flatten().tolist()
    assert counts.tolist() == [[[tp, fp, fn]]]
    assert metrics.precision(counts).item() == pytest.approx(tp / (tp + fp))
    assert metrics.recall(counts).item() == pytest.approx(tp / (tp + fn))
    assert metrics.pixel_accuracy(counts, np.array([20 * 17])).item() == pytest.approx((tp + tn) / (20 * 17))
    [[hd95, _, surface_dice]] = metrics.surface_scores(*ours, 1, tolerance=1.5)
    assert hd95 == pytest.approx(monai.compute_hausdorff_distance(*one_hot, percentile=95).item(), abs=1e-4)
    assert surface_dice == pytest.approx(monai.compute_surface_dice(*one_hot, [1.5]).item(), abs=1e-6)


def test_the_largest_distance_equals_scipys_directed_hausdorff():
    from scipy.spatial.distance import directed_hausdorff

    generator = np.random.default_rng(1)
    one, other = (generator.random((30, 30)) < 0.05 for _ in range(2))
    there, back = metrics.surface_distances(one, other)
    assert there.max() == pytest.approx(directed_hausdorff(np.argwhere(one), np.argwhere(other))[0])
    assert back.max() == pytest.approx(directed_hausdorff(np.argwhere(other), np.argwhere(one))[0])


def test_ignored_pixels_have_no_surface():
    ground_truth, predicted = square(2, 2, 4), square(2, 2, 4)
    predicted[2:6, 8:11] = 1
    ground_truth[:, 7:] = IGNORE
    assert metrics.surface_scores(predicted, ground_truth, 1, tolerance=0)[0].tolist() == [0, 0, 1]


def images(dices):
    """ImageScores of images with 100 true pixels, of which some are hit."""
    counts = np.array([[[round(100 * dice), 100 - round(100 * dice), 100 - round(100 * dice)]] for dice in dices])
    paths = tuple(f"{n}.png" for n in range(len(dices)))
    return metrics.ImageScores(paths, counts, np.full(len(dices), 500), np.full((len(dices), 1, 3), np.nan), ("car",))


def test_two_models_are_compared_image_by_image():
    from scipy.stats import wilcoxon

    generator = np.random.default_rng(0)
    one = generator.uniform(0.7, 0.9, 30).round(2)
    other = (one - generator.uniform(-0.02, 0.06, 30)).round(2)
    result = metrics.compare(images(one), images(other))
    assert result.difference == pytest.approx((one - other).mean())
    assert result.ci95[0] < result.difference < result.ci95[1]
    assert result.p_value == pytest.approx(wilcoxon(one, other).pvalue, rel=0.05)
    assert result.p_value < 0.01
    assert (result.better, result.worse) == ((one > other).sum(), (one < other).sum())
    assert metrics.compare(images(one), images(one)).p_value == 1


def test_the_table_has_a_row_for_each_image_and_class():
    counts = np.array([[[5, 1, 0], [2, 0, 1]], [[8, 0, 0], [0, 0, 0]]])
    each = metrics.ImageScores(("a", "b"), counts, np.array([9, 8]), np.full((2, 2, 3), np.nan), ("sky", "road"))
    table = each.columns()
    assert list(zip(table["path"], table["class"], strict=True)) == [
        (path, name) for path in "ab" for name in ("sky", "road", "all")
    ]
    assert table["dice"][:3] == pytest.approx([10 / 11, 4 / 5, (10 / 11 + 4 / 5) / 2])
    assert table["dice"][3:] == [1, None, 1]
    assert table["true_positives"] == [5, 2, None, 8, 0, None]
    assert len({len(column) for column in table.values()}) == 1


def test_precision_and_recall_are_blank_where_they_are_not_defined_and_an_empty_image_is_right_everywhere():
    # nothing there, nothing predicted; nothing there; nothing predicted; both
    counts = np.array([[[0, 0, 0]], [[0, 5, 0]], [[0, 0, 5]], [[4, 1, 1]]])
    each = metrics.ImageScores(
        ("a", "b", "c", "d"), counts, np.full(4, 100), np.full((4, 1, 3), np.nan), ("foreground",)
    )
    table = each.columns()
    assert table["dice"] == [1, 0, 0, 0.8] and table["surface_dice"][0] == 1
    assert table["precision"] == [None, 0, None, 0.8] and table["recall"] == [None, None, 0, 0.8]
    scores = metrics.score(each, 2)
    assert scores.dice.mean == pytest.approx(0.45)
    assert (scores.means["precision"].mean, scores.means["precision"].undefined) == (pytest.approx(0.4), 2)
    assert "(2 images in which nothing is predicted left out)" in scores.table()
    assert scores.to_json()["recall"]["undefined"] == 2
    nothing = metrics.score(
        dataclasses.replace(each, counts=counts[:1], paths=("a",), pixels=each.pixels[:1], surface=each.surface[:1]), 2
    )
    assert nothing.means["precision"].mean is None and nothing.means["precision"].total is None
    json.dumps(nothing.to_json(), allow_nan=False)
