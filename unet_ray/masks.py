"""How a mask is stored: the values of a mask file, and masks as PNG."""

from __future__ import annotations

import colorsys
import functools
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from unet_ray import storage
from unet_ray.config import DataConfig, UserError
from unet_ray.imaging import ImageError, stored_values

SAMPLE = 32
"""How many masks, evenly spaced over the sorted list, are read to learn their values."""


def infer_values(mask_paths: Sequence[str], num_classes: int, config: DataConfig) -> tuple[int, ...]:
    """Which stored value is which class: read from `SAMPLE` masks, decided once for the whole data set.

    One class: {0, v} is background and foreground, whatever v is (1, 255, a palette index). More: the ids 0 .. K-1 if
    no larger value occurs, else the K values that occur, in order. Anything else is a UserError that names the values.
    """
    step = max(1, len(mask_paths) // SAMPLE)
    found: set[int] = set()
    for path in mask_paths[::step][:SAMPLE]:
        try:
            found.update(np.unique(stored_values(storage.read_bytes(path))).tolist())
        except (ImageError, OSError) as error:
            raise UserError(f"{path}: {error}") from None
    found.discard(-1 if config.ignore_index is None else config.ignore_index)
    values = sorted(found)
    ids = max(2, num_classes)
    if num_classes == 1 and len(values) == 2:
        return (values[0], values[1])
    if num_classes > 1 and values and values[-1] < ids:
        return tuple(range(ids))
    if num_classes > 1 and len(values) == ids:
        return tuple(values)
    shown = ", ".join(map(str, values[:8])) + (" …" if len(values) > 8 else "")
    raise UserError(
        f"{len(values)} mask value(s) ({shown}) for {ids} classes: name the value of each with "
        "--set data.mask_values='[0, 255]', their number with --set model.num_classes=K, "
        "and one to leave out with --set data.ignore_index=V"
    )


def encode_png(mask: np.ndarray, num_classes: int) -> bytes:
    """Class ids, uint8 [H,W], as PNG: 1-bit for one class; a palette whose indices are the class ids for more."""
    height, width = mask.shape
    if num_classes == 1:
        image = Image.frombytes("1", (width, height), np.packbits(mask, axis=1).tobytes())
    else:
        image = Image.frombytes("P", (width, height), np.ascontiguousarray(mask).tobytes())
        image.putpalette(_palette())
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


@functools.cache
def _palette() -> bytes:
    """256 colours: black for class 0, then hues a golden angle apart, so that neighbouring ids differ clearly."""
    colours = [(0.0, 0.0, 0.0)]
    for class_id in range(1, 256):
        lightness = (0.95, 0.7, 0.5)[class_id % 3]
        colours.append(colorsys.hsv_to_rgb(class_id * 0.618034 % 1, 0.75, lightness))
    return bytes(round(255 * value) for colour in colours for value in colour)
