"""Finds images that look nearly black as they are read, because their values have another range than is assumed."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from unet_ray.config import ValueRange
from unet_ray.data import imaging
from unet_ray.data.imaging import ImageError, Source

log = logging.getLogger("unet_ray")

NEARLY_BLACK = 16
"""If no value of some images is above it, of 255, they were read with the wrong range."""
SAMPLE = 4
SIDE = 64
PNG_DEPTH = 24
"""Place of the byte of a PNG that says its bits per channel."""


def may_be_deep(path: str) -> bool:
    """Returns whether a file may have more than 8 bits per channel, by its name."""
    return not path.lower().endswith((".jpg", ".jpeg", ".jfif", ".gif", ".bmp", ".webp"))


def brightest(data: Source, channels: int, value_range: ValueRange) -> int:
    """Returns the highest value of an image, resized to `SIDE`, as a model gets it: 0 to 255. Raises ImageError."""
    array, _ = imaging.decode_image(data, channels, (SIDE, SIDE), value_range=value_range)
    return int(array.max(initial=0))


def warn_of_deep(images: Iterable[Source | str], channels: int, value_range: ValueRange, where: str) -> None:
    """Logs a warning if images of more than 8 bits are nearly black as the model reads them.

    `images`: encoded, or the reason why one can't be read. `where`: the folder, for the message.
    """
    tops = []
    for data in images:
        if isinstance(data, bytes) and _is_deep(data):
            try:
                tops.append(brightest(data, channels, value_range))
            except ImageError:
                continue  # its row fails, with the reason
    if tops and max(tops) <= NEARLY_BLACK:
        log.warning(
            "%s: no value of %d images is above %d of 255 as this model reads them: `unet-ray doctor` prints the"
            " data.value_range to train with",
            where,
            len(tops),
            max(tops),
        )


def _is_deep(data: bytes) -> bool:
    """Returns whether a file may have more than 8 bits per channel, by its beginning."""
    png = data.startswith(b"\x89PNG") and data[PNG_DEPTH : PNG_DEPTH + 1] == b"\x10"
    return png or data.startswith((imaging.NPY_MAGIC, *imaging.TIFF_MAGIC))
