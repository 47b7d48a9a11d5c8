"""How a mask is stored and what it says: the values of a mask file, weights drawn from masks, masks as PNG."""

from __future__ import annotations

import colorsys
import functools
import io
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from unet_ray import storage
from unet_ray.config import IGNORE, Cleanup, DataConfig, UserError
from unet_ray.imaging import ImageError, decode_mask, stored_values

FOREGROUND = (0, 230, 80)
"""Colour of the one class in overlays: rare in photographs and in stained tissue."""
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
ZLIB_LEVEL = 6
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
    from scipy import ndimage  # here, as in `clean`: most predictions need none, and start sooner

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
    # Written here: Pillow tries every filter on every line, which masks only grow by, and takes four times as long.
    height, width = mask.shape
    pixels = np.packbits(mask, axis=1) if num_classes == 1 else mask
    lines = np.zeros((height, 1 + pixels.shape[1]), np.uint8)  # each begins with its filter, 0
    lines[:, 1:] = pixels
    header = struct.pack(">IIBBBBB", width, height, *((1, 0) if num_classes == 1 else (8, 3)), 0, 0, 0)
    colours = [] if num_classes == 1 else [(b"PLTE", palette())]
    chunks = [(b"IHDR", header), *colours, (b"IDAT", zlib.compress(lines.data, ZLIB_LEVEL)), (b"IEND", b"")]
    return PNG_SIGNATURE + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def pixel_counts(mask: np.ndarray, classes: int) -> list[int]:
    """Pixels of each class id, of uint8 [H,W]."""
    if classes == 2:
        foreground = int(np.count_nonzero(mask))
        return [mask.size - foreground, foreground]
    # Line by line: bincount makes 8 bytes of each of its pixels.
    return np.sum([np.bincount(line, minlength=classes) for line in mask], axis=0).tolist()


def encode_gray(values: np.ndarray) -> bytes:
    """uint8 [H,W] as an 8-bit gray PNG."""
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG")
    return stream.getvalue()


def row_runs(mask: np.ndarray) -> str:
    """Run lengths as Kaggle's Carvana challenge took them: `start length start length …` of the pixels that are not 0,
    from left to right, then from top to bottom, the first pixel being 1. Empty for an empty mask."""
    runs = _run_starts(mask.reshape(-1))
    pairs = runs.copy()
    pairs[0::2] += 1
    pairs[1::2] = runs[1::2] - runs[0::2]
    return " ".join(map(str, pairs.tolist()))


def coco_runs(mask: np.ndarray) -> str:
    """COCO's compressed run lengths of the pixels that are not 0, uint8 or bool [H,W]: what pycocotools calls `counts`.

    Runs go down the columns and begin with one of zeros; from the fourth on each is told as the difference to the one
    before the last; five bits a character, low ones first.
    """
    flat = np.ascontiguousarray(mask.T).reshape(-1)
    counts = np.diff(np.concatenate([[0], _run_starts(flat), [flat.size]]))
    if counts[-1] == 0 and len(counts) > 1:
        counts = counts[:-1]
    values = counts.copy()
    values[3:] -= counts[1:-2]
    shifts = 5 * np.arange(8)
    digits = (values[:, None] >> shifts) & 31
    # As many digits as hold the value and its sign.
    limit = 16 << shifts
    length = 1 + ((values[:, None] >= limit) | (values[:, None] < -limit)).sum(axis=1)
    place = np.arange(8)
    characters = digits + 48 + 32 * (place < length[:, None] - 1)
    return characters[place < length[:, None]].astype(np.uint8).tobytes().decode("ascii")


def coco_region(region: np.ndarray) -> dict[str, Any]:
    """`bbox` and `counts` of the pixels that are True, bool [H,W], of which there must be one at least."""
    return {"bbox": box(region), "counts": coco_runs(region)}


def box(region: np.ndarray) -> list[int]:
    """[left, top, width, height] of the pixels that are True, of which there must be one at least."""
    rows, columns = (np.flatnonzero(region.any(axis=axis)) for axis in (1, 0))
    left, top = int(columns[0]), int(rows[0])
    return [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top]


def _run_starts(flat: np.ndarray) -> np.ndarray:
    """Positions where a run of non-zeros begins and where it ends, by turns, int64 of even length."""
    inside = flat.view(bool) if flat.dtype == bool else flat != 0
    edges = np.flatnonzero(inside[1:] != inside[:-1]) + 1
    return np.concatenate([[0] * bool(inside[:1].any()), edges, [flat.size] * bool(inside[-1:].any())]).astype(np.int64)


def clean(mask: np.ndarray, cleanup: Cleanup) -> np.ndarray:
    """Class ids, uint8 [H,W], after clean-up; `mask` itself is left as it is."""
    from scipy import ndimage

    cleaned = mask.copy()
    least = max(cleanup.min_area, cleanup.min_share * mask.size)
    for class_id in set(np.unique(mask).tolist()) - {0}:
        if least or cleanup.largest:
            labels, count = ndimage.label(mask == class_id)
            areas = np.bincount(labels.ravel(), minlength=count + 1)
            stays = areas >= least
            if cleanup.largest:
                stays &= np.arange(count + 1) == 1 + areas[1:].argmax()
            stays[0] = True
            cleaned[~stays[labels]] = 0
    if cleanup.holes:
        for class_id in set(np.unique(cleaned).tolist()) - {0}:
            filled = ndimage.binary_fill_holes(cleaned == class_id)
            cleaned[filled & (cleaned == 0)] = class_id
    return cleaned


def overlay(picture: np.ndarray, mask: np.ndarray, num_classes: int) -> bytes:
    """The picture, uint8 [H,W,3], with class ids [h,w] of any size drawn over it in colours, their edges in full."""
    height, width = picture.shape[:2]
    ids = np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
    colours = np.frombuffer(palette(), np.uint8).reshape(256, 3)
    if num_classes == 1:
        colours = np.array([(0, 0, 0), FOREGROUND], np.uint8)
    shown = ids > 0 if num_classes == 1 else np.ones_like(ids, bool)
    edge = np.zeros_like(shown)
    edge[:-1] |= ids[:-1] != ids[1:]
    edge[:, :-1] |= ids[:, :-1] != ids[:, 1:]
    strength = np.where(edge, 1.0, np.where(shown, 0.4, 0.0))[..., None]
    # An edge belongs to the class above or left of it; where that is background, the colour is the other's.
    colour_of = np.where(edge & (ids == 0), np.maximum(np.roll(ids, -1, 0), np.roll(ids, -1, 1)), ids)
    blended = picture * (1 - strength) + colours[colour_of] * strength
    stream = io.BytesIO()
    Image.fromarray(np.rint(blended).astype(np.uint8)).save(stream, "JPEG", quality=85)
    return stream.getvalue()


@functools.cache
def palette() -> bytes:
    """256 colours: black for class 0, then hues a golden angle apart, so that neighbouring ids differ clearly."""
    colours = [(0.0, 0.0, 0.0)]
    for class_id in range(1, 256):
        lightness = (0.95, 0.7, 0.5)[class_id % 3]
        colours.append(colorsys.hsv_to_rgb(class_id * 0.618034 % 1, 0.75, lightness))
    return bytes(round(255 * value) for colour in colours for value in colour)
