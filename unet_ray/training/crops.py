"""Cuts random tiles out of training images (`data.tile`)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from unet_ray.models.tiles import _window


def random_tiles(
    arrays: dict[str, Tensor], indices: Iterable[int], tile: int, *, margin: int, seed: int, epoch: int
) -> dict[str, Tensor]:
    """Cuts a square of `tile` pixels out of each image and its mask, at a place drawn from (seed, epoch, index). The
    square of an image has `margin` more pixels on each side.

    Shapes: `image` [N,H,W,C] -> [N,tile+2*margin,tile+2*margin,C], all others [N,H,W] -> [N,tile,tile].
    """
    height, width = arrays["mask"].shape[1:]
    corners = []
    for index in indices:
        generator = np.random.default_rng([seed, epoch, int(index), 1])  # draws other numbers than augment
        corners.append((int(generator.integers(height - tile + 1)), int(generator.integers(width - tile + 1))))

    def cut(name: str, values: Tensor) -> Tensor:
        border = margin if name == "image" else 0
        side = tile + 2 * border
        return torch.stack(
            [
                _window(picture, (0, 1), (top - border, left - border), (side, side))
                for picture, (top, left) in zip(values, corners, strict=True)
            ]
        )

    return {name: cut(name, values) for name, values in arrays.items()}
