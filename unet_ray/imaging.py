"""Bytes to uint8 arrays and back: decode images and masks, bring scores back to an image's own size.

Legend: H, W height and width in pixels; C channels; K classes (1 for a single logit).
The only place in this package where anything is resized.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from unet_ray.config import IGNORE, DataConfig

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
_ROTATED = {5, 6, 7, 8}  # EXIF orientations that swap width and height
_ORIENTATION = 0x0112


class ImageError(ValueError):
    """A file that cannot be used as an image or mask; the message says why, without naming the file."""


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """The image, its errors of all kinds as ImageError."""
    if not data:
        raise ImageError("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd EXIF or large images; what it can't read it raises
            with Image.open(io.BytesIO(data)) as image:
                yield image
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError("not an image, or of a format that Pillow can't read") from None
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, … on bad files
        raise ImageError(f"cannot be decoded: {' '.join(str(error).split()) or type(error).__name__}") from None


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says; the image itself, not a copy, where that is nothing."""
    return ImageOps.exif_transpose(image) if image.getexif().get(_ORIENTATION, 1) != 1 else image


def decode_image(data: bytes, channels: int, size_hw: tuple[int, int] | None) -> tuple[np.ndarray, tuple[int, int]]:
    """An encoded image as uint8 [H,W,C], and the (height, width) it is meant to be seen at.

    EXIF orientation is applied; the first frame of an animation is taken; palettes are looked up, alpha is dropped (or
    kept with 2 or 4 channels), 16-bit values keep their high byte. With `size_hw` the image is resized (bilinear over
    all source pixels); a JPEG is then decoded at the smallest of its scales that is at least as large.
    Raises ImageError.
    """
    with _opened(data) as image:
        rotated = image.getexif().get(_ORIENTATION) in _ROTATED
        own_size = image.size if rotated else image.size[::-1]
        mode = MODES[channels]
        if size_hw is not None and image.format == "JPEG":
            # No mode: a gray or CMYK JPEG keeps its own, converted below like every other format.
            image.draft(None, size_hw if rotated else size_hw[::-1])
        image.load()
        seen = _upright(image)
        if seen.mode.startswith("I"):  # 16-bit (I;16) and Pillow's 32-bit reading of it
            values = np.asarray(seen)
            if values.max(initial=0) > 65535 or values.min(initial=0) < 0:
                raise ImageError("its values are beyond 16 bits")
            seen = Image.fromarray((values >> 8).astype(np.uint8))
        elif seen.mode == "F":
            raise ImageError("floating-point pixels: store 8 or 16 bits")
        if seen.mode != mode:
            seen = seen.convert(mode)
        # Where a fourth channel is data (MRI), Pillow's resize must not take it for transparency, which weighs the
        # others with it: each channel by itself.
        bands = seen.split() if mode in ("LA", "RGBA") else (seen,)
        if size_hw is not None and seen.size != size_hw[::-1]:
            bands = tuple(b.resize(size_hw[::-1], Image.Resampling.BILINEAR, reducing_gap=2.0) for b in bands)
        array = np.asarray(bands[0]) if len(bands) == 1 else np.dstack([np.asarray(band) for band in bands])
        return (array[..., None] if array.ndim == 2 else array), own_size


def stored_values(data: bytes) -> np.ndarray:
    """A mask file's values as they are stored, integers [H,W]: palette indices, gray levels, or 0/1 of a 1-bit mask.

    Colour with three equal channels is gray. EXIF orientation is applied. Raises ImageError.
    """
    with _opened(data) as image:
        image.load()
        mask = _upright(image)
        if mask.mode in ("RGB", "RGBA", "LA", "CMYK", "YCbCr"):
            bands = np.asarray(mask if mask.mode == "LA" else mask.convert("RGB"))
            if mask.mode != "LA" and (bands.min(axis=-1) != bands.max(axis=-1)).any():
                raise ImageError("a mask in colours: store class ids, 0/255 or a palette")
            return bands[..., 0]
        values = np.asarray(mask)
        if values.dtype.kind == "f":
            raise ImageError("a mask with floating-point values: store class ids, 0/255 or a palette")
        return values.astype(np.uint8) if values.dtype == bool else values


def decode_mask(data: bytes, config: DataConfig, size_hw: tuple[int, int] | None) -> tuple[np.ndarray, tuple[int, int]]:
    """An encoded mask as class ids, uint8 [H,W] with `IGNORE` where it says so, and its own (height, width).

    `config.mask_values` (not None here) says which stored value is which class. Resized by nearest neighbour, so
    that no value appears which was not in the file. Raises ImageError, also for a value that is no class.
    """
    assert config.mask_values is not None, "resolve mask_values first: see masks.infer_values"
    values = stored_values(data)
    own_size = (values.shape[0], values.shape[1])
    wanted = [*config.mask_values] + ([] if config.ignore_index is None else [config.ignore_index])
    ids = [*range(len(config.mask_values))] + ([] if config.ignore_index is None else [IGNORE])
    if values.dtype != np.uint8 and values.size and not 0 <= int(values.min()) <= int(values.max()) < 2**16:
        raise ImageError(f"mask values from {values.min()} to {values.max()}: 0 to 65535 can be class values")
    # Checked at full size: a stray value must not hide between the sampled pixels.
    lookup = np.full(2**8 if values.dtype == np.uint8 else 2**16, -1, np.int16)
    lookup[wanted] = ids
    classes = lookup[values]
    if classes.min(initial=0) < 0:
        strange = np.unique(values[classes < 0])
        shown = ", ".join(map(str, strange[:5])) + (" …" if len(strange) > 5 else "")
        raise ImageError(f"mask value(s) {shown} outside the classes (data.mask_values {[*config.mask_values]})")
    mask = classes.astype(np.uint8)
    if size_hw is not None and own_size != size_hw:
        mask = np.asarray(Image.fromarray(mask).resize(size_hw[::-1], Image.Resampling.NEAREST))
    return mask, own_size


def to_own_size(logits_KHW: np.ndarray, size_hw: tuple[int, int], threshold: float) -> np.ndarray:
    """Class ids, uint8 at `size_hw`, from float logits [K,H,W]: interpolated bilinearly first, decided last.

    K = 1: class 1 where the sigmoid is above `threshold`. K > 1: the class of the highest logit.
    """
    height, width = size_hw

    def resized(plane: np.ndarray) -> np.ndarray:
        plane = np.ascontiguousarray(plane, np.float32)
        if plane.shape == size_hw:
            return plane
        return np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.BILINEAR))

    if len(logits_KHW) == 1:
        return (resized(logits_KHW[0]) > np.log(threshold / (1 - threshold))).view(np.uint8)
    # One class at a time: K planes at full size would be K times the memory.
    best = resized(logits_KHW[0])
    ids = np.zeros(size_hw, np.uint8)
    for class_id, plane in enumerate(logits_KHW[1:], start=1):
        candidate = resized(plane)
        better = candidate > best
        ids[better] = class_id
        best = np.where(better, candidate, best)
    return ids
