"""Learns from images without masks: FixMatch (Sohn et al. 2020, https://arxiv.org/abs/2001.07685).

The average of the weights is the teacher. It labels an image as it is; where it is sure, the network has to see the
same in a strongly changed copy.

Legend: N images, C channels, K classes (1: a single logit), H, W pixels.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from unet_ray.config import IGNORE, AugmentConfig
from unet_ray.training.augment import augment
from unet_ray.training.losses import Pixels

STRONG = AugmentConfig(hflip=0, brightness=0.25, contrast=0.5, gamma=0.5)
"""About the colour jitter of UniMatch (Yang et al. 2023: 0.5), as far as our augmentations have it."""
LARGEST_HOLE = 0.5
"""Longest side of the rectangle that is cut out of an image, as a share of its side (DeVries & Taylor 2017: a half)."""
HOLE = 127
"""Gray of the hole."""
STREAM = 2
"""Keeps the draws of the holes apart from others of the same seed, epoch and image."""


def pseudo_masks(logits_NKHW: Tensor, confidence: float) -> Tensor:
    """Returns the class of each pixel, uint8 [N,H,W], and `IGNORE` where its probability is below `confidence`."""
    logits = logits_NKHW.float()
    if logits.shape[1] == 1:
        foreground = logits[:, 0].sigmoid()
        sure, found = torch.maximum(foreground, 1 - foreground), foreground > 0.5
    else:
        sure, found = logits.softmax(dim=1).max(dim=1)
    return torch.where(sure >= confidence, found.to(torch.uint8), IGNORE)


def can_be_read(mask_NHW: Tensor) -> Tensor:
    """Returns which images without masks have been read, bool [N]: their rows have `IGNORE` alone (`rows.Decoder`)."""
    return mask_NHW.amin(dim=(1, 2)) == IGNORE


def changed(image_NCHW: Tensor, mask_NHW: Tensor, indices: np.ndarray, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
    """Returns images uint8 with other colours and a hole, and their masks with `IGNORE` in the hole. The draws of an
    image depend on `seed`, `epoch` and its number alone."""
    arrays = {"image": image_NCHW.permute(0, 2, 3, 1), "mask": mask_NHW}
    image = augment(arrays, indices, config=STRONG, seed=seed + STREAM, epoch=epoch)["image"].clone()
    mask = mask_NHW.clone()
    height, width = mask.shape[1:]
    for row, index in enumerate(indices):
        generator = np.random.default_rng([seed, epoch, int(index), STREAM])
        rows, columns = (_span(generator, length) for length in (height, width))
        image[row, rows, columns], mask[row, rows, columns] = HOLE, IGNORE
    return image.permute(0, 3, 1, 2), mask


def _span(generator: np.random.Generator, length: int) -> slice:
    size = int(generator.uniform(0, LARGEST_HOLE) * length)
    start = int(generator.integers(0, length - size + 1))
    return slice(start, start + size)


def ramp(progress: float) -> float:
    """Returns the factor of the weight of images without masks, which rises to 1 over the training (Laine & Aila 2017,
    section 2.1). Without it, what an early teacher takes for sure is learnt for good: 20 masks of cars, an encoder from
    ImageNet, Dice 0.952; with it 0.973."""
    return math.exp(-5 * (1 - progress) ** 2)


def consistency(logits_NKHW: Tensor, mask_NHW: Tensor) -> Tensor:
    """Returns the cross-entropy with pseudo masks, float32 [N]: the mean over all pixels, to which those that the
    teacher was not sure of add nothing."""
    valid = (mask_NHW != IGNORE).float()
    return (Pixels(logits_NKHW.float(), mask_NHW, valid).cross_entropy * valid).mean(dim=(1, 2))
