"""How a prediction is scored: counts first, ratios last.

A count is an int64 [..., K, 3]: true positives, false positives, false negatives of each class. Counts add up over
pixels, images and workers without rounding, so any number of workers gives the same score. For one class (a single
logit) K is 1, the foreground; otherwise K is the number of classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unet_ray.config import IGNORE

BOOTSTRAP_SAMPLES = 2000
LABELS = {
    "dice": "Dice",
    "iou": "IoU",
    "pixel_accuracy": "pixel accuracy",
    "precision": "precision",
    "recall": "recall",
}
"""What people call the scores that come from counts."""
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


def precision(counts: np.ndarray) -> np.ndarray:
    """TP / (TP + FP), float64 [...]; NaN where a class is not predicted."""
    tp, fp, _ = np.moveaxis(counts.astype(np.float64), -1, 0)
    return _ratio(tp, tp + fp)


def recall(counts: np.ndarray) -> np.ndarray:
    """TP / (TP + FN), float64 [...]; NaN where a class is not in truth."""
    tp, _, fn = np.moveaxis(counts.astype(np.float64), -1, 0)
    return _ratio(tp, tp + fn)


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
    ratios_K = _without_background(ratios_K, class_names)
    present = ~np.isnan(ratios_K)
    return np.where(present.any(axis=-1), np.nansum(ratios_K, axis=-1) / np.maximum(present.sum(axis=-1), 1), 1.0)


def _without_background(values_K: np.ndarray, class_names: Sequence[str]) -> np.ndarray:
    named = len(class_names) == values_K.shape[-1] > 1 and class_names[0] == _BACKGROUND
    return values_K[..., 1:] if named else values_K


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.full(np.shape(denominator), np.nan), where=denominator != 0)


def surface_distances(predicted: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From each edge pixel of one region to the nearest of the other's, pixels, float64 [P] and [T]: from predicted to
    truth and back. Both empty arrays where either region is empty.

    `predicted`, `truth`: bool [H,W]. An edge pixel is one of a region with a side neighbour outside it or outside the
    image, as in MONAI's `get_mask_edges`.
    """
    from scipy.spatial import KDTree  # here: prediction, which needs none, starts sooner

    edges = [np.argwhere(_edge(region)) for region in (predicted, truth)]
    if not (len(edges[0]) and len(edges[1])):
        return np.empty(0), np.empty(0)
    return KDTree(edges[1]).query(edges[0])[0], KDTree(edges[0]).query(edges[1])[0]


def _edge(region: np.ndarray) -> np.ndarray:
    padded = np.pad(region, 1)
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return region & ~inside


SURFACE = ("hd95", "hd95_pooled", "surface_dice")


def surface_scores(predicted: np.ndarray, truth: np.ndarray, num_classes: int, tolerance: float) -> np.ndarray:
    """The `SURFACE` scores of each class, float64 [K,3], from class ids, uint8 [H,W]; pixels that are `IGNORE` in truth
    belong to no region.

    hd95: 95 % Hausdorff distance in pixels, the larger of the 95th percentiles of the two directions (MONAI's and
    DeepMind's). hd95_pooled: the 95th percentile of both directions' distances together (medpy's). Both NaN where
    either region is empty. surface_dice: the share of both edges' pixels that lie within `tolerance` pixels of the
    other edge (Nikolov et al. 2018, counting pixels as MONAI does); 0 where one region is empty, NaN where both are.
    """
    valid = truth != IGNORE
    scores = np.full((num_classes, len(SURFACE)), np.nan)
    for k in range(num_classes):
        class_id = 1 if num_classes == 1 else k
        regions = [(ids == class_id) & valid for ids in (predicted, truth)]
        there, back = surface_distances(*regions)
        if len(there):
            scores[k, 0] = max(np.percentile(there, 95), np.percentile(back, 95))
            together = np.concatenate([there, back])
            scores[k, 1] = np.percentile(together, 95)
            scores[k, 2] = (together <= tolerance).mean()
        elif regions[0].any() or regions[1].any():
            scores[k, 2] = 0.0
    return scores


