"""Runs an unpadded network on a whole image by tiles: the overlap-tile strategy (Ronneberger et al. 2015, figure 2).

Legend: N images, C channels, K classes, H, W pixels. *Margin*: the pixels that unpadded convolutions remove at each
side (`ModelConfig.margin`). Each image is extended by its margin, mirrored at its edges.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from unet_ray.config import ModelConfig


def mirror_margin(image_NCHW: Tensor, margin: int) -> Tensor:
    """Extends an image of any dtype by `margin` mirrored pixels on each side.

    A margin larger than the image is mirrored repeatedly.
    """
    if margin == 0:
        return image_NCHW
    height, width = image_NCHW.shape[-2:]
    return _window(image_NCHW, (2, 3), (-margin, -margin), (height + 2 * margin, width + 2 * margin))


def by_tiles(network: Callable[[Tensor], Tensor], image_NCHW: Tensor, tile: int, config: ModelConfig) -> Tensor:
    """Computes logits [N,K,H,W] of whole images [N,C,H,W] with an unpadded network that sees one tile at a time.

    The result equals that of the whole image at once: tiles begin at multiples of 2 ** depth, so that pooling combines
    the same pixels.
    """
    height, width = image_NCHW.shape[-2:]
    step = tile // 2**config.depth * 2**config.depth
    side = tile + 2 * config.margin
    rows = []
    for top in range(0, height, step):
        row = []
        for left in range(0, width, step):
            corner = (top - config.margin, left - config.margin)
            logits = network(_window(image_NCHW, (2, 3), corner, (side, side)))
            row.append(logits[..., : min(step, height - top), : min(step, width - left)])
        rows.append(torch.cat(row, dim=-1))
    return torch.cat(rows, dim=-2)


def _window(values: Tensor, dims: tuple[int, int], corner: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Cuts a rectangle out of two dimensions; positions beyond the edges are mirrored."""
    for dim, start, length in zip(dims, corner, size, strict=True):
        position = torch.from_numpy(mirrored(start, length, values.shape[dim]))
        values = values.index_select(dim, position.to(values.device))
    return values


def mirrored(start: int, length: int, size: int) -> np.ndarray:
    """Returns positions start .. start+length-1 on a side of `size` pixels that is mirrored at its ends, int64."""
    period = max(1, 2 * (size - 1))
    position = np.arange(start, start + length) % period
    return np.where(position < size, position, period - position)
