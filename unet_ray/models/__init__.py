"""The networks, built by name from a ModelConfig."""

from __future__ import annotations

from torch import nn

from unet_ray.config import ModelConfig
from unet_ray.models.base import SegmentationModel
from unet_ray.models.baselines import Otsu, Smp, Torchvision
from unet_ray.models.unet import UNet, UNetPlusPlus

MODELS: dict[str, type[SegmentationModel]] = {
    "unet": UNet,
    "attention_unet": UNet,
    "unet++": UNetPlusPlus,
    "fcn": Torchvision,
    "deeplabv3": Torchvision,
    "smp": Smp,
    "otsu": Otsu,
}


def build(config: ModelConfig) -> SegmentationModel:
    """A freshly initialised network: uint8 [N,C,H,W] in, float logits [N,num_classes,H',W'] out."""
    return MODELS[config.name](config)


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


__all__ = ["SegmentationModel", "UNet", "UNetPlusPlus", "build", "parameter_count"]