@dataclass(frozen=True, slots=True)
class ImageScores:
    """What was measured on each of M images."""

    paths: tuple[str, ...]
    counts: np.ndarray
    """int64 [M,K,3]: see the top of this module."""
    pixels: np.ndarray
    """Valid pixels, int64 [M]."""
    surface: np.ndarray
    """float64 [M,K,3]: see `surface_scores`."""
    class_names: tuple[str, ...]
    """K names."""

    def per_class(self) -> dict[str, np.ndarray]:
        """Name of a score -> float64 [M,K], NaN where it is not defined."""
        by_counts = {name: ratio(self.counts) for name, ratio in RATIOS.items()}
        return by_counts | {name: self.surface[..., n] for n, name in enumerate(SURFACE)}

    def means(self) -> dict[str, np.ndarray]:
        """Name of a score -> float64 [M], the mean over classes; NaN only for distances that are not defined."""
        result = {}
        for name, values in self.per_class().items():
            mean = image_mean(values, self.class_names)
            undefined = np.isnan(_without_background(values, self.class_names)).all(axis=-1)
            result[name] = np.where(undefined, np.nan, mean) if name.startswith("hd95") else mean
        result["pixel_accuracy"] = np.nan_to_num(pixel_accuracy(self.counts, self.pixels), nan=1.0)
        return result

    def columns(self) -> dict[str, list]:
        """A table with a row for each image and class, and one for each image over all its classes (class `all`) where
        there are several."""
        images, classes = self.counts.shape[:2]
        several = classes > 1
        names = [*self.class_names, *(["all"] if several else [])]
        table: dict[str, list] = {
            "path": [path for path in self.paths for _ in names],
            "class": names * images,
            "pixels": np.repeat(self.pixels, len(names)).tolist(),
        }
        means = self.means()
        for name, values in self.per_class().items():
            rows = np.concatenate([values, means[name][:, None]], axis=1) if several else values
            table[name] = [None if np.isnan(value) else value for value in rows.ravel().tolist()]
        table["pixel_accuracy"] = np.repeat(means["pixel_accuracy"], len(names)).tolist()
        for n, name in enumerate(("true_positives", "false_positives", "false_negatives")):
            counted = self.counts[..., n].tolist()
            table[name] = [value for row in counted for value in [*row, *([None] if several else [])]]
        return table


RATIOS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "dice": dice,
    "iou": iou,
    "precision": precision,
    "recall": recall,
}


@dataclass(frozen=True, slots=True)
class Score:
    """One figure over a set of images."""

    mean: float | None
    """Mean over images; None if no image has such a score."""
    ci95: tuple[float, float] | tuple[None, None]
    """Bootstrap 95 % interval of the mean, images drawn with replacement."""
    total: float | None
    """Over all pixels of all images at once, where that can be said; `global` in JSON."""
    undefined: int = 0
    """Images that have no such score, and are not in the mean: no region to measure a distance to."""

    def texts(self, digits: int) -> tuple[str, str, str] | None:
        """Mean, interval and total for people; None if there is no mean, the total empty if there is none."""
        if self.mean is None or self.ci95[0] is None:
            return None
        interval = f"{self.ci95[0]:.{digits}f} – {self.ci95[1]:.{digits}f}"
        return f"{self.mean:.{digits}f}", interval, "" if self.total is None else f"{self.total:.4f}"

    def to_json(self) -> dict[str, Any]:
        result: dict[str, Any] = {"mean": self.mean, "ci95": list(self.ci95), "global": self.total}
        return result | ({"undefined": self.undefined} if self.undefined else {})


