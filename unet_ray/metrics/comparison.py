"""Compares two models image by image."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from unet_ray.metrics.bootstrap import bootstrap_interval
from unet_ray.metrics.scores import ImageScores


@dataclass(frozen=True, slots=True)
class Comparison:
    """The comparison of two models on the same images, by the Dice of each image."""

    images: int
    difference: float
    """Mean of the first model's Dice minus the second's."""
    ci95: tuple[float, float]
    """Bootstrap 95 % interval of that mean."""
    p_value: float
    """Two-sided p of Wilcoxon's signed-rank test (1945) on the differences, without images that have no difference."""
    better: int
    """Number of images on which the first model is better."""
    worse: int
    """Number of images on which it is worse."""

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "ci95": list(self.ci95)}


def compare(one: ImageScores, other: ImageScores) -> Comparison:
    """Compares the first model with the second, on the images that both have."""
    from scipy import stats  # imported here because it takes 1.5 seconds

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
