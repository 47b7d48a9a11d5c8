"""Changes the images of a training batch and their masks at random.

The same (seed, epoch, image) gives the same picture, whatever the batch, the number of workers or the order.

To add an augmentation, give `AugmentConfig` its setting and write one class here, of one of three kinds: `Exact`,
`Geometric` or `Tonal`. Register it with `@_augmentation` below all others, so that their draws stay as they are. A
change that fits none of the kinds, such as noise on each pixel, needs a new one: a subclass of `Augmentation` with an
abstract method, and lines in `augment` that apply it. `draw` does not know the image's size: let it draw a seed then.

Legend: N images, C channels, H, W pixels. Grid positions are grid_sample's: -1 and 1 are the outer edges of an image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from torch import Tensor

from unet_ray.config import AugmentConfig

Arrays = dict[str, Tensor]
"""`image` uint8 [N,H,W,C]; `mask` and perhaps `border`, uint8 [N,H,W]; all on one device."""


def augment(arrays: Arrays, indices: Iterable[int], *, config: AugmentConfig, seed: int, epoch: int) -> Arrays:
    """Returns the arrays, changed as `config` says; shapes and dtypes stay. The random draws of an image depend on
    `seed`, `epoch` and its number in `indices`."""
    by_image = []
    for index in indices:
        generator = np.random.default_rng([seed, epoch, int(index)])
        # All are drawn every time, so that one setting does not change another's draws.
        by_image.append([each.draw(config, generator) for each in AUGMENTATIONS])
    draws = dict(zip(AUGMENTATIONS, map(list, zip(*by_image, strict=True)), strict=True))
    chosen = [each for each in AUGMENTATIONS if any(getattr(config, setting) for setting in each.settings)]
    for each in chosen:
        if isinstance(each, Exact):
            arrays = {name: each.apply(values, draws[each]) for name, values in arrays.items()}
    if any(isinstance(each, Geometric) for each in chosen):
        grid_NHWx = _grid(draws, arrays["mask"])
        arrays = {name: _sample(values, grid_NHWx) for name, values in arrays.items()}
    if any(isinstance(each, Tonal) for each in chosen):
        arrays = {**arrays, "image": _recolour(arrays["image"], draws)}
    return arrays


class Augmentation(ABC):
    """One random change of an image."""

    settings: tuple[str, ...]
    """Names in `AugmentConfig`; 0 is off."""

    @abstractmethod
    def draw(self, config: AugmentConfig, generator: Generator) -> Any:
        """Draws the random numbers for one image."""


class Exact(Augmentation):
    """Moves pixels without interpolation. Applied first."""

    @abstractmethod
    def apply(self, values: Tensor, draws: Sequence[Any]) -> Tensor:
        """Returns the images [N,H,W,C] or masks [N,H,W] changed; `draws`: one per image."""


class Geometric(Augmentation):
    """Moves pixels to any place. All of this kind are applied together, by one interpolation, after `Exact`."""

    @abstractmethod
    def move(self, grid_NHWx: Tensor, draws: Sequence[Any]) -> Tensor:
        """Returns the place that each output pixel comes from, float32 [N,H,W,2] (x, y). `grid_NHWx`: that of the
        augmentations of this kind before it."""


class Tonal(Augmentation):
    """Changes the brightness of an image's pixels. All of this kind are applied together, by one table, last."""

    @abstractmethod
    def tone(self, value: np.ndarray, draw: Any) -> np.ndarray:
        """Returns the new brightness of each of 256 values; both float64 [256], nominally 0 to 1."""


AUGMENTATIONS: list[Augmentation] = []
"""All augmentations, in the order of their draws. They are applied in this order too, except that `Tonal` are applied
from the last to the first."""

Draws = dict[Augmentation, list[Any]]
"""Augmentation -> its draw for each image of a batch."""


def _augmentation(cls: type[Augmentation]) -> type[Augmentation]:
    AUGMENTATIONS.append(cls())
    return cls


def _either_way(generator: Generator, largest: float) -> float:
    return generator.uniform(-largest, largest)


def _factor(generator: Generator, largest: float) -> float:
    """Draws a factor from 1 / (1 + largest) to 1 + largest, log-uniformly."""
    return float(np.exp(_either_way(generator, np.log1p(largest))))


def _flip(values: Tensor, dim: int, flipped: Sequence[bool]) -> Tensor:
    chosen = torch.tensor(flipped, device=values.device)
    return torch.where(chosen.view(-1, *[1] * (values.ndim - 1)), values.flip(dim), values)


@_augmentation
class FlipLeftRight(Exact):
    """Mirrors an image, left to right."""

    settings = ("hflip",)

    def draw(self, config: AugmentConfig, generator: Generator) -> bool:
        return generator.random() < config.hflip

    def apply(self, values: Tensor, draws: Sequence[bool]) -> Tensor:
        return _flip(values, 2, draws)


@_augmentation
class FlipTopBottom(Exact):
    """Mirrors an image, top to bottom."""

    settings = ("vflip",)

    def draw(self, config: AugmentConfig, generator: Generator) -> bool:
        return generator.random() < config.vflip

    def apply(self, values: Tensor, draws: Sequence[bool]) -> Tensor:
        return _flip(values, 1, draws)


@_augmentation
class QuarterTurns(Exact):
    """Turns a square image by 0, 90, 180 or 270 degrees."""

    settings = ("quarter_turns",)

    def draw(self, config: AugmentConfig, generator: Generator) -> int:  # noqa: ARG002
        return int(generator.integers(4))

    def apply(self, values: Tensor, draws: Sequence[int]) -> Tensor:
        return torch.stack([torch.rot90(v, turns, (0, 1)) for v, turns in zip(values, draws, strict=True)])


