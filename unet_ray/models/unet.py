"""Defines the U-Net family: Ronneberger, Fischer, Brox 2015, https://arxiv.org/abs/1505.04597.

Legend: N images, C, G channels, H, W pixels. Level 0 is the finest, level `depth` the deepest.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unet_ray.config import ModelConfig
from unet_ray.models.base import SegmentationModel


class UNet(SegmentationModel):
    """Contracts an image `depth` times, expands it again, and joins equal levels (figure 1 of the paper)."""

    grows_with_area = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, multiple_of=2**config.depth)
        widths = config.channels
        self.down = contracting_path(config)
        self.up = nn.ModuleList(Up(below, here, config.up) for here, below in pairwise(widths))
        self.gate = nn.ModuleList(
            AttentionGate(here, below) if config.name == "attention_unet" else nn.Identity()
            for here, below in pairwise(widths)
        )
        self.join = nn.ModuleList(DoubleConv(2 * width, width, config) for width in widths[:-1])
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Conv2d(widths[0], self.out_channels, 1)
        initialise(self)

    def bottleneck(self, x: Tensor) -> Tensor:
        return self.contract(self.down, x)[-1]

    def body(self, x: Tensor) -> Tensor:
        skips = self.contract(self.down, x)
        x = self.dropout(skips[-1])
        for level in reversed(range(self.config.depth)):
            up = self.up[level](x)
            skip = crop_centre(skips[level], up)
            if isinstance(self.gate[level], AttentionGate):
                skip = self.gate[level](skip, x)
            x = self.checkpointed(self.join[level], torch.cat([skip, up], dim=1))
        return self.head(x)


class UNetPlusPlus(SegmentationModel):
    """U-Net with dense, nested skips: Zhou et al. 2018, https://arxiv.org/abs/1807.10165.

    Node (i, j) joins all nodes (i, <j) of its level with node (i+1, j-1) from below (equation 1). With
    `deep_supervision` each node (0, j) has a head: in training they give logits each, [S,N,K,H,W], and else their mean.
    """

    grows_with_area = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, multiple_of=2**config.depth)
        widths, depth = config.channels, config.depth
        self.down = contracting_path(config)
        self.up, self.join = nn.ModuleDict(), nn.ModuleDict()
        for j in range(1, depth + 1):
            for i in range(depth + 1 - j):
                self.up[f"{i}_{j}"] = Up(widths[i + 1], widths[i], config.up)
                self.join[f"{i}_{j}"] = DoubleConv((j + 1) * widths[i], widths[i], config)
        self.dropout = nn.Dropout(config.dropout)
        self.heads = depth if config.deep_supervision else 1
        self.head = nn.Conv2d(self.heads * widths[0], self.heads * self.out_channels, 1, groups=self.heads)
        initialise(self)

    def bottleneck(self, x: Tensor) -> Tensor:
        return self.contract(self.down, x)[-1]

    def body(self, x: Tensor) -> Tensor:
        levels = [[x] for x in self.contract(self.down, x)]
        levels[-1] = [self.dropout(levels[-1][0])]
        for j in range(1, self.config.depth + 1):
            for i in range(self.config.depth + 1 - j):
                up = self.up[f"{i}_{j}"](levels[i + 1][j - 1])
                levels[i].append(self.checkpointed(self.join[f"{i}_{j}"], torch.cat([*levels[i], up], dim=1)))
        if self.heads == 1:
            return self.head(levels[0][-1])
        logits = self.head(torch.cat(levels[0][1:], dim=1)).unflatten(1, (self.heads, self.out_channels))
        return logits.transpose(0, 1) if self.training else logits.mean(dim=1)


def contracting_path(config: ModelConfig) -> nn.ModuleList:
    """Builds one DoubleConv per level, the finest first."""
    widths = config.channels
    inputs = [config.in_channels * config.patch**2, *widths[:-1]]
    return nn.ModuleList(DoubleConv(i, o, config) for i, o in zip(inputs, widths, strict=True))


class AttentionGate(nn.Module):
    """Weighs each position of a skip, using the coarser level below (Oktay et al. 2018, figure 2,
    https://arxiv.org/abs/1804.03999).

    Shape: skip [N,C,2H,2W], below [N,G,H,W] -> [N,C,2H,2W].
    """

    def __init__(self, channels: int, below_channels: int) -> None:
        super().__init__()
        between = max(1, channels // 2)
        self.from_skip = nn.Conv2d(channels, between, 2, stride=2, bias=False)
        self.from_below = nn.Conv2d(below_channels, between, 1)
        self.to_weight = nn.Conv2d(between, 1, 1)

    def forward(self, skip: Tensor, below: Tensor) -> Tensor:
        weight = self.to_weight(F.relu(self.from_skip(skip) + self.from_below(below))).sigmoid()
        return skip * F.interpolate(weight, skip.shape[-2:], mode="bilinear", align_corners=False)


class DoubleConv(nn.Sequential):
    """Applies 3x3 convolution, norm and ReLU twice. Shape: [N,i,H,W] -> [N,o,H,W], or [N,o,H-4,W-4] without padding."""

    def __init__(self, in_channels: int, out_channels: int, config: ModelConfig) -> None:
        layers: list[nn.Module] = []
        for channels in (in_channels, out_channels):
            padding = 1 if config.padding == "same" else 0
            # A norm subtracts the mean, so a bias before it has no effect.
            layers.append(nn.Conv2d(channels, out_channels, 3, padding=padding, bias=config.norm == "none"))
            if config.norm != "none":
                layers.append(norm_layer(config.norm, out_channels))
            layers.append(nn.ReLU(inplace=True))
        super().__init__(*layers)


class Up(nn.Module):
    """Doubles the size and changes to the channels of the level above. Shape: [N,i,H,W] -> [N,o,2H,2W]."""

    def __init__(self, in_channels: int, out_channels: int, up: str) -> None:
        super().__init__()
        self.bilinear = up == "bilinear"
        # Interpolation and a 1x1 convolution are linear and commute. The convolution first takes a quarter of the work.
        self.conv: nn.Module = (
            nn.Conv2d(in_channels, out_channels, 1)
            if self.bilinear
            else nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False) if self.bilinear else x


def norm_layer(norm: str, channels: int) -> nn.Module:
    """Builds the layer that `ModelConfig.norm` names (not `none`)."""
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    # Groups have 8 channels or more if that divides evenly. Wu & He 2018 found 16 best, and used at most 32 groups.
    groups = next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0 and (channels // g >= 8 or g == 1))
    return nn.GroupNorm(groups, channels) if norm == "group" else nn.InstanceNorm2d(channels, affine=True)


def crop_centre(skip: Tensor, like: Tensor) -> Tensor:
    """Cuts the middle out of `skip`, in the size of `like`: the copy-and-crop of figure 1."""
    top, left = ((s - t) // 2 for s, t in zip(skip.shape[-2:], like.shape[-2:], strict=True))
    return skip[..., top : top + like.shape[-2], left : left + like.shape[-1]]


def initialise(model: nn.Module) -> None:
    """Applies He initialisation, the paper's sqrt(2 / N) with N incoming nodes (section 3); sets biases to zero."""
    if next(model.parameters()).is_meta:
        return  # there are no weights, and drawing none would import torch's compiler
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.ConvTranspose2d):
            # Stride equals kernel, so one output position sees each input channel once: N is in_channels.
            nn.init.normal_(module.weight, std=(2 / module.in_channels) ** 0.5)
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and module.bias is not None:
            nn.init.zeros_(module.bias)
