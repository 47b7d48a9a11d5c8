"""Where the tiles of an image of any size lie, and how they are blended.

Legend: K classes, H, W pixels, T pixels of a tile's side, P pixels of a row of tiles from the first one's start to the
last one's end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unet_ray.config import ModelConfig
from unet_ray.models.tiles import mirrored

SIGMA = 1 / 8
"""Of the weights with which tiles are blended, as a share of their side: nnU-Net's."""


@dataclass(frozen=True, slots=True)
class Axis:
    """Where tiles begin along one side of an image: every `step`; first and last reach equally far beyond it."""

    length: int
    """Pixels of the image's side."""
    starts: list[int]
    tile: int

    @classmethod
    def of(cls, length: int, tile: int, step: int, beyond: int) -> Axis:
        count = max(1, -(-(length + 2 * beyond - tile) // step) + 1)
        return cls(length, [number * step - beyond for number in range(count)], tile)

    @property
    def padded(self) -> int:
        return self.starts[-1] - self.starts[0] + self.tile

    def total(self, weight: Tensor) -> Tensor:
        """Returns the sum of the weights of all tiles at each position, counted from the first tile's start."""
        total = torch.zeros(self.padded, device=weight.device)
        for start in self.starts:
            total[start - self.starts[0] :][: self.tile] += weight
        return total

    def window(self, start: int, margin: int) -> np.ndarray:
        """Returns the positions that a tile and its margin cover, mirrored at the image's edges."""
        return mirrored(start - margin, self.tile + 2 * margin, self.length)


@dataclass(frozen=True, slots=True)
class Grid:
    """The tiles of one image."""

    tile: int
    step: int
    rows: Axis
    columns: Axis
    weight: Tensor
    """Of a tile's pixels along one side, float32 [T]; of a pixel it is the product of its row's and its column's."""

    @classmethod
    def of(cls, config: ModelConfig, size_hw: tuple[int, int], tile: int, overlap: float, device: torch.device) -> Grid:
        """`overlap`: the share of a tile that it has in common with the next; an unpadded network needs none."""
        if config.padding == "valid":
            # At multiples of 2 ** depth, so that pooling meets the same pixels as in the whole image.
            step, beyond, weight = tile // 2**config.depth * 2**config.depth, 0, torch.ones(tile, device=device)
        else:
            # Far enough beyond the edges that its pixels, too, lie in the middle part of some tile.
            step, weight = max(1, round(tile * (1 - overlap))), gaussian(tile, device)
            beyond = (tile - step) // 2
        rows, columns = (Axis.of(length, tile, step, beyond) for length in size_hw)
        return cls(tile, step, rows, columns, weight)


def gaussian(tile: int, device: torch.device) -> Tensor:
    """Returns the weights along a tile's side, float32 [T]: a Gaussian of `SIGMA` around its middle, 0.001 at least."""
    place = torch.arange(tile, device=device, dtype=torch.float32) - (tile - 1) / 2
    return torch.exp(-(place**2) / (2 * (SIGMA * tile) ** 2)).clamp_min(1e-3)


class Band:
    """The weighted sum of the logits of one row of tiles after the other.

    It holds the T rows of the image that later tiles can still change, from the current row of tiles on.
    """

    def __init__(self, grid: Grid, classes: int) -> None:
        self.grid = grid
        device = grid.weight.device
        self.rows_total, self.columns_total = (axis.total(grid.weight) for axis in (grid.rows, grid.columns))
        self.sum_KTP = torch.zeros((classes, grid.tile, grid.columns.padded), device=device)

    def add(self, left: int, logits_KTT: Tensor) -> None:
        """Adds a tile of the current row of tiles that starts at the column `left`."""
        weight, start = self.grid.weight, left - self.grid.columns.starts[0]
        self.sum_KTP[:, :, start : start + self.grid.tile] += logits_KTT * weight[:, None] * weight

    def finished(self, number: int) -> Iterator[tuple[int, Tensor]]:
        """Yields (first row, logits float32 [K,h,W]) of the rows of the image that are finished, if there are any.

        `number`: of the row of tiles that is complete now. The band then moves on to the next.
        """
        rows, columns = self.grid.rows, self.grid.columns
        top, left = rows.starts[number], -columns.starts[0]
        # Rows up to the next tile's first are finished; after the last tile, all.
        count = self.grid.step if number + 1 < len(rows.starts) else self.grid.tile
        inside = slice(max(0, -top), min(count, rows.length - top))
        if inside.start < inside.stop:
            total = self.rows_total[top - rows.starts[0] :][inside, None] * self.columns_total
            yield top + inside.start, (self.sum_KTP[:, inside] / total)[..., left : left + columns.length]
        self.sum_KTP = torch.cat([self.sum_KTP[:, count:], torch.zeros_like(self.sum_KTP[:, :count])], dim=1)
