"""Scores become masks at an image's own size: the same with and without the short cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from unet_ray.data import own_size
from unet_ray.data.own_size import decide, to_own_size


def test_scores_come_back_at_the_images_own_size():
    _, x = np.mgrid[:16, :16]
    logits = (x - 7.5).astype(np.float16)[None]  # 0 exactly in the middle
    mask = to_own_size(logits, (30, 64), 0.5)
    assert mask.shape == (30, 64) and mask.dtype == np.uint8
    assert (mask[:, :32] == 0).all() and (mask[:, 33:] == 1).all()
    assert to_own_size(logits, (16, 16), 0.9).sum() < to_own_size(logits, (16, 16), 0.5).sum()


def test_of_several_classes_the_highest_wins_after_interpolation():
    logits = np.zeros((3, 4, 4), np.float16)
    logits[1, :, :2], logits[2, :, 2:] = 5, 4
    mask = to_own_size(logits, (40, 40), 0.5)
    assert set(np.unique(mask)) == {1, 2}
    assert (mask[:, :15] == 1).all() and (mask[:, 25:] == 2).all()


def smooth(shape: tuple[int, int], seed: int) -> np.ndarray:
    """Returns scores with a few outlines, float16 [1,h,w]."""
    coarse = torch.from_numpy(np.random.default_rng(seed).normal(0, 4, (1, 1, 3, 4)).astype(np.float32))
    return F.interpolate(coarse, shape, mode="bicubic")[0].numpy().astype(np.float16)


def everything_interpolated(logits: np.ndarray, size: tuple[int, int], threshold: float) -> np.ndarray:
    scores = torch.from_numpy(logits).float()[None]
    return decide([F.interpolate(scores, size, mode="bilinear")[0, 0].numpy()], 1, threshold)


@pytest.mark.parametrize("threshold", [0.5, 0.3, 0.97])
@pytest.mark.parametrize("size", [(128, 128), (320, 480), (129, 211), (128, 700), (500, 128), (257, 129)], ids=str)
def test_cells_that_no_outline_crosses_need_no_interpolation(size, threshold):
    used = 0
    for seed in range(5):
        logits = smooth((128, 128), seed)
        expected = everything_interpolated(logits, size, threshold)
        assert (to_own_size(logits, size, threshold) == expected).all()
        used += own_size._by_cells(logits[0].astype(np.float32), size, threshold) is not None
    assert used >= 3  # a mean may be so close to the threshold that rounding decides: one in a million


@pytest.mark.parametrize("scores_hw", [(1, 1), (1, 7), (2, 3), (3, 2), (40, 5)], ids=str)
def test_the_shortest_sides_are_the_same(scores_hw, monkeypatch):
    monkeypatch.setattr(own_size, "MOST_CELLS", 1)
    for seed in range(20):
        logits = np.random.default_rng(seed).normal(0, 2, (1, *scores_hw)).astype(np.float16)
        assert (to_own_size(logits, (61, 53), 0.5) == everything_interpolated(logits, (61, 53), 0.5)).all()


def test_where_rounding_decides_everything_is_interpolated(monkeypatch):
    monkeypatch.setattr(own_size, "MOST_CELLS", 1)
    equal = np.tile(np.array([[1, -1]], np.float32), (8, 4))  # means of exactly 0 between them
    assert own_size._by_cells(equal, (20, 20), 0.5) is None
    at_threshold = np.full((8, 8), np.float32(np.log(0.3 / 0.7)))
    assert own_size._by_cells(at_threshold, (20, 20), 0.3) is None
    for scores in (equal, at_threshold):
        for threshold in (0.5, 0.3):
            expected = everything_interpolated(scores[None], (20, 20), threshold)
            assert (to_own_size(scores[None], (20, 20), threshold) == expected).all()


def test_noise_is_interpolated_at_once():
    noise = np.random.default_rng(0).normal(0, 1, (64, 64)).astype(np.float32)
    assert own_size._by_cells(noise, (128, 128), 0.5) is None
    assert (to_own_size(noise[None], (128, 128), 0.5) == everything_interpolated(noise[None], (128, 128), 0.5)).all()
