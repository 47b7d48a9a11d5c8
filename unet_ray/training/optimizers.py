"""Optimizers, and the moving average of the weights.

To add one, write a function here and name it in `registry.OPTIMIZERS`. Weight decay applies to weights only, the
parameters of more than one dimension, and not to biases and norms.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from unet_ray.config import OptimizationConfig
from unet_ray.models import SegmentationModel
from unet_ray.registry import OPTIMIZERS, load
from unet_ray.training.muon import Muon

MUON_SCALE = 7.0
"""The learning rate of orthogonal steps divided by AdamW's. The source has 0.02; AdamW's usual rate is 0.003."""


def build_optimizer(config: OptimizationConfig, network: SegmentationModel) -> torch.optim.Optimizer:
    """Builds the optimizer that the settings name."""
    return load(OPTIMIZERS, config.optimizer)(config, network)


def adamw(config: OptimizationConfig, network: SegmentationModel) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019)."""
    return _not_compiled(torch.optim.AdamW)(_groups(config, network), lr=config.learning_rate, fused=True)


def adam(config: OptimizationConfig, network: SegmentationModel) -> torch.optim.Optimizer:
    """Adam (Kingma & Ba 2015)."""
    return _not_compiled(torch.optim.Adam)(_groups(config, network), lr=config.learning_rate, fused=True)


def sgd(config: OptimizationConfig, network: SegmentationModel) -> torch.optim.Optimizer:
    """Stochastic gradient descent with momentum, as in Ronneberger et al. 2015."""
    return _not_compiled(torch.optim.SGD)(
        _groups(config, network), lr=config.learning_rate, momentum=config.momentum, fused=True
    )


def rmsprop(config: OptimizationConfig, network: SegmentationModel) -> torch.optim.Optimizer:
    """RMSprop (Hinton 2012)."""
    return _not_compiled(torch.optim.RMSprop)(_groups(config, network), lr=config.learning_rate)


def muon(config: OptimizationConfig, network: SegmentationModel) -> torch.optim.Optimizer:
    """Muon (Jordan et al. 2024): orthogonal steps for weights. Biases, norms and the last layer, whose outputs are
    scores rather than features, take AdamW's steps."""
    weights, others = _weights_and_others(network)
    last = {id(p) for p in network.head.parameters()}
    return _not_compiled(Muon)(
        [
            {
                "params": [p for p in weights if id(p) not in last],
                "weight_decay": config.weight_decay,
                "scale": MUON_SCALE,
            },
            {"params": [p for p in weights if id(p) in last], "weight_decay": 0.0, "orthogonal": False},
            {"params": others, "weight_decay": 0.0, "orthogonal": False},
        ],
        lr=config.learning_rate,
    )


def _not_compiled(kind: type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """Returns an optimizer's class without the decorators that import torch's compiler, which takes a second at the
    start of each training. An optimizer is never compiled."""
    names = ("add_param_group", "load_state_dict", "state_dict", "zero_grad")
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in names}
    return type(kind.__name__, (kind,), {**methods, "step": torch.no_grad()(inspect.unwrap(kind.step))})


def _groups(config: OptimizationConfig, network: SegmentationModel) -> list[dict[str, Any]]:
    weights, others = _weights_and_others(network)
    return [{"params": weights, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]


def _weights_and_others(network: SegmentationModel) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Returns the parameters of more than one dimension, and the rest."""
    parameters = list(network.parameters())
    return [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]


def average_of(network: nn.Module, decay: float) -> AveragedModel:
    """Returns an exponential moving average of a network's weights and running statistics.

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
