"""The learning rate over a training, and when to stop early."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from unet_ray.config import OptimizationConfig

WARM_UP = 0.15
"""Fraction of a one-cycle schedule in which the learning rate rises (Smith & Topin 2018)."""
POLY_POWER = 0.9
"""Exponent of the schedule `poly` (Chen et al. 2017, DeepLab)."""


def learning_rate_at(config: OptimizationConfig, progress: float, decay: float = 1.0) -> float:
    """Returns the learning rate at `progress`, the fraction of all steps that are done, 0 to 1. `decay`: see
    `decay_after_plateaus`."""
    peak = config.learning_rate * decay
    warm_up = WARM_UP if config.schedule == "one_cycle" else config.warm_up
    if progress < warm_up:
        # It rises from a twenty-fifth of the peak, as in torch's OneCycleLR.
        return peak * (1 / 25 + (1 - 1 / 25) * progress / warm_up)
    if config.schedule in ("constant", "plateau"):
        return peak
    rest = (progress - warm_up) / (1 - warm_up)
    if config.schedule == "poly":
        return peak * (1 - rest) ** POLY_POWER
    return peak * (1 + math.cos(math.pi * rest)) / 2


def epochs_without_progress(val_dices: Sequence[float]) -> int:
    """Returns the number of epochs since the best one."""
    return len(val_dices) - 1 - int(np.argmax(val_dices)) if val_dices else 0


def stops_early(config: OptimizationConfig, val_dices: Sequence[float]) -> bool:
    """Returns whether the last `patience` epochs were all no better than the best before them."""
    return config.patience > 0 and epochs_without_progress(val_dices) >= config.patience


def decay_after_plateaus(config: OptimizationConfig, val_dices: Sequence[float]) -> float:
    """Returns the factor of the learning rate after epochs with these scores: 1 unless the schedule is `plateau`.

    As in torch's ReduceLROnPlateau, it is multiplied by the setting `plateau_factor` each time that `plateau_patience`
    + 1 epochs were no better.
    """
    if config.schedule != "plateau":
        return 1.0
    decay, best, waited = 1.0, -math.inf, 0
    for dice in val_dices:
        best, waited = (dice, 0) if dice > best else (best, waited + 1)
        if waited > config.plateau_patience:
            decay, waited = decay * config.plateau_factor, 0
    return decay
