"""Looks at some images before a training, and says what may spoil it: pictures that are turned, or nearly black."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from unet_ray.config import TrainConfig, shown_locations
from unet_ray.data import imaging, mask_files
from unet_ray.data.darkness import NEARLY_BLACK, brightest
from unet_ray.data.inputs import evenly
from unet_ray.data.pairs import Pair

log = logging.getLogger("unet_ray")

SAMPLE = 16


def look(pairs: Sequence[Pair], config: TrainConfig) -> None:
    """Logs a warning for images that are turned by EXIF while their masks are not, or that are nearly black."""
    with ThreadPoolExecutor() as threads:
        seen = [found for found in threads.map(lambda pair: _seen(pair, config), evenly(pairs, SAMPLE)) if found]
    if not seen:
        return
    turned = sum(is_turned for is_turned, _ in seen)
    if turned:
        log.warning(
            "%d of %d sampled images are turned by their EXIF orientation, their masks have none. If masks were drawn"
            " on images as they are stored, --set data.mask_turn=true (`unet-ray doctor` shows one)",
            turned,
            len(seen),
        )
    top = max(brightest for _, brightest in seen)
    if top <= NEARLY_BLACK:
        log.warning(
            "%s: no value of %d sampled images is above %d of 255 as they are read: `unet-ray doctor` prints the"
            " data.value_range that fits",
            shown_locations(config.data.images),
            len(seen),
            top,
        )


def _seen(pair: Pair, config: TrainConfig) -> tuple[bool, int] | None:
    """Returns whether the image is turned and its mask is not, and its brightest value; None if it can't be read."""
    try:
        data = imaging.read_file(pair.image)
        top = brightest(data, config.model.in_channels, config.data.value_range)
        first_mask = mask_files.first_file(pair.mask)
        turned = not config.data.mask_turn and imaging.orientation(data) > 1
        turned = turned and imaging.orientation(imaging.read_file(first_mask)) == 1
    except (imaging.ImageError, OSError, ValueError):
        return None  # the training stops at it, and names it
    return turned, top
