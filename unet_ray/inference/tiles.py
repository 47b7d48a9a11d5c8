"""Where the tiles of an image of any size lie, and how they are blended."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SIGMA = 1 / 8
"""Of the weights with which tiles are blended, as a share of their side: nnU-Net's."""


@dataclass(frozen=True, slots=True)
class Axis:
    """Where tiles begin along one side of an image: every `step`, first and last reaching equally far beyond it."""

    starts: list[int]
    tile: int

    @classmethod
    def of(cls, length: int, tile: int, step: int, beyond: int) -> Axis:
        count = max(1, -(-(length + 2 * beyond - tile) // step) + 1)
        return cls([number * step - beyond for number in range(count)], tile)

    @property
    def padded(self) -> int:
        return self.starts[-1] - self.starts[0] + self.tile

    def total(self, weight: Tensor) -> Tensor:
        """Sum of the weights of all tiles at each position, counted from the first tile's start."""
        total = torch.zeros(self.padded, device=weight.device)
        for start in self.starts:
            total[start - self.starts[0] :][: self.tile] += weight
        return total
