"""Bytes to uint8 arrays and back: decode images and masks, bring scores back to an image's own size.

Legend: H, W height and width in pixels; C channels; K classes (1 for a single logit).
The only place in this package where anything is resized.
"""

from __future__ import annotations

import ctypes
import io
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

from unet_ray.config import IGNORE, MAX_PIXELS, DataConfig, ValueRange

Source = bytes | Image.Image
"""An image as it is encoded, or open; what is open is loaded, never changed."""
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
Image.MAX_IMAGE_PIXELS = None  # ours (`MAX_PIXELS`, --max-pixels) stands in its place
PERCENTILES = (0.5, 99.5)
ROTATED = {5, 6, 7, 8}  # EXIF orientations that swap width and height
ORIENTATION = 0x0112
NPY_MAGIC = b"\x93NUMPY"
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def _silence_libtiff() -> None:
    """Keeps the C library in Pillow's wheels from printing about damaged files; Pillow's own errors tell of them."""
    for library in (Path(PIL.__file__).parents[1] / "pillow.libs").glob("libtiff*"):
        with suppress(OSError, AttributeError):
            ctypes.CDLL(str(library)).TIFFSetErrorHandler(None)


_silence_libtiff()


class ImageError(ValueError):
    """A file that cannot be used as an image or mask; the message says why, without naming the file."""


@contextmanager
def _reading() -> Iterator[None]:
    """Errors of all kinds that reading an odd file raises, as ImageError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd EXIF or large images; what it can't read it raises
            yield
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError("not an image, or of a format that Pillow can't read") from None
    except MemoryError:
        raise ImageError("too large for the memory of this machine") from None
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, … on bad files
        text = re.sub(r" \(\d+ bytes not processed\)", "", " ".join(str(error).split()))  # one reason, not one for each
        raise ImageError(f"cannot be decoded: {text or type(error).__name__}") from None


@contextmanager
def _opened(data: Source, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    if isinstance(data, Image.Image):
        _check_pixels(data.width * data.height, max_pixels)
        with _reading():
            data.load()  # so that a JPEG is no longer made smaller in place by `draft`
            yield data
        return
    if not data:
        raise ImageError("the file is empty")
    with _reading(), Image.open(io.BytesIO(data)) as image:
        _check_pixels(image.width * image.height, max_pixels)
        yield image


def _check_pixels(pixels: int, max_pixels: int) -> None:
    if pixels > max_pixels:
        raise ImageError(f"{pixels} pixels, more than --max-pixels {max_pixels}")


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says; the image itself, not a copy, where that is nothing."""
    return ImageOps.exif_transpose(image) if image.getexif().get(ORIENTATION, 1) != 1 else image


def decode_image(
    data: Source,
    channels: int,
    size_hw: tuple[int, int] | None,
    *,
    value_range: ValueRange = None,
    max_pixels: int = MAX_PIXELS,
) -> tuple[np.ndarray, tuple[int, int]]:
    """An image as uint8 [H,W,C], and the (height, width) it is meant to be seen at.

    EXIF orientation is applied; the first frame of an animation is taken; palettes are looked up, alpha is dropped (or
    kept with 2 or 4 channels), what is not 8 bits is mapped to them as `DataConfig.value_range` says. Arrays (.npy of
    [H,W] or [H,W,C], TIFF of more than four channels) must have as many channels as `channels`. With `size_hw` the
    image is resized (bilinear over all source pixels); a JPEG is then decoded at the smallest of its scales that is at
    least as large (not one that is open already).
    Raises ImageError.
    """
    array = _array(data, channels, max_pixels)
    if array is not None:
        array = _to_8_bits(array, value_range)
        own_size = array.shape[:2]
        if size_hw is not None and own_size != size_hw:
            array = np.dstack([_resized(Image.fromarray(plane), size_hw) for plane in np.moveaxis(array, -1, 0)])
        return array, own_size
    with _opened(data, max_pixels) as image:
        rotated = image.getexif().get(ORIENTATION) in ROTATED
        own_size = image.size if rotated else image.size[::-1]
        if size_hw is not None and image.format == "JPEG":
            # No mode: a gray or CMYK JPEG keeps its own, converted below like every other format.
            image.draft(None, size_hw if rotated else size_hw[::-1])
        seen = _in_mode(image, channels, value_range)
        # Where a fourth channel is data (MRI), Pillow's resize must not take it for transparency, which weighs the
        # others with it: each channel by itself.
        bands = seen.split() if seen.mode in ("LA", "RGBA") else (seen,)
        pixels = [np.asarray(band) if size_hw is None else _resized(band, size_hw) for band in bands]
        array = pixels[0] if len(pixels) == 1 else np.dstack(pixels)
        return (array[..., None] if array.ndim == 2 else array), own_size


