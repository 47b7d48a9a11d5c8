"""Cuts random tiles out of training images (`data.tile`)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from unet_ray.config import IGNORE
from unet_ray.models.tiles import _window


def random_tiles(
    arrays: dict[str, Tensor],
    indices: Iterable[int],
    tile: int,
    *,
    margin: int,
    seed: int,
    epoch: int,
    foreground: float = 0.0,
) -> dict[str, Tensor]:
    """Cuts a square of `tile` pixels out of each image and its mask, at a place drawn from (seed, epoch, index). The
    square of an image has `margin` more pixels on each side. `foreground`: see `OptimizationConfig`.

    Shapes: `image` [N,H,W,C] -> [N,tile+2*margin,tile+2*margin,C], all others [N,H,W] -> [N,tile,tile].
    """
    height, width = arrays["mask"].shape[1:]
    corners = []
    for mask, index in zip(arrays["mask"], indices, strict=True):
        generator = np.random.default_rng([seed, epoch, int(index), 1])  # draws other numbers than augment
        corner = int(generator.integers(height - tile + 1)), int(generator.integers(width - tile + 1))
        if foreground and generator.random() < foreground:
            corner = _around_an_object(mask, tile, generator) or corner
        corners.append(corner)

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


def _around_an_object(mask_HW: Tensor, tile: int, generator: np.random.Generator) -> tuple[int, int] | None:
    """Returns the corner of a tile whose middle is a pixel of the foreground, as far as the image's edge lets it: of a
    class drawn among those in the mask, then a pixel drawn among those of the class. None: there is no foreground."""
    classes = [int(value) for value in mask_HW.unique() if value not in (0, IGNORE)]
    if not classes:
        return None
    places = (mask_HW == classes[generator.integers(len(classes))]).nonzero()
    middle = places[generator.integers(len(places))].tolist()
    top, left = (min(max(0, at - tile // 2), length - tile) for at, length in zip(middle, mask_HW.shape, strict=True))
    return top, left
