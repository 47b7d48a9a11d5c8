"""Scores a set of images: means, intervals, totals over all pixels, tables and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unet_ray.metrics.bootstrap import bootstrap_interval
from unet_ray.metrics.counts import NOTHING, RATIOS, image_mean, pixel_accuracy
from unet_ray.metrics.surface import SURFACE

LABELS = {
    "dice": "Dice",
    "iou": "IoU",
    "pixel_accuracy": "pixel accuracy",
    "precision": "precision",
    "recall": "recall",
}
"""Scores that come from counts -> their names in tables."""
_NOTHING = {**NOTHING, "hd95": np.nan, "hd95_pooled": np.nan, "surface_dice": 1.0}
LEFT_OUT = {"precision": "in which nothing is predicted", "recall": "in which nothing is there"}
"""Score -> images in which it is not defined."""


@dataclass(frozen=True, slots=True)
class ImageScores:
    """Counts and surface scores of each of M images."""

    paths: tuple[str, ...]
    counts: np.ndarray
    """int64 [M,K,3]: see `metrics.counts`."""
    pixels: np.ndarray
    """Valid pixels, int64 [M]."""
    surface: np.ndarray
    """float64 [M,K,3]: see `surface_scores`."""
    class_names: tuple[str, ...]
    """K names."""

    def per_class(self) -> dict[str, np.ndarray]:
        """Returns name of a score -> float64 [M,K], NaN where it is not defined.

        With one class, an empty mask that was predicted empty has Dice 1. With several, a class that is not there says
        nothing about the image.
        """
        result = {name: ratio(self.counts) for name, ratio in RATIOS.items()}
        result |= {name: self.surface[..., n] for n, name in enumerate(SURFACE)}
        if self.counts.shape[1] == 1:
            result = {name: np.where(np.isnan(each), _NOTHING[name], each) for name, each in result.items()}
        return result

    def means(self) -> dict[str, np.ndarray]:
        """Returns name of a score -> float64 [M], its mean over the classes; NaN where it is not defined."""
        result = {
            name: image_mean(values, self.class_names, _NOTHING[name]) for name, values in self.per_class().items()
        }
        result["pixel_accuracy"] = np.nan_to_num(pixel_accuracy(self.counts, self.pixels), nan=1.0)
        return result

    def columns(self) -> dict[str, list]:
        """Returns the columns of a table with a row for each image and class.

        With several classes each image has one more row, class `all`, for the mean over them.
        """
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


@dataclass(frozen=True, slots=True)
class Score:
    """One figure over a set of images."""

    mean: float | None
    """Mean over the images; None if no image has this score."""
    ci95: tuple[float, float] | tuple[None, None]
    """Bootstrap 95 % interval of the mean, images drawn with replacement."""
    total: float | None
    """Score over all pixels of all images together; None for distances. `global` in JSON."""
    undefined: int = 0
    """Number of images that the mean leaves out, since they have nothing to measure: no region, nothing predicted."""

    def texts(self, digits: int) -> tuple[str, str, str] | None:
        """Formats mean, interval and total; returns None without a mean. The text of a missing total is empty."""
        if self.mean is None or self.ci95[0] is None:
            return None
        interval = f"{self.ci95[0]:.{digits}f} – {self.ci95[1]:.{digits}f}"
        return f"{self.mean:.{digits}f}", interval, "" if self.total is None else f"{self.total:.4f}"

    def to_json(self) -> dict[str, Any]:
        result: dict[str, Any] = {"mean": self.mean, "ci95": list(self.ci95), "global": self.total}
        return result | ({"undefined": self.undefined} if self.undefined else {})


@dataclass(frozen=True, slots=True)
class Scores:
    """The result of `evaluate`."""

    images: int
    """Number of images."""
    means: dict[str, Score]
    """dice, iou, pixel_accuracy, precision, recall, hd95, hd95_pooled, surface_dice."""
    per_class: dict[str, dict[str, float | None]]
    """Class name -> mean of each score over the images where it is defined. Scores from counts also have their value
    over all pixels (`…_global`). Empty for one class."""
    tolerance: float
    """Tolerance of surface_dice, in pixels."""
    each: ImageScores
    """Scores of each image."""
    failures: tuple[tuple[str, str], ...] = ()
    """(image, reason) for each image that could not be scored."""

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
        """Formats each score's mean, interval and value over all pixels, one score per line; then the classes."""
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
            left_out = LEFT_OUT.get(name, "without an edge")
            without = f"  ({score.undefined} images {left_out} left out)" if score.undefined else ""
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
    """Summarises the scores of each image into scores of the set."""
    names, counts = each.class_names, each.counts.sum(axis=0)
    totals: dict[str, float | None] = {
        name: _none_if_nan(image_mean(ratio(counts), names, NOTHING[name])) for name, ratio in RATIOS.items()
    }
    totals["pixel_accuracy"] = float(np.nan_to_num(pixel_accuracy(counts, each.pixels.sum()), nan=1.0))
    values = each.means()
    order = ["dice", "iou", "pixel_accuracy", "precision", "recall", *SURFACE]
    return Scores(
        images=len(each.counts),
        means={name: _summary(values[name], totals.get(name)) for name in order},
        per_class=_per_class(each) if len(names) > 1 else {},
        tolerance=tolerance,
        each=each,
        failures=tuple(failures),
    )


def _none_if_nan(value: np.ndarray | float) -> float | None:
    """Returns a score, or None if it is not defined, since JSON has no NaN."""
    return None if np.isnan(value) else float(value)


def _per_class(each: ImageScores) -> dict[str, dict[str, float | None]]:
    """Computes `Scores.per_class`. A class that occurs nowhere has the score None, since JSON has no NaN."""
    counts, per_class = each.counts.sum(axis=0), each.per_class()
    rows: dict[str, dict[str, float | None]] = {}
    for k, class_name in enumerate(each.class_names):
        row = rows[class_name] = {}
        for name, by_class in per_class.items():
            defined = by_class[:, k][~np.isnan(by_class[:, k])]
            row[name] = float(defined.mean()) if len(defined) else None
            if name in RATIOS:
                row[f"{name}_global"] = _none_if_nan(RATIOS[name](counts[k]))
    return rows


def _summary(values_M: np.ndarray, total: float | None) -> Score:
    defined = values_M[~np.isnan(values_M)]
    mean, ci95 = (float(defined.mean()), bootstrap_interval(defined)) if len(defined) else (None, (None, None))
    return Score(mean=mean, ci95=ci95, total=total, undefined=len(values_M) - len(defined))
