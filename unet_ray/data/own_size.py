"""Turns a network's scores into masks and probabilities at an image's own size.

Legend: H, W height and width in pixels; h, w the same of the network's scores; K classes (1 for a single logit).

Bilinear interpolation is a weighted mean of four neighbouring scores. If all four are on one side of the threshold, so
is the mean. So for one class only the *cells*, squares between four neighbours, in which these differ are interpolated:
where the outlines of the objects run. (For several classes that would be exact too, but too many means are so close to
each other that rounding decides: three of six images of CamVid needed everything interpolated after all.)
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

MOST_CELLS = 1 / 32
"""Largest share of cells to interpolate one by one; above it, interpolating everything is as fast."""
ROUNDING = 2**-21
"""Bound on the difference of two ways to compute a mean of four float32 numbers, as a share of the largest of them:
each way has some four operations, and each of them rounds by at most 2**-24."""


def to_own_size(logits_KHW: np.ndarray, size_hw: tuple[int, int], threshold: float) -> np.ndarray:
    """Decides class ids, uint8 at `size_hw`, from float logits [K,h,w]: first interpolates bilinearly, then decides.

    K = 1: class 1 where the sigmoid is above `threshold`. K > 1: the class of the highest logit, of equal ones the
    first.
    """
    count, scores_hw = len(logits_KHW), logits_KHW.shape[1:]
    if count == 1 and size_hw != scores_hw and not _is_smaller(size_hw, scores_hw):
        mask = _by_cells(_float(logits_KHW[0]).numpy(), size_hw, threshold)
        if mask is not None:
            return mask
    # One class at a time, since K planes at full size would take K times the memory.
    return decide((_plane(plane, size_hw) for plane in logits_KHW), count, threshold)


def decide(planes: Iterable[np.ndarray], count: int, threshold: float) -> np.ndarray:
    """Decides class ids, uint8 [H,W], from `count` planes of float logits [H,W], one for each class."""
    planes = iter(planes)
    best = next(planes)
    if count == 1:
        return (best > _logit(threshold)).view(np.uint8)
    ids = np.zeros(best.shape, np.uint8)
    for class_id, candidate in enumerate(planes, start=1):
        better = candidate > best
        ids[better] = class_id
        best = np.where(better, candidate, best)
    return ids


def probabilities(logits_KHW: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Computes probabilities, uint8 [K,H,W] at `size_hw` with 255 for 1, from float logits [K,h,w].

    K = 1: sigmoid. K > 1: softmax.
    """
    return to_probabilities(np.stack([_plane(plane, size_hw) for plane in logits_KHW]))


def to_probabilities(logits_KHW: np.ndarray) -> np.ndarray:
    """Computes probabilities, uint8 [K,H,W] with 255 for 1, from float32 logits [K,H,W]."""
    if len(logits_KHW) == 1:
        share = 0.5 + 0.5 * np.tanh(logits_KHW / 2)  # the sigmoid, without overflow
    else:
        share = np.exp(logits_KHW - logits_KHW.max(axis=0))
        share /= share.sum(axis=0)
    return np.rint(255 * share).astype(np.uint8)


def _logit(threshold: float) -> float:
    return float(np.log(threshold / (1 - threshold)))


def _is_smaller(size_hw: tuple[int, int], scores_hw: tuple[int, ...]) -> bool:
    """Returns whether an image is smaller than its scores in a direction: a pixel is then a mean of many."""
    return size_hw[0] < scores_hw[0] or size_hw[1] < scores_hw[1]


def _float(plane: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(plane)).float()  # an eighth of numpy's time for float16


