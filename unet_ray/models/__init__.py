"""The networks, built by name from a ModelConfig."""

from __future__ import annotations

import torch
from torch import nn

from unet_ray.config import ModelConfig
from unet_ray.models.unet import UNet

MODELS = {"unet": UNet}


def build(config: ModelConfig) -> UNet:
    """A freshly initialised network: uint8 [N,C,H,W] in, float logits [N,num_classes,H',W'] out."""
    return MODELS[config.name](config)


def mirror_margin(image_NCHW: torch.Tensor, margin: int) -> torch.Tensor:
    """The image continued by `margin` mirrored pixels on each side: the context that unpadded convolutions consume
    (Ronneberger et al. 2015, section 2). Any dtype; a margin larger than the image is mirrored again and again."""
    if margin == 0:
        return image_NCHW
    for dim in (2, 3):
        size = image_NCHW.shape[dim]
        position = torch.arange(-margin, size + margin, device=image_NCHW.device)
        period = max(1, 2 * (size - 1))
        position = position.remainder(period)
        image_NCHW = image_NCHW.index_select(dim, torch.where(position < size, position, period - position))
    return image_NCHW


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


__all__ = ["UNet", "build", "mirror_margin", "parameter_count"]