@dataclass(frozen=True, slots=True)
class Scores:
    """What `evaluate` returns."""

    images: int
    means: dict[str, Score]
    """Of dice, iou, pixel_accuracy, precision, recall, hd95, hd95_pooled, surface_dice."""
    per_class: dict[str, dict[str, float | None]]
    """Class name -> each score's mean over the images where it is defined and, for those from counts, its value over
    all pixels (`…_global`); empty for one class."""
    tolerance: float
    """Of surface_dice, pixels."""
    each: ImageScores
    failures: tuple[tuple[str, str], ...] = ()
    """(image, reason) of what could not be scored."""

    @property
    def dice(self) -> Score:
        return self.means["dice"]

    @property
    def iou(self) -> Score:
        return self.means["iou"]

    @property
    def pixel_accuracy(self) -> Score:
        return self.means["pixel_accuracy"]

    def __repr__(self) -> str:
        return "\n".join([self.table(), *(f"  not scored: {path}: {reason}" for path, reason in self.failures[:5])])

    def table(self) -> str:
        """For people: each score's mean over the images, its interval, its value over all pixels; then the classes."""
        lines = [f"{self.images} images           mean    95 % interval     all pixels"]
        labels = {**LABELS, "surface_dice": f"surface Dice {self.tolerance:g}px", "hd95": "Hausdorff95 px"}
        for name, label in labels.items():
            score = self.means[name]
            texts = score.texts(2 if name == "hd95" else 4)
            if texts is None:
                lines.append(f"{label:<16} not defined for any image")
                continue
            mean, interval, total = texts
            total = f"{total:>9}" if total else ""
            without = f"  ({score.undefined} images without an edge left out)" if score.undefined else ""
            lines.append(f"{label:<16} {mean:>9}  {interval:<15}  {total}{without}".rstrip())
        for name, row in self.per_class.items():
            cells = "  ".join(f"{key} {row[key]:.4f}" for key in ("dice", "iou", "iou_global") if row[key] is not None)
            lines.append(f"{name:<16} {cells or 'does not occur'}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        result: dict[str, Any] = {"images": self.images}
        result |= {name: score.to_json() for name, score in self.means.items()}
        result["surface_tolerance"] = self.tolerance
        if self.per_class:
            result["per_class"] = self.per_class
        result["failed"] = [{"path": path, "error": error} for path, error in self.failures]
        return result


def score(each: ImageScores, tolerance: float, failures: Sequence[tuple[str, str]] = ()) -> Scores:
    """Scores over the images."""
    names, counts = each.class_names, each.counts.sum(axis=0)
    totals = {name: float(image_mean(ratio(counts), names)) for name, ratio in RATIOS.items()}
    totals["pixel_accuracy"] = float(np.nan_to_num(pixel_accuracy(counts, each.pixels.sum()), nan=1.0))
    values = each.means()
    order = ["dice", "iou", "pixel_accuracy", "precision", "recall", *SURFACE]
    per_class: dict[str, dict[str, float | None]] = {}
    if len(names) > 1:
        for k, class_name in enumerate(names):
            row: dict[str, float | None] = {}
            for name, by_class in each.per_class().items():
                defined = by_class[:, k][~np.isnan(by_class[:, k])]
                # A class that occurs nowhere has no score; JSON has no NaN.
                row[name] = float(defined.mean()) if len(defined) else None
                if name in RATIOS:
                    total = float(RATIOS[name](counts[k]))
                    row[f"{name}_global"] = None if np.isnan(total) else total
            per_class[class_name] = row
    return Scores(
        images=len(each.counts),
        means={name: _summary(values[name], totals.get(name)) for name in order},
        per_class=per_class,
        tolerance=tolerance,
        each=each,
        failures=tuple(failures),
    )


def _summary(values_M: np.ndarray, total: float | None) -> Score:
    defined = values_M[~np.isnan(values_M)]
    mean, ci95 = (float(defined.mean()), bootstrap_interval(defined)) if len(defined) else (None, (None, None))
    return Score(mean=mean, ci95=ci95, total=total, undefined=len(values_M) - len(defined))


def bootstrap_interval(values_M: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of M values, drawn again with replacement (percentiles; Efron 1979)."""
    # A fixed seed: the same images always give the same interval.
    generator = np.random.default_rng(0)
    means = [values_M[generator.integers(0, len(values_M), len(values_M))].mean() for _ in range(BOOTSTRAP_SAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two models on the same images, by the Dice of each image."""

    images: int
    difference: float
    """Mean of the first's Dice less the second's."""
    ci95: tuple[float, float]
    """Bootstrap 95 % interval of that mean."""
    p_value: float
    """Wilcoxon's signed-rank test (1945), two-sided, of the paired differences; images without any are left out."""
    better: int
    """Images on which the first is better."""
    worse: int

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "ci95": list(self.ci95)}


def compare(one: ImageScores, other: ImageScores) -> Comparison:
    """The first against the second, on the images that both have."""
    from scipy import stats  # here: it takes a second and a half to load

    second = dict(zip(other.paths, other.means()["dice"].tolist(), strict=True))
    pairs = [
        (a, second[path]) for path, a in zip(one.paths, one.means()["dice"].tolist(), strict=True) if path in second
    ]
    difference = np.array([a - b for a, b in pairs])
    return Comparison(
        images=len(difference),
        difference=float(difference.mean()),
        ci95=bootstrap_interval(difference),
        p_value=float(stats.wilcoxon(difference).pvalue) if difference.any() else 1.0,
        better=int((difference > 0).sum()),
        worse=int((difference < 0).sum()),
    )
