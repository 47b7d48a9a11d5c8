"""What is done to a training batch, over image and mask together.

The same (seed, epoch, image) gives the same picture, whatever the batch, the number of workers or the order.

Legend: N images, C channels, H, W pixels. Grid positions are grid_sample's: -1 and 1 are the outer edges of an image.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unet_ray.config import AugmentConfig
from unet_ray.models.tiles import _window


def random_tiles(
    arrays: dict[str, Tensor], indices: Iterable[int], tile: int, *, margin: int, seed: int, epoch: int
) -> dict[str, Tensor]:
    """A square of `tile` pixels from each image and its mask, where (seed, epoch, index) says; images with the margin.

    Shapes: `image` [N,H,W,C] -> [N,tile+2*margin,tile+2*margin,C], all others [N,H,W] -> [N,tile,tile].
    """
    height, width = arrays["mask"].shape[1:]
    corners = []
    for index in indices:
        generator = np.random.default_rng([seed, epoch, int(index), 1])  # other numbers than augment's
        corners.append((int(generator.integers(height - tile + 1)), int(generator.integers(width - tile + 1))))

    def cut(name: str, values: Tensor) -> Tensor:
        more = margin if name == "image" else 0
        side = tile + 2 * more
        return torch.stack(
            [
                _window(picture, (0, 1), (top - more, left - more), (side, side))
                for picture, (top, left) in zip(values, corners, strict=True)
            ]
        )

    return {name: cut(name, values) for name, values in arrays.items()}


COARSE = 3
"""Points a side of the grid that elastic displacements are drawn on (Ronneberger et al. 2015, section 3.1)."""

Arrays = dict[str, Tensor]
"""`image` uint8 [N,H,W,C]; `mask` and whatever else goes with it, uint8 [N,H,W]; all on one device."""


def augment(arrays: Arrays, indices: Iterable[int], *, config: AugmentConfig, seed: int, epoch: int) -> Arrays:
    """The arrays, changed as `config` says; shapes and dtypes stay. `indices`: what each image's draws are derived
    from, with `seed` and `epoch`."""
    draws = [_Draw(config, np.random.default_rng([seed, epoch, int(index)])) for index in indices]
    for dim, flipped in ((2, [draw.hflip for draw in draws]), (1, [draw.vflip for draw in draws])):
        if any(flipped):
            arrays = {name: _flip(values, dim, flipped) for name, values in arrays.items()}
    if config.quarter_turns:
        arrays = {
            name: torch.stack([torch.rot90(v, draw.turns, (0, 1)) for v, draw in zip(values, draws, strict=True)])
            for name, values in arrays.items()
        }
    if config.shift or config.rotation or config.scale or config.elastic:
        grid_NHWx = _grid(draws, arrays["mask"])
        arrays = {name: _warp(values, grid_NHWx) for name, values in arrays.items()}
    if config.brightness or config.contrast or config.gamma:
        arrays = {**arrays, "image": _recolour(arrays["image"], draws)}
    return arrays


class _Draw:
    """What is done to one image. All is drawn every time, so that one setting does not change another's draws."""

    def __init__(self, config: AugmentConfig, generator: np.random.Generator) -> None:
        def either_way(largest: float) -> float:
            return generator.uniform(-largest, largest)

        def factor(largest: float) -> float:
            return float(np.exp(either_way(np.log1p(largest))))

        self.hflip = generator.random() < config.hflip
        self.vflip = generator.random() < config.vflip
        self.turns = int(generator.integers(4))
        self.shift = either_way(config.shift), either_way(config.shift)
        self.angle = np.radians(either_way(config.rotation))
        self.scale = factor(config.scale)
        self.brightness = either_way(config.brightness)
        self.contrast = factor(config.contrast)
        self.gamma = factor(config.gamma)
        self.displacement = config.elastic * generator.standard_normal((2, COARSE, COARSE))
        """x and y, pixels."""


def _flip(values: Tensor, dim: int, flipped: list[bool]) -> Tensor:
    chosen = torch.tensor(flipped, device=values.device)
    return torch.where(chosen.view(-1, *[1] * (values.ndim - 1)), values.flip(dim), values)


def _grid(draws: list[_Draw], like_NHW: Tensor) -> Tensor:
    """Where each output pixel comes from, float [N,H,W,2] (x, y)."""
    height, width = like_NHW.shape[1:]
    affine = []
    for draw in draws:
        # In pixels it is a rotation and a scale; positions count from -1 to 1 on either side, whatever its length.
        cos, sin = np.cos(draw.angle) / draw.scale, np.sin(draw.angle) / draw.scale
        affine.append([[cos, -sin * height / width, 2 * draw.shift[0]], [sin * width / height, cos, 2 * draw.shift[1]]])
    theta = torch.tensor(np.array(affine), dtype=torch.float32, device=like_NHW.device)
    grid = F.affine_grid(theta, [len(draws), 1, height, width], align_corners=False)
    coarse = np.stack([draw.displacement for draw in draws])
    if coarse.any():
        coarse *= np.array([2 / width, 2 / height])[:, None, None]
        displacement = torch.tensor(coarse, dtype=torch.float32, device=like_NHW.device)
        fine = F.interpolate(displacement, (height, width), mode="bicubic", align_corners=True)
        grid = grid + fine.permute(0, 2, 3, 1)
    return grid


def _warp(values: Tensor, grid_NHWx: Tensor) -> Tensor:
    """Images [N,H,W,C] bilinearly, masks [N,H,W] by nearest neighbour; beyond the edge both are mirrored."""
    is_image = values.ndim == 4
    planes = (values.permute(0, 3, 1, 2) if is_image else values[:, None]).float()
    mode = "bilinear" if is_image else "nearest"
    warped = F.grid_sample(planes, grid_NHWx, mode=mode, padding_mode="reflection", align_corners=False)
    warped = warped.round_().to(torch.uint8)
    return warped.permute(0, 2, 3, 1).contiguous() if is_image else warped[:, 0]


def _recolour(image_NHWC: Tensor, draws: list[_Draw]) -> Tensor:
    """Gamma, contrast, brightness: one table of 256 values an image, so the cost is a look-up whatever is done."""
    tables = []
    for draw in draws:
        value = np.linspace(0, 1, 256) ** draw.gamma
        value = (value - 0.5) * draw.contrast + 0.5 + draw.brightness
        tables.append(np.round(255 * value.clip(0, 1)).astype(np.uint8))
    table_N256 = torch.from_numpy(np.stack(tables)).to(image_NHWC.device)
    return torch.stack([table[image.int()] for table, image in zip(table_N256, image_NHWC, strict=True)])