class _AffineDraw(NamedTuple):
    shift: tuple[float, float]
    """x and y, as fractions of the sides."""
    angle: float
    """Radians."""
    scale: float


@_augmentation
class Affine(Geometric):
    """Shifts, rotates and magnifies an image."""

    settings = ("shift", "rotation", "scale")

    def draw(self, config: AugmentConfig, generator: Generator) -> _AffineDraw:
        return _AffineDraw(
            shift=(_either_way(generator, config.shift), _either_way(generator, config.shift)),
            angle=np.radians(_either_way(generator, config.rotation)),
            scale=_factor(generator, config.scale),
        )

    def move(self, grid_NHWx: Tensor, draws: Sequence[_AffineDraw]) -> Tensor:
        # `Affine` is the first `Geometric` augmentation: the given grid is the identity, so a new one replaces it.
        count, height, width, _ = grid_NHWx.shape
        affine = []
        for draw in draws:
            # A rotation and a scale in pixels; positions run from -1 to 1 along each side, whatever its length.
            cos, sin = np.cos(draw.angle) / draw.scale, np.sin(draw.angle) / draw.scale
            x, y = draw.shift
            affine.append([[cos, -sin * height / width, 2 * x], [sin * width / height, cos, 2 * y]])
        theta = torch.tensor(np.array(affine), dtype=torch.float32, device=grid_NHWx.device)
        return F.affine_grid(theta, [count, 1, height, width], align_corners=False)


@_augmentation
class Brightness(Tonal):
    """Adds to the brightness."""

    settings = ("brightness",)

    def draw(self, config: AugmentConfig, generator: Generator) -> float:
        return _either_way(generator, config.brightness)

    def tone(self, value: np.ndarray, draw: float) -> np.ndarray:
        return value + draw


@_augmentation
class Contrast(Tonal):
    """Multiplies the distance from middle gray."""

    settings = ("contrast",)

    def draw(self, config: AugmentConfig, generator: Generator) -> float:
        return _factor(generator, config.contrast)

    def tone(self, value: np.ndarray, draw: float) -> np.ndarray:
        return (value - 0.5) * draw + 0.5


@_augmentation
class Gamma(Tonal):
    """Raises the brightness to a power."""

    settings = ("gamma",)

    def draw(self, config: AugmentConfig, generator: Generator) -> float:
        return _factor(generator, config.gamma)

    def tone(self, value: np.ndarray, draw: float) -> np.ndarray:
        return value**draw


@_augmentation
class Elastic(Geometric):
    """Displaces pixels smoothly, by random vectors on a coarse grid (Ronneberger et al. 2015, section 3.1)."""

    settings = ("elastic",)
    side = 3
    """Points on each side of the grid (the paper's)."""

    def draw(self, config: AugmentConfig, generator: Generator) -> np.ndarray:
        """Draws the displacements in pixels, float64 [2,side,side]: x and y."""
        return config.elastic * generator.standard_normal((2, self.side, self.side))

    def move(self, grid_NHWx: Tensor, draws: Sequence[np.ndarray]) -> Tensor:
        coarse = np.stack(draws)
        if not coarse.any():
            return grid_NHWx
        height, width = grid_NHWx.shape[1:3]
        coarse *= np.array([2 / width, 2 / height])[:, None, None]
        displacement = torch.tensor(coarse, dtype=torch.float32, device=grid_NHWx.device)
        fine = F.interpolate(displacement, (height, width), mode="bicubic", align_corners=True)
        return grid_NHWx + fine.permute(0, 2, 3, 1)


def _grid(draws: Draws, like_NHW: Tensor) -> Tensor:
    """Returns the place that each output pixel comes from, float32 [N,H,W,2] (x, y)."""
    count, height, width = like_NHW.shape
    theta = torch.eye(2, 3, device=like_NHW.device)[None]
    grid = F.affine_grid(theta, [1, 1, height, width], align_corners=False).expand(count, -1, -1, -1)
    for each, of_images in draws.items():
        if isinstance(each, Geometric):
            grid = each.move(grid, of_images)
    return grid


def _sample(values: Tensor, grid_NHWx: Tensor) -> Tensor:
    """Samples images [N,H,W,C] bilinearly, masks [N,H,W] by nearest neighbour. Mirrors both beyond the edge."""
    is_image = values.ndim == 4
    planes = (values.permute(0, 3, 1, 2) if is_image else values[:, None]).float()
    mode = "bilinear" if is_image else "nearest"
    sampled = F.grid_sample(planes, grid_NHWx, mode=mode, padding_mode="reflection", align_corners=False)
    sampled = sampled.round_().to(torch.uint8)
    return sampled.permute(0, 2, 3, 1).contiguous() if is_image else sampled[:, 0]


def _recolour(image_NHWC: Tensor, draws: Draws) -> Tensor:
    """Changes the brightness of images by one table of 256 values per image, so that all changes together cost one
    look-up."""
    table_N256 = np.tile(np.linspace(0, 1, 256), (len(image_NHWC), 1))
    for each, of_images in reversed(draws.items()):
        if isinstance(each, Tonal):
            table_N256 = np.stack([each.tone(*pair) for pair in zip(table_N256, of_images, strict=True)])
    tables = torch.from_numpy(np.round(255 * table_N256.clip(0, 1)).astype(np.uint8)).to(image_NHWC.device)
    return torch.stack([table[image.int()] for table, image in zip(tables, image_NHWC, strict=True)])
