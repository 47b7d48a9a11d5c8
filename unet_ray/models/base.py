"""The base class of all networks: turns pixels into logits of the same size, and checkpoints activations.

Legend: N images, C channels, H, W pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unet_ray.config import ModelConfig


class SegmentationModel(nn.Module, ABC):
    """Turns images, uint8 [N, in_channels, H, W], into logits.

    With padding `same` they are float [N, num_classes, H, W], for any H and W. With `valid` they are
    [N, num_classes, H - 2 * margin, W - 2 * margin], for sizes that `ModelConfig.check_size` accepts. In training a
    network may give the logits of several heads, [S, N, num_classes, H, W]; its loss is the mean of theirs.

    A subclass defines `body`, from normalised pixels to logits, `bottleneck`, the deepest layer on that way, and
    `head`, its last convolution.
    """

    pixel_scale: Tensor
    pixel_shift: Tensor
    head: nn.Module
    grows_with_area: bool = False
    """Whether, with padding `same`, all its operations are convolutions, whose number is that of the squares of `step`
    pixels in an image."""

    def __init__(self, config: ModelConfig, *, multiple_of: int = 1) -> None:
        """`multiple_of`: `body` gets sides that are multiples of this (in units of `patch`)."""
        super().__init__()
        self.config, self.multiple_of = config, multiple_of
        self.checkpoint_activations = False
        """Training sets this."""
        mean, std = pixel_statistics(config)
        if config.patch > 1:  # pixel_unshuffle keeps a channel's pixels together
            mean, std = (v.repeat(config.patch**2) if len(v) > 1 else v for v in (mean, std))
        self.register_buffer("pixel_scale", of_channels(1 / (255 * std)), persistent=False)
        self.register_buffer("pixel_shift", of_channels(-mean / std), persistent=False)

    @property
    def step(self) -> int:
        """Padding `same` extends the sides of an image to multiples of this, in pixels."""
        return self.multiple_of * self.config.patch

    @property
    def out_channels(self) -> int:
        """The number of channels that `head` returns."""
        return self.config.num_classes * self.config.patch**2

    @abstractmethod
    def body(self, x: Tensor) -> Tensor:
        """Computes logits from normalised pixels, float [N,C,H,W]."""

    @abstractmethod
    def bottleneck(self, x: Tensor) -> Tensor:
        """Computes the deepest layer, float [N,D,h,w], from normalised pixels."""

    def forward(self, image_NCHW: Tensor) -> Tensor:
        height, width = image_NCHW.shape[-2:]
        logits = self.of_fitting(self._fitting(image_NCHW))
        return logits[..., :height, :width] if self.config.padding == "same" else logits

    def of_fitting(self, image_NCHW: Tensor) -> Tensor:
        """Computes the logits of images whose sides are multiples of `step`; see the class."""
        logits = self.body(self._pixels(image_NCHW))
        return F.pixel_shuffle(logits, self.config.patch) if self.config.patch > 1 else logits

    def embedding(self, image_NCHW: Tensor) -> Tensor:
        """Computes a vector for each image, float [N,D]: its deepest layer, averaged over the image. Images that look
        alike to the network have vectors of similar directions."""
        return self.bottleneck(self._pixels(self._fitting(image_NCHW))).mean(dim=(2, 3))

    def _fitting(self, image_NCHW: Tensor) -> Tensor:
        """Extends images to sides that `body` can halve."""
        height, width = image_NCHW.shape[-2:]
        same = self.config.padding == "same"
        return continue_edge(image_NCHW, -height % self.step, -width % self.step) if same else image_NCHW

    def _pixels(self, image_NCHW: Tensor) -> Tensor:
        """Returns normalised pixels, in patches, as `body` takes them."""
        x = image_NCHW
        if self.config.patch > 1:
            # Pixels are still uint8 here, so moving them is cheap.
            x = F.pixel_unshuffle(x, self.config.patch).contiguous(memory_format=torch.channels_last)
        return x.float() * self.pixel_scale + self.pixel_shift

    def contract(self, blocks: nn.ModuleList, x: Tensor) -> list[Tensor]:
        """Runs the blocks one after the other with 2x2 max pooling between them; returns each block's output."""
        levels: list[Tensor] = []
        for block in blocks:
            levels.append(self.checkpointed(block, F.max_pool2d(levels[-1], 2) if levels else x))
        return levels

    def checkpointed(self, block: nn.Module, x: Tensor) -> Tensor:
        """Returns `block(x)`. With `checkpoint_activations`, the backward pass computes its activations again."""
        if not (self.checkpoint_activations and self.training):
            return block(x)

        def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
            return nullcontext(), _frozen_statistics(block)

        return checkpoint(block, x, use_reentrant=False, context_fn=contexts)


def pixel_statistics(config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """Returns `pixel_mean` and `pixel_std`, float32 [C] each; C is 1 if one number holds for all channels."""
    mean, std = (np.atleast_1d(np.asarray(value, np.float32)) for value in (config.pixel_mean, config.pixel_std))
    return mean, std


def of_channels(values: np.ndarray) -> Tensor:
    """Returns float32 [C,1,1]. (Computing with tensors of the meta device would import torch's compiler.)"""
    return torch.tensor(values.tolist(), dtype=torch.float32).reshape(-1, 1, 1)


@contextmanager
def _frozen_statistics(block: nn.Module) -> Iterator[None]:
    """Keeps batch norms from updating their running statistics a second time."""
    norms = [module for module in block.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def continue_edge(image_NCHW: Tensor, rows: int, columns: int) -> Tensor:
    """Repeats an image's last row and column. Works on any dtype (F.pad has no uint8); copies only if it must."""
    if rows:
        image_NCHW = torch.cat([image_NCHW, image_NCHW[:, :, -1:].expand(-1, -1, rows, -1)], dim=2)
    if columns:
        image_NCHW = torch.cat([image_NCHW, image_NCHW[..., -1:].expand(-1, -1, -1, columns)], dim=3)
    return image_NCHW
