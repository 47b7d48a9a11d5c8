"""The U-Net family: Ronneberger, Fischer, Brox 2015, https://arxiv.org/abs/1505.04597.

Legend: N images, C channels, H, W pixels. Level 0 is the finest, level `depth` the deepest.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unet_ray.config import ModelConfig


class UNet(nn.Module):
    """Contracts an image `depth` times, expands it again, and joins equal levels (figure 1 of the paper).

    Shape: uint8 [N, in_channels, H, W] -> float [N, num_classes, H, W] logits with padding `same`, for any H and W;
    [N, num_classes, H - 2 * margin, W - 2 * margin] with `valid`, for sizes that `ModelConfig.check_size` accepts.
    """

    pixel_scale: Tensor
    pixel_shift: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.depth, self.patch = config.depth, config.patch
        self.register_buffer("pixel_scale", torch.tensor(1 / (255 * config.pixel_std)), persistent=False)
        self.register_buffer("pixel_shift", torch.tensor(-config.pixel_mean / config.pixel_std), persistent=False)

        widths = config.channels
        inputs = [config.in_channels * config.patch**2, *widths[:-1]]
        self.down = nn.ModuleList(DoubleConv(i, o, config) for i, o in zip(inputs, widths, strict=True))
        self.up = nn.ModuleList(Up(below, here, config.up) for here, below in pairwise(widths))
        self.join = nn.ModuleList(DoubleConv(2 * width, width, config) for width in widths[:-1])
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Conv2d(widths[0], config.num_classes * config.patch**2, 1)
        initialise(self)

    def forward(self, image_NCHW: Tensor) -> Tensor:
        height, width = image_NCHW.shape[-2:]
        step = 2**self.depth * self.patch
        x = continue_edge(image_NCHW, -height % step, -width % step) if self.config.padding == "same" else image_NCHW
        if self.patch > 1:
            # Still uint8, where moving pixels is cheapest.
            x = F.pixel_unshuffle(x, self.patch).contiguous(memory_format=torch.channels_last)
        x = x.float() * self.pixel_scale + self.pixel_shift

        skips = []
        for level, block in enumerate(self.down):
            if level > 0:
                x = F.max_pool2d(x, 2)
            x = block(x)
            skips.append(x)
        x = self.dropout(x)
        for level in reversed(range(self.depth)):
            x = self.up[level](x)
            x = self.join[level](torch.cat([crop_centre(skips[level], x), x], dim=1))
        logits = self.head(x)

        if self.patch > 1:
            logits = F.pixel_shuffle(logits, self.patch)
        return logits[..., :height, :width] if self.config.padding == "same" else logits


class DoubleConv(nn.Sequential):
    """Twice: 3x3 convolution, norm, ReLU. Shape: [N,i,H,W] -> [N,o,H,W], or [N,o,H-4,W-4] without padding."""

    def __init__(self, in_channels: int, out_channels: int, config: ModelConfig) -> None:
        layers: list[nn.Module] = []
        for channels in (in_channels, out_channels):
            padding = 1 if config.padding == "same" else 0
            # A norm subtracts the mean, and with it any bias before it.
            layers.append(nn.Conv2d(channels, out_channels, 3, padding=padding, bias=config.norm == "none"))
            if config.norm != "none":
                layers.append(norm_layer(config.norm, out_channels))
            layers.append(nn.ReLU(inplace=True))
        super().__init__(*layers)


class Up(nn.Module):
    """Doubles the size and takes the level above's channels. Shape: [N,i,H,W] -> [N,o,2H,2W]."""

    def __init__(self, in_channels: int, out_channels: int, up: str) -> None:
        super().__init__()
        self.bilinear = up == "bilinear"
        # Interpolation and a 1x1 convolution are both linear and commute: the convolution first costs a quarter.
        self.conv: nn.Module = (
            nn.Conv2d(in_channels, out_channels, 1)
            if self.bilinear
            else nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False) if self.bilinear else x


def norm_layer(norm: str, channels: int) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    # Groups of at least 8 channels where they divide evenly: Wu & He 2018 found 16 best, and used at most 32 groups.
    groups = next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0 and (channels // g >= 8 or g == 1))
    return nn.GroupNorm(groups, channels) if norm == "group" else nn.InstanceNorm2d(channels, affine=True)


def continue_edge(image_NCHW: Tensor, rows: int, columns: int) -> Tensor:
    """The image with its last row and column repeated; of any dtype (F.pad knows no uint8), uncopied where it fits."""
    if rows:
        image_NCHW = torch.cat([image_NCHW, image_NCHW[:, :, -1:].expand(-1, -1, rows, -1)], dim=2)
    if columns:
        image_NCHW = torch.cat([image_NCHW, image_NCHW[..., -1:].expand(-1, -1, -1, columns)], dim=3)
    return image_NCHW


def crop_centre(skip: Tensor, like: Tensor) -> Tensor:
    """The middle of `skip`, as large as `like`: the copy-and-crop of figure 1. Equal sizes pass through."""
    top, left = ((s - t) // 2 for s, t in zip(skip.shape[-2:], like.shape[-2:], strict=True))
    return skip[..., top : top + like.shape[-2], left : left + like.shape[-1]]


def initialise(model: nn.Module) -> None:
    """He initialisation, the paper's sqrt(2 / N) with N incoming nodes (section 3); biases zero."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.ConvTranspose2d):
            # Stride equals kernel: one output position sees each input channel once, so N is in_channels.
            nn.init.normal_(module.weight, std=(2 / module.in_channels) ** 0.5)
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and module.bias is not None:
            nn.init.zeros_(module.bias)