def _plane(plane: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Interpolates one class's logits [h,w] to `size_hw`, float32."""
    scores = _float(plane)
    if plane.shape == size_hw:
        return scores.numpy()
    antialias = _is_smaller(size_hw, plane.shape)
    return F.interpolate(scores[None, None], size=size_hw, mode="bilinear", antialias=antialias)[0, 0].numpy()


# --- cell by cell ---


class _Axis(NamedTuple):
    """How the pixels along one side of an image lie between the scores."""

    cell: np.ndarray
    """Of each pixel, the score before it, int64 [H]; the other one is the next, or at the end the same."""
    start: np.ndarray
    """Of each cell, its first pixel, int64 [h+1]; the last entry is H."""
    pixels: np.ndarray
    """Of each cell, its pixels, int64 [most,h]. Cells with fewer repeat their last one."""
    weights: np.ndarray
    """Of each of these pixels, the weights of the two scores, float32 [2,most,h], bit for bit those of
    `F.interpolate`."""
    has_gaps: bool
    """Whether a cell has no pixel: rounding may pass over one where sides are long and nearly equal."""


@lru_cache(maxsize=32)
def _axis(scores: int, pixels: int) -> _Axis:
    # `F.interpolate` gives the weights: that of score i is what i's pattern of 0, 0, 1, 0, 0, 1, … becomes.
    patterns = torch.eye(3).repeat(1, -(-scores // 3))[:, :scores]
    ramp = torch.arange(scores, dtype=torch.float32)
    rows = F.interpolate(torch.stack([*patterns, ramp])[None], size=pixels, mode="linear")[0].numpy()
    every = np.arange(pixels)
    cell = rows[3].astype(np.int64)
    # The place may be rounded across a score. The weights say which two scores it lies between.
    cell -= rows[(cell - 1) % 3, every] != 0
    cell += rows[cell % 3, every] == 0
    weights = np.stack([rows[cell % 3, every], rows[(cell + 1) % 3, every]])
    start = np.searchsorted(cell, np.arange(scores + 1))
    per_cell = np.diff(start)
    of_cells = np.minimum(start[:-1] + np.arange(per_cell.max())[:, None], start[1:] - 1)
    return _Axis(cell, start, of_cells, weights[:, of_cells], has_gaps=bool((per_cell < 1).any()))


def _by_cells(plane: np.ndarray, size_hw: tuple[int, int], threshold: float) -> np.ndarray | None:
    """Decides class ids of one class as `to_own_size` does, from float32 [h,w]; `size_hw` is not smaller. None: it is
    needed, or as fast, to interpolate everything."""
    logit = _logit(threshold)
    positive = decide([plane], 1, threshold)
    cells = np.flatnonzero(_differs(positive))
    # A mean of scores that are equal to the threshold but for rounding could fall to the other side.
    unsure = logit != 0 and (np.abs(plane - logit) <= ROUNDING * abs(logit)).any()
    rows, columns = (_axis(scores, pixels) for scores, pixels in zip(plane.shape, size_hw, strict=True))
    if unsure or rows.has_gaps or columns.has_gaps or len(cells) > MOST_CELLS * plane.size:
        return None
    mask = _spread(positive, rows, columns)
    if not len(cells):
        return mask
    top, left = np.divmod(cells, plane.shape[1])
    below, beside = np.where(top + 1 < plane.shape[0], plane.shape[1], 0), left + 1 < plane.shape[1]
    corners = plane.reshape(-1)[np.stack([cells, cells + beside, cells + below, cells + below + beside])]
    across, down = np.take(columns.weights, left, axis=2), np.take(rows.weights, top, axis=2)
    upper, lower = corners[0] * across[0] + corners[1] * across[1], corners[2] * across[0] + corners[3] * across[1]
    means = upper * down[0][:, None] + lower * down[1][:, None]  # [rows,columns,cells]
    if (np.abs(means - np.float32(logit)) <= ROUNDING * np.abs(corners).max(axis=0)).any():
        return None
    places = np.take(rows.pixels, top, axis=1)[:, None] * size_hw[1] + np.take(columns.pixels, left, axis=1)
    mask.reshape(-1)[places] = decide([means], 1, threshold)
    return mask


def _spread(positive: np.ndarray, rows: _Axis, columns: _Axis) -> np.ndarray:
    """Gives each pixel the class id of its cell: uint8 [h,w] -> [H,W]."""
    mask = np.zeros((len(rows.cell), len(columns.cell)), np.uint8)
    high, wide = (np.flatnonzero(positive.view(bool).any(axis=axis)) for axis in (1, 0))
    if len(high):  # of the rest of the image nothing needs to be copied
        (top, bottom), (left, right) = rows.start[high[[0, -1]] + (0, 1)], columns.start[wide[[0, -1]] + (0, 1)]
        spread = np.take(positive[high[0] : high[-1] + 1], columns.cell[left:right], axis=1)
        mask[top:bottom, left:right] = np.take(spread, rows.cell[top:bottom] - high[0], axis=0)
    return mask


def _differs(ids: np.ndarray) -> np.ndarray:
    """Returns of each cell, bool [h,w], whether the class ids at its four corners differ. A cell is where its upper
    left corner is; beyond the end scores repeat."""
    along = np.zeros(ids.shape, bool)
    along[:, :-1] = ids[:, 1:] != ids[:, :-1]
    found = along.copy()
    found[:-1] |= along[1:] | (ids[1:] != ids[:-1])
    return found
