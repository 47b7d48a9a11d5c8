"""Optimizers, and the moving average of the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from unet_ray.config import OptimizationConfig
from unet_ray.models import SegmentationModel
from unet_ray.training.muon import Muon

MUON_SCALE = 7.0
"""Orthogonal steps are this much larger than AdamW's: 0.02, the source's, where those are 0.003."""


def build_optimizer(config: OptimizationConfig, model: SegmentationModel) -> torch.optim.Optimizer:
    """The optimizer; weight decay is for weights only (parameters of more than one dimension)."""
    rate = config.learning_rate
    weights = [p for p in model.parameters() if p.ndim > 1]
    others: list[dict[str, Any]] = [{"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0}]
    groups = [{"params": weights, "weight_decay": config.weight_decay}, *others]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=rate, fused=True)
    if config.optimizer == "adam":
        return torch.optim.Adam(groups, lr=rate, fused=True)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=config.momentum, fused=True)
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(groups, lr=rate)
    # The last layer makes numbers, not features: its directions are not alike (Jordan et al.).
    last = {id(p) for p in model.head.parameters()}
    return Muon(
        [
            {
                "params": [p for p in weights if id(p) not in last],
                "weight_decay": config.weight_decay,
                "scale": MUON_SCALE,
            },
            {"params": [p for p in weights if id(p) in last], "weight_decay": 0.0, "orthogonal": False},
            {**others[0], "orthogonal": False},
        ],
        lr=rate,
    )


def average_of(network: nn.Module, decay: float) -> AveragedModel:
    """The exponential moving average of a network's weights and running statistics.

    Over the first steps the decay is (1 + steps) / (10 + steps), as in TensorFlow's ExponentialMovingAverage.
    """

    @torch.no_grad()
    def update(averages: Any, values: Any, steps: Any) -> None:
        weight = 1 - min(decay, (1 + int(steps)) / (10 + int(steps)))
        for average, value in zip(averages, values, strict=True):
            if average.is_floating_point():
                average.lerp_(value.to(average.dtype), weight)
            else:
                average.copy_(value)

    return AveragedModel(network, multi_avg_fn=update, use_buffers=True)
