"""Places tiles on an image of any size, and blends their logits.

Legend: K classes, H, W pixels of the image, T pixels of a tile's side, P pixels of a whole row of tiles, h rows of a
band.
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
"""Standard deviation of the weights that blend tiles, as a share of a tile's side: nnU-Net's value."""


@dataclass(frozen=True, slots=True)
class Axis:
    """Places tiles along one side of an image."""

    length: int
    """Pixels of the image's side."""
    starts: list[int]
    """First position of each tile; negative for tiles that begin before the image."""
    tile: int
    """Pixels of a tile's side."""

    @classmethod
    def of(cls, length: int, tile: int, step: int, beyond: int) -> Axis:
        """Places a tile every `step` pixels. The first begins `beyond` pixels before the image, and the last ends at
        least `beyond` pixels after it."""
        count = max(1, -(-(length + 2 * beyond - tile) // step) + 1)
        return cls(length, [number * step - beyond for number in range(count)], tile)

    @property
    def padded(self) -> int:
        """Pixels from the first tile's start to the last tile's end."""
        return self.starts[-1] - self.starts[0] + self.tile

    def total(self, weight: Tensor) -> Tensor:
        """Returns the sum of all tiles' weights at each position from the first tile's start, float32 [padded]."""
        total = torch.zeros(self.padded, device=weight.device)
        for start in self.starts:
            total[start - self.starts[0] :][: self.tile] += weight
        return total

    def window(self, start: int, margin: int) -> np.ndarray:
        """Returns the positions that a tile and its margin cover. Positions beyond the image are mirrored into it."""
        return mirrored(start - margin, self.tile + 2 * margin, self.length)


@dataclass(frozen=True, slots=True)
class Grid:
    """Places the tiles of one image."""

    tile: int
    step: int
    rows: Axis
    columns: Axis
    weight: Tensor
    """Weights along a tile's side, float32 [T]. A pixel's weight is its row's times its column's."""

    @classmethod
    def of(cls, config: ModelConfig, size_hw: tuple[int, int], tile: int, overlap: float, device: torch.device) -> Grid:
        """Places tiles for a network. `overlap`: the share of a tile's side that the next tile covers, too; ignored for
        unpadded networks, which need no overlap."""
        if config.padding == "valid":
            # Tiles start at multiples of 2 ** depth, so that pooling groups the same pixels as in the whole image.
            step, beyond, weight = tile // 2**config.depth * 2**config.depth, 0, torch.ones(tile, device=device)
        else:
            # Tiles begin this far outside, so that pixels at the image's edge lie in the middle of some tile, too.
            step, weight = max(1, round(tile * (1 - overlap))), gaussian(tile, device)
            beyond = (tile - step) // 2
        rows, columns = (Axis.of(length, tile, step, beyond) for length in size_hw)
        return cls(tile, step, rows, columns, weight)


def gaussian(tile: int, device: torch.device) -> Tensor:
    """Returns the weights along a tile's side, float32 [T]: a Gaussian around its middle, at least 0.001."""
    place = torch.arange(tile, device=device, dtype=torch.float32) - (tile - 1) / 2
    return torch.exp(-(place**2) / (2 * (SIGMA * tile) ** 2)).clamp_min(1e-3)


class Band:
    """Sums the weighted logits of tiles, one row of tiles after the other.

    It holds the T rows of the image that the current row of tiles covers. Rows above them are complete.
    """

    def __init__(self, grid: Grid, classes: int) -> None:
        self.grid = grid
        device = grid.weight.device
        self.rows_total, self.columns_total = (axis.total(grid.weight) for axis in (grid.rows, grid.columns))
        self.sum_KTP = torch.zeros((classes, grid.tile, grid.columns.padded), device=device)

    def add(self, left: int, logits_KTT: Tensor) -> None:
        """Adds a tile of the current row of tiles. `left`: its first column in the image."""
        weight, start = self.grid.weight, left - self.grid.columns.starts[0]
        self.sum_KTP[:, :, start : start + self.grid.tile] += logits_KTT * weight[:, None] * weight

    def pop_complete_rows(self, number: int) -> Iterator[tuple[int, Tensor]]:
        """Yields (first row, logits float32 [K,h,W]) of the image's rows that no later tile covers, if there are any.

        `number`: the index of the row of tiles that was added last. The band then moves to the next row of tiles.
        """
        rows, columns = self.grid.rows, self.grid.columns
        top, left = rows.starts[number], -columns.starts[0]
        # Rows above the next row of tiles are complete; after the last row of tiles, all are.
        count = self.grid.step if number + 1 < len(rows.starts) else self.grid.tile
        inside = slice(max(0, -top), min(count, rows.length - top))
        if inside.start < inside.stop:
            total = self.rows_total[top - rows.starts[0] :][inside, None] * self.columns_total
            yield top + inside.start, (self.sum_KTP[:, inside] / total)[..., left : left + columns.length]
        self.sum_KTP = torch.cat([self.sum_KTP[:, count:], torch.zeros_like(self.sum_KTP[:, :count])], dim=1)
