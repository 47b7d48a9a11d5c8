"""Builds the networks by name from a ModelConfig."""

from __future__ import annotations

from torch import nn

from unet_ray import registry
from unet_ray.config import ModelConfig
from unet_ray.models import custom
from unet_ray.models.base import SegmentationModel


def build(config: ModelConfig) -> SegmentationModel:
    """Builds a freshly initialised network: uint8 [N,C,H,W] in, float logits [N,num_classes,H',W'] out."""
    if registry.is_custom(config.name):
        return custom.build(config)
    table, name = (registry.ENCODERS, config.encoder) if config.has_own_encoder else (registry.NETWORKS, config.name)
    network: type[SegmentationModel] = registry.load(table, name)
    return network(config)


def parameter_count(model: nn.Module) -> int:
    """Returns the number of weights."""
    return sum(p.numel() for p in model.parameters())


__all__ = ["SegmentationModel", "build", "parameter_count"]
