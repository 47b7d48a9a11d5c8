"""Reads the pixels of a pair, and keeps the facts that the checks need."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from unet_ray.config import ValueRange
from unet_ray.data import imaging, mask_files
from unet_ray.data.imaging import ImageError
from unet_ray.data.pairs import Pair
from unet_ray.doctor.files import LOOK, Header

THUMB = 32
SAME = 0.9
"""An image and a mask with a higher correlation are taken for the same image."""
MOST_OBJECTS = 2000
PHOTOGRAPH = 32
"""A mask with more values may be the image."""


@dataclass(slots=True, eq=False)
class Look:
    """The facts about the pixels of a pair that the checks need."""

    pair: Pair
    image: Header
    mask: Header
    digest: bytes = b""
    """SHA-256 of the image's file."""
    mask_digest: bytes = b""
    """SHA-256 of the mask's file."""
    lowest: tuple[int, ...] = ()
    """Lowest value of each channel, in the image resized to a side of `LOOK`."""
    highest: tuple[int, ...] = ()
    """Highest value of each channel there."""
    constant: bool = False
    """All pixels are equal."""
    gray: bool = False
    """The channels are equal."""
    range: tuple[float, float] | None = None
    """0.5th and 99.5th percentile, of images with more than 8 bits."""
    thumb: np.ndarray = field(default_factory=lambda: np.zeros((THUMB, THUMB), np.float32))
    """The image in gray at a side of `THUMB`, minus its mean."""
    counts: dict[int, int] = field(default_factory=dict)
    """Stored value of the mask -> pixels; empty if its values can't be classes."""
    colours: dict[tuple[int, ...], int] = field(default_factory=dict)
    """Colour of the mask -> pixels, if it is in colours or has a palette."""
    palette: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """Index -> colour, of the indices that occur, if the mask has a palette."""
    numbers_objects: bool | None = None
    """Whether the values are 1, 2, … and each is one connected region; None: there are none but 0."""
    no_mask: str = ""
    """Code of the finding if the file can't be a mask."""


def look_at(pair: Pair, headers: Mapping[str, Header]) -> Look:
    """Reads and decodes a pair. If that fails, it records the damage in the header; the result must not be used."""
    look = Look(pair, headers[pair.image], headers[mask_files.first_file(pair.mask)])
    header = look.image
    try:
        data = imaging.read_file(pair.image)
        picture = _look_at_image(look, data)
        header = look.mask
        for file in mask_files.files_of(pair.mask):
            _look_at_mask(look, data, imaging.read_file(file), picture)
    except (ImageError, OSError, ValueError) as reason:
        header.damaged(reason)
    return look


def values_of(looks: Iterable[Look]) -> set[int]:
    """Returns all stored values of the masks."""
    return {value for look in looks for value in look.counts}


def gray_levels(path: str) -> int:
    """Counts the gray levels of an image, or of the first file of a mask; 0 if it can't be read."""
    try:
        data = imaging.read_file(mask_files.first_file(path))
        return len(np.unique(imaging.decode_image(data, 1, None, value_range="percentiles")[0]))
    except (ImageError, OSError):
        return 0


