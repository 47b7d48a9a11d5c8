"""Computes the interval of a mean."""

from __future__ import annotations

import numpy as np

BOOTSTRAP_SAMPLES = 2000


def bootstrap_interval(values_M: np.ndarray) -> tuple[float, float]:
    """Returns the 95 % interval of the mean of M values, drawn with replacement (percentile bootstrap; Efron 1979)."""
    # The seed is fixed, so the same images always give the same interval.
    generator = np.random.default_rng(0)
    means = [values_M[generator.integers(0, len(values_M), len(values_M))].mean() for _ in range(BOOTSTRAP_SAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
