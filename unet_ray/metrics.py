"""How a prediction is scored: counts first, ratios last.

A count is an int64 [..., K, 3]: true positives, false positives, false negatives of each class. Counts add up over
pixels, images and workers without rounding, so any number of workers gives the same score. For one class (a single
logit) K is 1, the foreground; otherwise K is the number of classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unet_ray.config import IGNORE

BOOTSTRAP_SAMPLES = 2000
_BACKGROUND = "background"


def count(predicted_NHW: Tensor, truth_NHW: Tensor, num_classes: int) -> Tensor:
    """Counts of each image, int64 [N,K,3], from class ids, uint8 [N,H,W] both; pixels that are `IGNORE` in truth are
    out. On whatever device the masks are."""
    ids, images = max(2, num_classes), len(truth_NHW)
    valid = truth_NHW != IGNORE
    image = torch.arange(images, device=truth_NHW.device)[:, None, None].expand_as(truth_NHW)
    joint = (image[valid] * ids + truth_NHW[valid]) * ids + predicted_NHW[valid]
    confusion = torch.bincount(joint, minlength=images * ids * ids).reshape(images, ids, ids)
    hit = confusion.diagonal(dim1=1, dim2=2)
    counts = torch.stack([hit, confusion.sum(dim=1) - hit, confusion.sum(dim=2) - hit], dim=2)
    return counts[:, 1:] if num_classes == 1 else counts


def dice(counts: np.ndarray) -> np.ndarray:
    """2 TP / (2 TP + FP + FN), float64 [...]; NaN where a class is neither in truth nor predicted."""
    tp, fp, fn = np.moveaxis(counts.astype(np.float64), -1, 0)
    return _ratio(2 * tp, 2 * tp + fp + fn)


def iou(counts: np.ndarray) -> np.ndarray:
    """TP / (TP + FP + FN), float64 [...]; NaN where a class is neither in truth nor predicted."""
    tp, fp, fn = np.moveaxis(counts.astype(np.float64), -1, 0)
    return _ratio(tp, tp + fp + fn)


def pixel_accuracy(counts: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Share of valid pixels with the right class, float64 [...], from counts [...,K,3] and valid pixels [...]."""
    counts = counts.astype(np.float64)
    if counts.shape[-2] == 1:  # one class: the background's hits are what is left
        right = pixels - counts[..., 0, 1] - counts[..., 0, 2]
    else:
        right = counts[..., 0].sum(axis=-1)
    return _ratio(right, np.asarray(pixels, np.float64))


def image_mean(ratios_K: np.ndarray, class_names: Sequence[str] = ()) -> np.ndarray:
    """The mean over classes, float64 [...]; from per-class ratios [...,K].

    A class that is neither in truth nor predicted does not count. Where that is so of all of them (an empty mask,
    predicted empty) the image is right: 1. A class 0 named `background` is left out.
    """
    if len(class_names) == ratios_K.shape[-1] > 1 and class_names[0] == _BACKGROUND:
        ratios_K = ratios_K[..., 1:]
    present = ~np.isnan(ratios_K)
    return np.where(present.any(axis=-1), np.nansum(ratios_K, axis=-1) / np.maximum(present.sum(axis=-1), 1), 1.0)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.full(np.shape(denominator), np.nan), where=denominator != 0)


@dataclass(frozen=True, slots=True)
class Score:
    """One figure over a set of images."""

    mean: float
    """Mean over images."""
    ci95: tuple[float, float]
    """Bootstrap 95 % interval of the mean (percentiles; Efron 1979), images drawn with replacement."""
    total: float
    """Over all pixels of all images at once; `global` in JSON."""

    def to_json(self) -> dict[str, float | list[float]]:
        return {"mean": self.mean, "ci95": list(self.ci95), "global": self.total}


@dataclass(frozen=True, slots=True)
class Scores:
    """What `evaluate` returns."""

    images: int
    dice: Score
    iou: Score
    pixel_accuracy: Score
    per_class: dict[str, dict[str, float | None]]
    """Class name -> dice and iou (mean over the images where it occurs) and their values over all pixels; empty for
    one class."""
    failures: tuple[tuple[str, str], ...] = ()
    """(image, reason) of what could not be scored."""

    def to_json(self) -> dict[str, object]:
        result: dict[str, object] = {"images": self.images, "dice": self.dice.to_json(), "iou": self.iou.to_json()}
        result["pixel_accuracy"] = self.pixel_accuracy.to_json()
        if self.per_class:
            result["per_class"] = self.per_class
        result["failed"] = [{"path": path, "error": error} for path, error in self.failures]
        return result


def score(
    counts_MK3: np.ndarray,
    pixels_M: np.ndarray,
    class_names: Sequence[str] = (),
    failures: Sequence[tuple[str, str]] = (),
) -> Scores:
    """Scores of M images from their counts [M,K,3] and their numbers of valid pixels [M]."""
    all_counts, all_pixels = counts_MK3.sum(axis=0), pixels_M.sum()
    names = list(class_names)
    if len(names) != counts_MK3.shape[1]:
        names = [f"class {k}" for k in range(counts_MK3.shape[1])]
    per_class: dict[str, dict[str, float | None]] = {}
    if len(names) > 1:
        for k, name in enumerate(names):
            row: dict[str, float | None] = {}
            for label, ratio in (("dice", dice), ("iou", iou)):
                values = ratio(counts_MK3[:, k])
                # A class that occurs nowhere has no score; JSON has no NaN.
                occurs = ~np.isnan(values)
                row[label] = float(values[occurs].mean()) if occurs.any() else None
                row[f"{label}_global"] = float(ratio(all_counts[k])) if occurs.any() else None
            per_class[name] = row
    return Scores(
        images=len(counts_MK3),
        dice=_summary(image_mean(dice(counts_MK3), names), image_mean(dice(all_counts), names)),
        iou=_summary(image_mean(iou(counts_MK3), names), image_mean(iou(all_counts), names)),
        pixel_accuracy=_summary(
            np.nan_to_num(pixel_accuracy(counts_MK3, pixels_M), nan=1.0),
            np.nan_to_num(pixel_accuracy(all_counts, all_pixels), nan=1.0),
        ),
        per_class=per_class,
        failures=tuple(failures),
    )


def _summary(values_M: np.ndarray, total: np.ndarray) -> Score:
    # A fixed seed: the same images always give the same interval.
    generator = np.random.default_rng(0)
    means = [values_M[generator.integers(0, len(values_M), len(values_M))].mean() for _ in range(BOOTSTRAP_SAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return Score(mean=float(values_M.mean()), ci95=(float(low), float(high)), total=float(total))