def fitted(size_hw: tuple[int, int], side: int) -> tuple[int, int]:
    """The size, made smaller where its longer side is above `side`."""
    scale = min(1.0, side / max(size_hw))
    return max(1, round(size_hw[0] * scale)), max(1, round(size_hw[1] * scale))


def _resized(band: Image.Image, size_hw: tuple[int, int]) -> np.ndarray:
    """uint8 [H,W] or [H,W,C]: Pillow's bilinear resize with `reducing_gap` 2, but for steps of 1 of 255."""
    if band.size == size_hw[::-1]:
        return np.asarray(band)
    if any(have >= 4 * want for have, want in zip(band.size, size_hw[::-1], strict=True)):
        # Made smaller by whole numbers first: nearly the same, far cheaper, and without another copy of a large image.
        return np.asarray(band.resize(size_hw[::-1], Image.Resampling.BILINEAR, reducing_gap=2.0))
    # torch has Pillow's antialiased resize written for AVX2, on one thread: a quarter of the time.
    pixels = torch.from_numpy(np.array(band))
    planes = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
    small = F.interpolate(planes[None], size=size_hw, mode="bilinear", antialias=True)[0]
    return (small[0] if pixels.ndim == 2 else small.permute(1, 2, 0)).numpy()


def _in_mode(image: Image.Image, channels: int, value_range: ValueRange) -> Image.Image:
    """The image upright, 8 bits in each of `channels`."""
    if channels not in MODES:
        raise ImageError(f"{len(image.getbands())} channel(s), the model takes {channels}")
    image.load()
    seen = _upright(image)
    if seen.mode.startswith("I") or seen.mode == "F":  # 16-bit (I;16), Pillow's 32-bit reading of it, floating point
        seen = Image.fromarray(_to_8_bits(np.asarray(seen), value_range))
    elif value_range is not None:
        seen = Image.fromarray(_to_8_bits(np.asarray(seen.convert(MODES[channels])), value_range))
    return seen if seen.mode == MODES[channels] else seen.convert(MODES[channels])


