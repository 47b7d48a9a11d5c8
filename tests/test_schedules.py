"""The learning rate over a training."""

import numpy as np
import pytest
import torch

from unet_ray.config import OptimizationConfig
from unet_ray.training.schedules import decay_after_plateaus, learning_rate_at


def test_one_cycle_goes_up_and_down_to_zero():
    config = OptimizationConfig(learning_rate=1.0, schedule="one_cycle")
    rates = [learning_rate_at(config, p) for p in np.linspace(0, 1, 101)]
    assert rates[0] == pytest.approx(1 / 25)
    assert np.argmax(rates) == 15 and max(rates) == pytest.approx(1)
    assert rates[100] == pytest.approx(0, abs=1e-9)
    assert learning_rate_at(OptimizationConfig(learning_rate=1.0, schedule="cosine"), 0.5) == pytest.approx(0.5)
    assert learning_rate_at(OptimizationConfig(learning_rate=1.0), 0.7) == 1.0


def test_warm_up_poly_and_plateau_by_hand():
    warm = OptimizationConfig(learning_rate=1.0, warm_up=0.2, schedule="cosine")
    assert [learning_rate_at(warm, p) for p in (0, 0.1, 0.2, 0.6, 1)] == pytest.approx([0.04, 0.52, 1, 0.5, 0])
    poly = OptimizationConfig(learning_rate=2.0, schedule="poly")
    assert [learning_rate_at(poly, p) for p in (0, 0.5, 1)] == pytest.approx([2, 2 * 0.5**0.9, 0])
    assert learning_rate_at(OptimizationConfig(learning_rate=2.0, schedule="plateau"), 0.5, decay=0.25) == 0.5


def test_the_plateau_schedule_is_torchs():
    config = OptimizationConfig(schedule="plateau", plateau_factor=0.5, plateau_patience=2)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode="max", factor=0.5, patience=2, threshold=0, threshold_mode="abs"
    )
    dices = [0.1, 0.3, 0.2, 0.3, 0.3, 0.1, 0.1, 0.5, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4]
    for count in range(1, len(dices) + 1):
        scheduler.step(dices[count - 1])
        assert decay_after_plateaus(config, dices[:count]) == optimizer.param_groups[0]["lr"]
    assert optimizer.param_groups[0]["lr"] == 1 / 8
    assert decay_after_plateaus(OptimizationConfig(), dices) == 1
