"""Looks at some pairs before a training: how the images look, and what may spoil it, such as turned pictures."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from unet_ray.config import IGNORE, TrainConfig, shown_locations
from unet_ray.data import imaging, mask_files
from unet_ray.data.darkness import NEARLY_BLACK
from unet_ray.data.inputs import evenly
from unet_ray.data.looks import SAMPLE, SIDE, Looks, numbers_of, summary
from unet_ray.data.pairs import Pair
from unet_ray.training.nothing_found import SMALL

log = logging.getLogger("unet_ray")


def look(pairs: Sequence[Pair], config: TrainConfig) -> Looks:
    """Logs a warning for images that are turned by EXIF while their masks are not, or that are nearly black, and for
    objects that are too small at the network's size. Returns how the images look."""
    with ThreadPoolExecutor() as threads:
        seen = [found for found in threads.map(lambda pair: _seen(pair, config), evenly(pairs, SAMPLE)) if found]
    if not seen:
        return {}
    turned = sum(image.turned for image in seen)
    if turned:
        log.warning(
            "%d of %d sampled images are turned by their EXIF orientation, their masks have none. If masks were drawn"
            " on images as they are stored, --set data.mask_turn=true (`unet-ray doctor` shows one)",
            turned,
            len(seen),
        )
    top = max(image.brightest for image in seen)
    if top <= NEARLY_BLACK:
        log.warning(
            "%s: no value of %d sampled images is above %d of 255 as they are read: `unet-ray doctor` prints the"
            " data.value_range that fits",
            shown_locations(config.data.images),
            len(seen),
            top,
        )
    _say_if_too_small([image.shares for image in seen if image.shares[0]], config.data.size_hw)
    return summary([image.numbers for image in seen])


def _say_if_too_small(shares: Sequence[tuple[float, float]], size_hw: tuple[int, int]) -> None:
    """Logs a warning if what there is to find is too small, or gone, at the network's size. `shares`: of masks with
    foreground, see `_Seen`."""
    gone = sum(not here for _, here in shares)
    small = sum(here for _, here in shares) < SMALL * len(shares)
    if gone or small:
        log.warning(
            "what there is to find covers %.2f %% of the pixels at %dx%d, and nothing is left of it in %d of %d masks: "
            "raise --image-size, and with --set data.tile=512 train on squares of the larger images",
            100 * sum(here for _, here in shares) / len(shares),
            *size_hw,
            gone,
            len(shares),
        )


class _Seen(NamedTuple):
    """What is seen of a pair."""

    turned: bool
    """The image is turned by EXIF, and its mask is not."""
    brightest: int
    numbers: dict[str, float]
    """See `looks`."""
    shares: tuple[float, float]
    """Share of the mask's pixels that are foreground: at its own size, and at the network's."""


def _seen(pair: Pair, config: TrainConfig) -> _Seen | None:
    """Returns what is seen of a pair; None if it can't be read."""
    channels, value_range = config.model.in_channels, config.data.value_range
    try:
        data = imaging.read_file(pair.image)
        image, _ = imaging.decode_image(data, channels, (SIDE, SIDE), value_range=value_range)
        ids, _ = imaging.decode_mask(mask_files.read(pair.mask), config.data, None, data)
        turned = not config.data.mask_turn and imaging.orientation(data) > 1
        turned = turned and imaging.orientation(imaging.read_file(mask_files.first_file(pair.mask))) == 1
    except (imaging.ImageError, OSError, ValueError):
        return None  # the training stops at it, and names it
    shares = _foreground(ids), _foreground(imaging.resized_ids(ids, config.data.size_hw))
    return _Seen(turned, int(image.max(initial=0)), numbers_of(image), shares)


def _foreground(ids: np.ndarray) -> float:
    return float(np.mean((ids > 0) & (ids != IGNORE)))
