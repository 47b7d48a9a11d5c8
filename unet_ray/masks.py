"""How a mask is stored and what it says: the values of a mask file, weights drawn from masks, masks as PNG."""

from __future__ import annotations

import colorsys
import functools
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image
from scipy import ndimage

from unet_ray import storage
from unet_ray.config import IGNORE, DataConfig, UserError
from unet_ray.imaging import ImageError, decode_mask, stored_values

SAMPLE = 32
"""How many masks, evenly spaced over the sorted list, are read to learn their values."""


def infer_values(mask_paths: Sequence[str], num_classes: int, config: DataConfig) -> tuple[int, ...]:
    """Which stored value is which class: read from `SAMPLE` masks, decided once for the whole data set.

    One class: {0, v} is background and foreground, whatever v is (1, 255, a palette index). More: the ids 0 .. K-1 if
    no larger value occurs, else the K values that occur, in order. Anything else is a UserError that names the values.
    """
    found: set[int] = set()
    for path in _sample(mask_paths):
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


def inverse_frequencies(mask_paths: Sequence[str], config: DataConfig) -> tuple[float, ...]:
    """Weight of each class id, pixels / (classes * pixels of the class), from `SAMPLE` masks. Raises UserError if a
    class does not occur in them."""
    assert config.mask_values is not None
    counts = np.zeros(256, np.int64)
    for path in _sample(mask_paths):
        try:
            mask, _ = decode_mask(storage.read_bytes(path), config, None)
        except (ImageError, OSError) as error:
            raise UserError(f"{path}: {error}") from None
        counts += np.bincount(mask.ravel(), minlength=256)
    counts = counts[: len(config.mask_values)]
    if not counts.all():
        raise UserError(
            f"train.class_weights=inverse: class {np.flatnonzero(counts == 0)[0]} does not occur in a sample of "
            f"{len(_sample(mask_paths))} masks: give the weights as numbers"
        )
    return tuple(float(f"{weight:.6g}") for weight in counts.sum() / (len(counts) * counts))


def _sample(paths: Sequence[str]) -> Sequence[str]:
    return paths[:: max(1, len(paths) // SAMPLE)][:SAMPLE]


def border_map(mask: np.ndarray, sigma: float) -> np.ndarray:
    """255 * exp(-(d1 + d2)² / 2σ²) on background pixels, d1 and d2 the distances in pixels to the nearest and the
    second nearest object (equation 2 of Ronneberger et al. 2015, without w0); 0 elsewhere. uint8 [H,W].

    An object is a connected region (edges, not corners) of one class other than 0.
    """
    reach = int(np.ceil(3.53 * sigma))  # beyond, the map rounds to 0
    nearest = np.full(mask.shape, np.inf, np.float32)
    second = nearest.copy()
    for class_id in set(np.unique(mask).tolist()) - {0, IGNORE}:
        labels, _ = ndimage.label(mask == class_id)
        # Distances in a window around each object only: the whole image for each would cost far more.
        for label, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
            window = (
                slice(max(0, rows.start - reach), rows.stop + reach),
                slice(max(0, columns.start - reach), columns.stop + reach),
            )
            distance = ndimage.distance_transform_edt(labels[window] != label).astype(np.float32)
            before = nearest[window]
            second[window] = np.minimum(second[window], np.maximum(before, distance))
            nearest[window] = np.minimum(before, distance)
    weight = np.exp(-((nearest + second) ** 2) / (2 * sigma**2))
    return np.where(mask == 0, np.rint(255 * weight), 0).astype(np.uint8)


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
