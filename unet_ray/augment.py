"""What is done to a training batch, over image and mask together.

The same (seed, epoch, image) gives the same picture, whatever the batch, the number of workers or the order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from unet_ray.config import AugmentConfig


def augment(
    image_NHWC: Tensor, mask_NHW: Tensor, indices: Iterable[int], *, config: AugmentConfig, seed: int, epoch: int
) -> tuple[Tensor, Tensor]:
    """Flips. Shapes and dtypes stay. `indices`: what each image's draws are derived from, with `seed` and `epoch`."""
    draws_N2 = torch.tensor([_draws(seed, epoch, int(index)) for index in indices])
    for column, (probability, dim) in enumerate(((config.hflip, 2), (config.vflip, 1))):
        flipped = draws_N2[:, column] < probability
        if flipped.any():
            image_NHWC = torch.where(flipped[:, None, None, None], image_NHWC.flip(dim), image_NHWC)
            mask_NHW = torch.where(flipped[:, None, None], mask_NHW.flip(dim), mask_NHW)
    return image_NHWC, mask_NHW


def _draws(seed: int, epoch: int, index: int) -> list[float]:
    """Two numbers in [0, 1), from a hash: cheaper than a generator per image, and the same on every platform."""
    digest = hashlib.blake2b(f"{seed}:{epoch}:{index}".encode(), digest_size=16).digest()
    return [int.from_bytes(part, "little") / 2**64 for part in (digest[:8], digest[8:])]
