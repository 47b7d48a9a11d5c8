"""What all networks share: pixels in, logits of the same size out, memory for time.

Legend: N images, C channels, H, W pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unet_ray.config import ModelConfig


class SegmentationModel(nn.Module, ABC):
    """uint8 [N, in_channels, H, W] -> float [N, num_classes, H, W] logits with padding `same`, for any H and W;
    [N, num_classes, H - 2 * margin, W - 2 * margin] with `valid`, for sizes that `ModelConfig.check_size` accepts.

    A subclass has `body`, from normalised pixels to logits, and `head`, its last convolution.
    """

    pixel_scale: Tensor
    pixel_shift: Tensor
    head: nn.Module

    def __init__(self, config: ModelConfig, *, multiple_of: int = 1) -> None:
        """`multiple_of`: `body` gets sides that this divides (in units of `patch`)."""
        super().__init__()
        self.config, self.multiple_of = config, multiple_of
        self.checkpoint_activations = False
        """Set by training."""
        mean, std = (torch.tensor(value).reshape(-1, 1, 1) for value in (config.pixel_mean, config.pixel_std))
        if config.patch > 1:  # pixel_unshuffle keeps a channel's pixels together
            mean, std = (v.repeat_interleave(config.patch**2, dim=0) if len(v) > 1 else v for v in (mean, std))
        self.register_buffer("pixel_scale", 1 / (255 * std), persistent=False)
        self.register_buffer("pixel_shift", -mean / std, persistent=False)

    @property
    def step(self) -> int:
        """What sides of images are brought to a multiple of (with padding `same`), pixels."""
        return self.multiple_of * self.config.patch

    @property
    def out_channels(self) -> int:
        """Of `head`."""
        return self.config.num_classes * self.config.patch**2

    @abstractmethod
    def body(self, x: Tensor) -> Tensor:
        """Normalised pixels, float [N,C,H,W] -> logits."""

    def forward(self, image_NCHW: Tensor) -> Tensor:
        height, width = image_NCHW.shape[-2:]
        same, patch = self.config.padding == "same", self.config.patch
        x = continue_edge(image_NCHW, -height % self.step, -width % self.step) if same else image_NCHW
        if patch > 1:
            # Still uint8, where moving pixels is cheapest.
            x = F.pixel_unshuffle(x, patch).contiguous(memory_format=torch.channels_last)
        logits = self.body(x.float() * self.pixel_scale + self.pixel_shift)
        if patch > 1:
            logits = F.pixel_shuffle(logits, patch)
        return logits[..., :height, :width] if same else logits

    def contract(self, blocks: nn.ModuleList, x: Tensor) -> list[Tensor]:
        """The blocks one after the other with 2x2 max pooling between them: what each returns."""
        levels: list[Tensor] = []
        for block in blocks:
            levels.append(self.again(block, F.max_pool2d(levels[-1], 2) if levels else x))
        return levels

    def again(self, block: nn.Module, x: Tensor) -> Tensor:
        """`block(x)`; with `checkpoint_activations` computed again in the backward pass, and not kept until then."""
        if not (self.checkpoint_activations and self.training):
            return block(x)

        def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
            return nullcontext(), _statistics_held(block)

        return checkpoint(block, x, use_reentrant=False, context_fn=contexts)


@contextmanager
def _statistics_held(block: nn.Module) -> Iterator[None]:
    """Batch norms that don't move their running statistics: they have done so in the first computation."""
    norms = [module for module in block.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum


def continue_edge(image_NCHW: Tensor, rows: int, columns: int) -> Tensor:
    """The image with its last row and column repeated; of any dtype (F.pad knows no uint8), uncopied where it fits."""
    if rows:
        image_NCHW = torch.cat([image_NCHW, image_NCHW[:, :, -1:].expand(-1, -1, rows, -1)], dim=2)
    if columns:
        image_NCHW = torch.cat([image_NCHW, image_NCHW[..., -1:].expand(-1, -1, -1, columns)], dim=3)
    return image_NCHW