def _to_8_bits(values: np.ndarray, value_range: ValueRange) -> np.ndarray:
    """Stored values as uint8, see `DataConfig.value_range`."""
    if value_range is None:
        if values.dtype == np.uint8:
            return values
        if values.dtype == bool:
            return values.astype(np.uint8) * np.uint8(255)
        if values.dtype.kind not in "iu":
            raise ImageError("floating-point pixels: train with --set data.value_range='[LOWEST, HIGHEST]'")
        if values.max(initial=0) > 65535 or values.min(initial=0) < 0:
            raise ImageError("its values are beyond 16 bits")
        return (values >> 8).astype(np.uint8)
    if value_range == "percentiles":
        low, high = (float(v) for v in np.percentile(values[:: max(1, len(values) // 1024)], PERCENTILES))
    else:
        low, high = value_range
    scaled = (values.astype(np.float32) - low) * (255 / max(high - low, 1e-12))
    return np.rint(np.clip(np.nan_to_num(scaled), 0, 255)).astype(np.uint8)


def _array(data: Source, channels: int, max_pixels: int) -> np.ndarray | None:
    """[H,W,C] of a .npy file, or of a TIFF with more channels than Pillow knows; None for all else."""
    if isinstance(data, Image.Image):
        return None
    if data.startswith(NPY_MAGIC):
        with _reading():
            values = np.load(io.BytesIO(data), allow_pickle=False)
    elif data.startswith(TIFF_MAGIC) and channels not in MODES:
        with _reading():
            values = _tiff_channels_last(data)
    else:
        return None
    if values.ndim == 2:
        values = values[..., None]
    if values.ndim != 3 or not values.size or values.dtype.kind not in "biuf":
        raise ImageError(f"an array {[*values.shape]} of {values.dtype}: numbers [height, width, channels] are needed")
    _check_pixels(values.shape[0] * values.shape[1], max_pixels)
    if values.shape[-1] != channels:
        raise ImageError(f"{values.shape[-1]} channel(s), the model takes {channels}")
    return values


def _tiff_channels_last(data: bytes) -> np.ndarray:
    try:
        import tifffile
    except ImportError:
        raise ImageError("a TIFF with many channels: install tifffile (the extra `tiff`)") from None
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        series = file.series[0]
        values, axes = series.asarray(), series.axes
    spatial = [axes.index("Y"), axes.index("X")]
    others = [axis for axis in range(values.ndim) if axis not in spatial]
    values = values.transpose(*spatial, *others)
    return values.reshape(*values.shape[:2], -1)


class Pixels:
    """An image at its own size, from which windows are cut without a copy of the whole.

    Raises ImageError, also from `window`.
    """

    def __init__(self, data: Source, channels: int, value_range: ValueRange, max_pixels: int) -> None:
        self.array = _array(data, channels, max_pixels)
        if self.array is not None:
            self.array = _to_8_bits(self.array, value_range)
            self.size_hw: tuple[int, int] = self.array.shape[:2]
        else:
            with _opened(data, max_pixels) as image:
                # Pillow's own memory, which outlives the file; as an array it would be there twice.
                self.image = _in_mode(image, channels, value_range)
            self.size_hw = self.image.size[::-1]

    def window(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """uint8 [len(rows),len(columns),C] at these positions, which lie close together and may repeat."""
        top, left = int(rows.min()), int(columns.min())
        bottom, right = int(rows.max()) + 1, int(columns.max()) + 1
        if self.array is not None:
            part = self.array[top:bottom, left:right]
        else:
            part = np.asarray(self.image.crop((left, top, right, bottom)))
            part = part[..., None] if part.ndim == 2 else part
        return part[rows - top][:, columns - left]


def stored_values(data: bytes) -> np.ndarray:
    """A mask file's values as they are stored, integers [H,W]: palette indices, gray levels, or 0/1 of a 1-bit mask.

    Colour with three equal channels is gray. EXIF orientation is applied. Raises ImageError.
    """
    values = _array(data, 1, MAX_PIXELS)
    if values is not None:
        if values.dtype.kind == "f":
            raise ImageError("a mask with floating-point values: store class ids, 0/255 or a palette")
        return values[..., 0].astype(np.uint8) if values.dtype == bool else values[..., 0]
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
    # One class at a time: K planes at full size would be K times the memory.
    return decide((_plane(plane, size_hw) for plane in logits_KHW), len(logits_KHW), threshold)


def decide(planes: Iterable[np.ndarray], count: int, threshold: float) -> np.ndarray:
    """Class ids, uint8 [H,W], from `count` planes of float logits [H,W]."""
    planes = iter(planes)
    best = next(planes)
    if count == 1:
        return (best > np.log(threshold / (1 - threshold))).view(np.uint8)
    ids = np.zeros(best.shape, np.uint8)
    for class_id, candidate in enumerate(planes, start=1):
        better = candidate > best
        ids[better] = class_id
        best = np.where(better, candidate, best)
    return ids


def probabilities(logits_KHW: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """uint8 [K,H,W] at `size_hw` from float logits [K,H,W]: 255 is certain. K = 1: sigmoid, K > 1: softmax."""
    return to_probabilities(np.stack([_plane(plane, size_hw) for plane in logits_KHW]))


def to_probabilities(logits_KHW: np.ndarray) -> np.ndarray:
    """uint8 [K,H,W] of float32 logits [K,H,W]."""
    if len(logits_KHW) == 1:
        share = 0.5 + 0.5 * np.tanh(logits_KHW / 2)  # the sigmoid, without overflow
    else:
        share = np.exp(logits_KHW - logits_KHW.max(axis=0))
        share /= share.sum(axis=0)
    return np.rint(255 * share).astype(np.uint8)


def _plane(plane: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    plane = np.ascontiguousarray(plane, np.float32)
    if plane.shape == size_hw:
        return plane
    smaller = size_hw[0] < plane.shape[0] or size_hw[1] < plane.shape[1]
    scores = torch.from_numpy(plane)[None, None]
    return F.interpolate(scores, size=size_hw, mode="bilinear", antialias=smaller)[0, 0].numpy()
