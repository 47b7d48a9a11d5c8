"""Looks at some images before a training: how they look, and what may spoil it, pictures turned or nearly black."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from unet_ray.config import TrainConfig, shown_locations
from unet_ray.data import imaging, mask_files
from unet_ray.data.darkness import NEARLY_BLACK, brightest
from unet_ray.data.inputs import evenly
from unet_ray.data.looks import SAMPLE, Looks, numbers_of, summary
from unet_ray.data.pairs import Pair

log = logging.getLogger("unet_ray")


def look(pairs: Sequence[Pair], config: TrainConfig) -> Looks:
    """Logs a warning for images that are turned by EXIF while their masks are not, or that are nearly black. Returns
    how the images look."""
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
    return summary([image.numbers for image in seen])


class _Seen(NamedTuple):
    """What is seen of a pair."""

    turned: bool
    """The image is turned by EXIF, and its mask is not."""
    brightest: int
    numbers: dict[str, float]
    """See `looks`."""


def _seen(pair: Pair, config: TrainConfig) -> _Seen | None:
    """Returns what is seen of a pair; None if it can't be read."""
    channels, value_range = config.model.in_channels, config.data.value_range
    try:
        data = imaging.read_file(pair.image)
        top = brightest(data, channels, value_range)
        numbers = numbers_of(data, channels, value_range)
        first_mask = mask_files.first_file(pair.mask)
        turned = not config.data.mask_turn and imaging.orientation(data) > 1
        turned = turned and imaging.orientation(imaging.read_file(first_mask)) == 1
    except (imaging.ImageError, OSError, ValueError):
        return None  # the training stops at it, and names it
    return _Seen(turned, top, numbers)
