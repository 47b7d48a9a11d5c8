"""The step size over a training, and when to stop early."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from unet_ray.config import OptimizationConfig

WARM_UP = 0.15
"""Share of a one-cycle schedule that goes up."""
POLY_POWER = 0.9


def learning_rate_at(config: OptimizationConfig, progress: float, factor: float = 1.0) -> float:
    """Step size at `progress`, the share of all steps that are done: 0 to 1. `factor`: see `plateau_factor`."""
    peak = config.learning_rate * factor
    warm_up = WARM_UP if config.schedule == "one_cycle" else config.warm_up
    if progress < warm_up:
        # From a twenty-fifth of the peak, as in torch's OneCycleLR.
        return peak * (1 / 25 + (1 - 1 / 25) * progress / warm_up)
    if config.schedule in ("constant", "plateau"):
        return peak
    rest = (progress - warm_up) / (1 - warm_up)
    if config.schedule == "poly":
        return peak * (1 - rest) ** POLY_POWER
    return peak * (1 + math.cos(math.pi * rest)) / 2


def epochs_without_progress(val_dices: Sequence[float]) -> int:
    """How many epochs have passed since the best one."""
    return len(val_dices) - 1 - int(np.argmax(val_dices)) if val_dices else 0


def plateau_factor(config: OptimizationConfig, val_dices: Sequence[float]) -> float:
    """What the schedule `plateau` multiplies the step size by after epochs with these scores: as torch's
    ReduceLROnPlateau counts, `plateau_factor` each time `plateau_patience` epochs and one more brought nothing better.
    """
    if config.schedule != "plateau":
        return 1.0
    factor, best, waited = 1.0, -math.inf, 0
    for dice in val_dices:
        best, waited = (dice, 0) if dice > best else (best, waited + 1)
        if waited > config.plateau_patience:
            factor, waited = factor * config.plateau_factor, 0
    return factor
