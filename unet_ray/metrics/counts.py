"""Counts hits and misses of each class, and divides them into Dice, IoU, precision, recall and accuracy.

A count is int64 [..., K, 3]: true positives, false positives, false negatives of each class. Counts add up over
pixels, images and workers without rounding, so any number of workers gives the same score. For one class (a single
logit) K is 1, the foreground; otherwise K is the number of classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from unet_ray.config import IGNORE

_BACKGROUND = "background"


def count(predicted_NHW: Tensor, ground_truth_NHW: Tensor, num_classes: int) -> Tensor:
    """Returns the counts of each image, int64 [N,K,3], from two masks of class ids, uint8 [N,H,W], on their device.

    Pixels that are `IGNORE` in the ground truth do not count.
    """
    ids, images = max(2, num_classes), len(ground_truth_NHW)
    valid = ground_truth_NHW != IGNORE
    image = torch.arange(images, device=ground_truth_NHW.device)[:, None, None].expand_as(ground_truth_NHW)
    joint = (image[valid] * ids + ground_truth_NHW[valid]) * ids + predicted_NHW[valid]
    confusion = torch.bincount(joint, minlength=images * ids * ids).reshape(images, ids, ids)
    hit = confusion.diagonal(dim1=1, dim2=2)
    counts = torch.stack([hit, confusion.sum(dim=1) - hit, confusion.sum(dim=2) - hit], dim=2)
    return counts[:, 1:] if num_classes == 1 else counts


def dice(counts: np.ndarray) -> np.ndarray:
    """Returns 2 TP / (2 TP + FP + FN), float64 [...]; NaN for a class neither in the ground truth nor predicted."""
    tp, fp, fn = np.moveaxis(counts.astype(np.float64), -1, 0)
    return _ratio(2 * tp, 2 * tp + fp + fn)


def iou(counts: np.ndarray) -> np.ndarray:
    """Returns TP / (TP + FP + FN), float64 [...]; NaN for a class neither in the ground truth nor predicted."""
    tp, fp, fn = np.moveaxis(counts.astype(np.float64), -1, 0)
    return _ratio(tp, tp + fp + fn)


def precision(counts: np.ndarray) -> np.ndarray:
    """Returns TP / (TP + FP), float64 [...]; NaN where a class is not predicted."""
    tp, fp, _ = np.moveaxis(counts.astype(np.float64), -1, 0)
    return _ratio(tp, tp + fp)


def recall(counts: np.ndarray) -> np.ndarray:
    """Returns TP / (TP + FN), float64 [...]; NaN where a class is not in the ground truth."""
    tp, _, fn = np.moveaxis(counts.astype(np.float64), -1, 0)
    return _ratio(tp, tp + fn)


def pixel_accuracy(counts: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Returns the share of valid pixels with the right class, float64 [...]; counts [...,K,3], valid pixels [...]."""
    counts = counts.astype(np.float64)
    if counts.shape[-2] == 1:  # one class: every pixel that is not false is right, also in the background
        right = pixels - counts[..., 0, 1] - counts[..., 0, 2]
    else:
        right = counts[..., 0].sum(axis=-1)
    return _ratio(right, np.asarray(pixels, np.float64))


def image_mean(ratios_K: np.ndarray, class_names: Sequence[str] = (), nothing: float = 1.0) -> np.ndarray:
    """Returns the mean over the classes, float64 [...], of the ratios of each class [...,K].

    A class without a ratio (NaN) does not count, nor does a class 0 named `background`. `nothing`: the value of an
    image without any ratio. By Dice and IoU such an image, an empty mask that was predicted empty, is right.
    """
    ratios_K = without_background(ratios_K, class_names)
    present = ~np.isnan(ratios_K)
    return np.where(present.any(axis=-1), np.nansum(ratios_K, axis=-1) / np.maximum(present.sum(axis=-1), 1), nothing)


def without_background(values_K: np.ndarray, class_names: Sequence[str]) -> np.ndarray:
    """Returns values [...,K] without those of a class 0 named `background`."""
    named = len(class_names) == values_K.shape[-1] > 1 and class_names[0] == _BACKGROUND
    return values_K[..., 1:] if named else values_K


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.full(np.shape(denominator), np.nan), where=denominator != 0)


NOTHING = {"dice": 1.0, "iou": 1.0, "precision": np.nan, "recall": np.nan}
"""Name of a score -> its value for an image in which nothing is there and nothing is predicted (Dice, IoU), nothing is
predicted (precision), or nothing is there (recall); NaN: not defined."""
RATIOS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "dice": dice,
    "iou": iou,
    "precision": precision,
    "recall": recall,
}
"""Name of a score -> function from counts to ratios."""