def _look_at_image(look: Look, data: bytes) -> np.ndarray:
    """Fills in the fields about the image. Returns it in gray, float32 [LOOK,LOOK]."""
    header = look.image
    channels = header.channels if header.array else 1 if header.channels < 3 else 3
    value_range: ValueRange = None if header.depth == "8" else "percentiles"
    array, _ = imaging.decode_image(data, channels, (LOOK, LOOK), value_range=value_range)
    if header.depth != "8":
        values = _stored(data)
        low, high = np.nanpercentile(values[:: max(1, len(values) // 256)], imaging.PERCENTILES)
        look.range = (float(low), float(high))
    look.digest = hashlib.sha256(data).digest()
    look.lowest, look.highest = tuple(array.min(axis=(0, 1)).tolist()), tuple(array.max(axis=(0, 1)).tolist())
    if look.lowest == look.highest:  # a few pixels may differ at full size
        whole, _ = imaging.decode_image(data, channels, None, value_range=value_range)
        look.constant = bool((whole == whole[:1, :1]).all())
    # JPEG makes channels of a gray image differ by a few steps.
    look.gray = channels != 3 or int(np.ptp(array, axis=2).max()) <= 4
    picture = array.mean(axis=2, dtype=np.float32)
    thumb = _smaller(picture)
    look.thumb = thumb - thumb.mean()
    return picture


def _look_at_mask(look: Look, image: bytes, data: bytes, picture: np.ndarray) -> None:
    """Fills in the fields about the mask."""
    header = look.mask
    look.mask_digest = hashlib.sha256(look.mask_digest + data).digest()
    if data == image:
        look.no_mask = "mask-is-the-image"
        return
    try:
        stored = imaging.stored_values(data)
        if stored.dtype == np.uint8:  # counting takes a fifth of the time of sorting
            counts = np.bincount(stored.ravel(), minlength=256)
            values = np.flatnonzero(counts)
            numbers = counts[values]
        else:
            values, numbers = np.unique(stored, return_counts=True)
    except ImageError:
        if header.depth == "float":
            look.no_mask = "floating-point-masks"
            return
        if header.array or header.mode not in ("RGB", "RGBA", "CMYK", "YCbCr"):
            raise
        look.colours = _colours(data)
        look.no_mask = "masks-in-colours"
    else:
        if values[-1] >= 2**16:
            look.no_mask = "mask-values-beyond-16-bits"
            return
        for value, count in zip(values.tolist(), numbers.tolist(), strict=True):
            look.counts[value] = look.counts.get(value, 0) + count
        look.numbers_objects = _numbers_objects(stored, values)
        _look_at_palette(look, data, values)
    many = max(len(look.colours), len(look.counts)) > PHOTOGRAPH
    if many and _same_picture(picture, imaging.decode_image(data, 1, (LOOK, LOOK))[0]):
        look.counts, look.no_mask = {}, "mask-is-the-image"


def _colours(data: bytes) -> dict[tuple[int, ...], int]:
    """Returns colour -> pixels."""
    with Image.open(io.BytesIO(data)) as opened:
        return {colour: count for count, colour in opened.convert("RGB").getcolors(2**24) or []}


def _look_at_palette(look: Look, data: bytes, values: np.ndarray) -> None:
    """Fills in the fields about a mask's palette, if it has one."""
    if look.mask.mode != "P":
        return
    with Image.open(io.BytesIO(data)) as opened:
        palette = opened.getpalette("RGB") or []
    known = {v: tuple(palette[3 * v : 3 * v + 3]) for v in values.tolist() if 3 * v + 3 <= len(palette)}
    look.palette |= known
    for value, colour in known.items():
        look.colours[colour] = look.colours.get(colour, 0) + look.counts[value]


def _numbers_objects(stored: np.ndarray, values: np.ndarray) -> bool | None:
    """Returns `Look.numbers_objects`."""
    from scipy import ndimage

    numbers = values[values != 0]
    if not len(numbers):
        return None
    if numbers[0] != 1 or numbers[-1] != len(numbers) or len(numbers) > MOST_OBJECTS:
        return False
    if len(numbers) == 1:
        return True
    # Corners count as connected, since thin objects are often connected by them alone.
    regions = ndimage.find_objects(stored.astype(np.int32))
    corners = np.ones((3, 3))
    return all(
        ndimage.label(stored[box] == number, corners)[1] == 1
        for number, box in enumerate(regions, 1)
        if box is not None
    )


def _same_picture(image: np.ndarray, mask: np.ndarray) -> bool:
    """Returns whether a mask with as many values as a photograph is the image, saved again."""
    pictures = (image, mask[..., 0].astype(np.float32))
    coarse = [_smaller(picture) for picture in pictures]
    # The fine texture must match too, because an object on a plain ground looks like its own mask.
    fine = [p - np.kron(c, np.ones((LOOK // THUMB,) * 2)) for p, c in zip(pictures, coarse, strict=True)]
    return all(
        min(one.std(), other.std()) > 1e-3 and np.corrcoef(one.ravel(), other.ravel())[0, 1] > SAME
        for one, other in (coarse, fine)
    )


def _smaller(picture: np.ndarray) -> np.ndarray:
    """Reduces [LOOK,LOOK] to [THUMB,THUMB]."""
    return picture.reshape(THUMB, LOOK // THUMB, THUMB, LOOK // THUMB).mean(axis=(1, 3))


def _stored(data: bytes) -> np.ndarray:
    """Reads the stored values of an image with more than 8 bits."""
    if data.startswith(imaging.NPY_MAGIC):
        return np.load(io.BytesIO(data), allow_pickle=False)
    if data.startswith(imaging.TIFF_MAGIC):
        import tifffile

        return tifffile.imread(io.BytesIO(data), key=0)
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)
