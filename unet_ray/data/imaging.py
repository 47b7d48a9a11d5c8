"""Decodes images and masks to uint8 arrays, and resizes scores to an image's own size.

Legend: H, W height and width in pixels; C channels; K classes (1 for a single logit).
Only this module resizes images and masks for the network.
"""

from __future__ import annotations

import ctypes
import io
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

from unet_ray.config import IGNORE, MAX_PIXELS, DataConfig, ValueRange
from unet_ray.data import headers
from unet_ray.data.headers import NPY_MAGIC, TIFF_MAGIC, ImageError

Source = bytes | Image.Image
"""The bytes of an image file, or an open image, which is loaded but never changed."""
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
"""Channels -> Pillow's mode."""
PERCENTILES = (0.5, 99.5)
ROTATED = {5, 6, 7, 8}  # EXIF orientations that swap width and height
ORIENTATION = 0x0112


def _setter_of_libtiff() -> Callable[[int | None], int | None]:
    """Returns the function that sets what the C library in Pillow's wheels calls to print errors; it returns the former
    one, as an address."""
    for library in (Path(PIL.__file__).parents[1] / "pillow.libs").glob("libtiff*"):
        with suppress(OSError, AttributeError):
            setter = ctypes.CDLL(str(library)).TIFFSetErrorHandler
            setter.restype, setter.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
            return setter
    return lambda former: former


_set_libtiff = _setter_of_libtiff()
_lock = threading.Lock()
_inside = 0  # `without_pillows_limit` blocks that run now, in all threads
_former: Any = None  # what the last of them puts back


@contextmanager
def without_pillows_limit() -> Iterator[None]:
    """Lifts Pillow's own limit for a `with` block, since --max-pixels (`MAX_PIXELS`) replaces it, and hides warnings
    and what libtiff prints about damaged files, which Pillow's errors report.

    All three belong to the whole process, which may be a host's: the last block to end, of those that run in several
    threads, puts them back.
    """
    global _inside, _former
    with _lock:
        if _inside == 0:
            quiet = warnings.catch_warnings()
            quiet.__enter__()
            warnings.simplefilter("ignore")  # about odd EXIF data; Pillow raises if it can't read an image
            _former = quiet, Image.MAX_IMAGE_PIXELS, _set_libtiff(None)
            Image.MAX_IMAGE_PIXELS = None
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                quiet, Image.MAX_IMAGE_PIXELS, printer = _former
                _set_libtiff(printer)
                quiet.__exit__(None, None, None)


@contextmanager
def _reading() -> Iterator[None]:
    """Turns all errors that reading a file raises into ImageError."""
    try:
        with without_pillows_limit():
            yield
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError("not an image, or of a format that Pillow can't read") from None
    except MemoryError:
        raise ImageError("too large for the memory of this machine") from None
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, … on bad files
        text = re.sub(r" \(\d+ bytes not processed\)", "", " ".join(str(error).split()))  # so equal errors read alike
        raise ImageError(f"cannot be decoded: {text or type(error).__name__}") from None


def read_file(location: str, max_pixels: int = MAX_PIXELS) -> bytes:
    """Reads an encoded image or mask, see `headers.read_file`. Raises OSError, ImageError."""
    return headers.read_file(location, max_pixels)


@contextmanager
def _opened(data: Source, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    if isinstance(data, Image.Image):
        headers.check_pixels(data.width * data.height, max_pixels)
        with _reading():
            data.load()  # `draft` can't make a loaded JPEG smaller in place
            yield data
        return
    headers.check_encoded(data)
    with _reading(), Image.open(io.BytesIO(data)) as image:
        headers.check_pixels(image.width * image.height, max_pixels)
        yield image


def _upright(image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation to an image. Returns the image itself, not a copy, if it is upright."""
    return ImageOps.exif_transpose(image) if image.getexif().get(ORIENTATION, 1) != 1 else image


def decode_image(
    data: Source,
    channels: int,
    size_hw: tuple[int, int] | None,
    *,
    value_range: ValueRange = None,
    max_pixels: int = MAX_PIXELS,
) -> tuple[np.ndarray, tuple[int, int]]:
    """Decodes an image to uint8 [H,W,C], and returns it with its own (height, width) after EXIF orientation.

    Takes the first frame of an animation, looks up palette colours, drops alpha (keeps it with 2 or 4 channels), and
    maps other values to 8 bits by `DataConfig.value_range`. Arrays (.npy of [H,W] or [H,W,C], TIFF of more than four
    channels) must have exactly `channels` channels. `size_hw` resizes the image (bilinear over all source pixels);
    a JPEG is then decoded at its smallest scale that is at least as large, unless it is open already. Raises
    ImageError.
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
            # The mode is None: a gray or CMYK JPEG keeps its own, which is converted below as in every other format.
            # torchvision's decode_jpeg has no such scales and takes 7.1 instead of 5.2 ms from 1918x1280 to 512.
            image.draft(None, size_hw if rotated else size_hw[::-1])
        seen = _in_mode(image, channels, value_range)
        # A fourth channel may be data (MRI). Pillow's resize would take it for transparency and weigh the others with
        # it, so each channel is resized separately.
        bands = seen.split() if seen.mode in ("LA", "RGBA") else (seen,)
        pixels = [np.asarray(band) if size_hw is None else _resized(band, size_hw) for band in bands]
        array = pixels[0] if len(pixels) == 1 else np.dstack(pixels)
        return (array[..., None] if array.ndim == 2 else array), own_size


def fitted(size_hw: tuple[int, int], side: int) -> tuple[int, int]:
    """Returns the (height, width), scaled down if the longer side is above `side`."""
    scale = min(1.0, side / max(size_hw))
    return max(1, round(size_hw[0] * scale)), max(1, round(size_hw[1] * scale))


def _resized(band: Image.Image, size_hw: tuple[int, int]) -> np.ndarray:
    """Resizes to uint8 [H,W] or [H,W,C]; differs from Pillow's bilinear with `reducing_gap` 2 by at most 1 of 255.

    torchvision's v2 resize calls the same F.interpolate and gives equal bytes. It takes 12.1 instead of 11.3 ms from
    1918x1280 to 512, and 1.4 s of CPU to import.
    """
    if band.size == size_hw[::-1]:
        return np.asarray(band)
    if any(have >= 4 * want for have, want in zip(band.size, size_hw[::-1], strict=True)):
        # Pillow first reduces by a whole number: nearly the same result, far faster, and no copy of a large image.
        return np.asarray(band.resize(size_hw[::-1], Image.Resampling.BILINEAR, reducing_gap=2.0))
    # torch has Pillow's antialiased resize in AVX2, which takes a quarter of the time on one thread.
    pixels = torch.from_numpy(np.array(band))
    planes = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
    small = F.interpolate(planes[None], size=size_hw, mode="bilinear", antialias=True)[0]
    return (small[0] if pixels.ndim == 2 else small.permute(1, 2, 0)).numpy()


def _in_mode(image: Image.Image, channels: int, value_range: ValueRange) -> Image.Image:
    """Converts an image to 8 bits and `channels` channels, and turns it upright. Raises ImageError."""
    if channels not in MODES:
        raise ImageError(f"{len(image.getbands())} channel(s), the model takes {channels}")
    image.load()
    seen = _upright(image)
    if seen.mode.startswith("I") or seen.mode == "F":  # 16-bit (I;16, or 32-bit as Pillow reads some), floating point
        seen = Image.fromarray(_to_8_bits(np.asarray(seen), value_range))
    elif value_range is not None:
        seen = Image.fromarray(_to_8_bits(np.asarray(seen.convert(MODES[channels])), value_range))
    return seen if seen.mode == MODES[channels] else seen.convert(MODES[channels])


def _to_8_bits(values: np.ndarray, value_range: ValueRange) -> np.ndarray:
    """Maps stored values to uint8, see `DataConfig.value_range`. Raises ImageError."""
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
    """Reads [H,W,C] of a .npy file, or of a TIFF with more channels than Pillow knows; None for all other files."""
    if isinstance(data, Image.Image):
        return None
    if data.startswith(NPY_MAGIC):
        with _reading():
            headers.check_npy(data, channels, max_pixels)
            values = np.load(io.BytesIO(data), allow_pickle=False)
    elif data.startswith(TIFF_MAGIC) and channels not in MODES:
        with _reading():
            values = _tiff_channels_last(data, channels, max_pixels)
    else:
        return None
    return values[..., None] if values.ndim == 2 else values


def _tiff_channels_last(data: bytes, channels: int, max_pixels: int) -> np.ndarray:
    """Reads a TIFF with any axes as [H,W,C]; all axes except X and Y become channels."""
    try:
        import tifffile
    except ImportError:
        raise ImageError("a TIFF with many channels: install tifffile (the extra `tiff`)") from None
    headers.check_tiff_pages(data)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        series = file.series[0]
        headers.check_tiff_series(series, channels, max_pixels)
        values, axes = series.asarray(), series.axes
    spatial = [axes.index("Y"), axes.index("X")]
    others = [axis for axis in range(values.ndim) if axis not in spatial]
    values = values.transpose(*spatial, *others)
    return values.reshape(*values.shape[:2], -1)


class Pixels:
    """Holds an image at its own size. `window` cuts out a part without copying the whole. Both raise ImageError."""

    def __init__(self, data: Source, channels: int, value_range: ValueRange, max_pixels: int) -> None:
        self.array = _array(data, channels, max_pixels)
        if self.array is not None:
            self.array = _to_8_bits(self.array, value_range)
            self.size_hw: tuple[int, int] = self.array.shape[:2]
        else:
            with _opened(data, max_pixels) as image:
                # Pixels stay in Pillow's memory, which outlives the file; an array would be a second copy.
                self.image = _in_mode(image, channels, value_range)
            self.size_hw = self.image.size[::-1]

    def window(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Cuts uint8 [len(rows),len(columns),C] at these positions, which are close together and may repeat."""
        top, left = int(rows.min()), int(columns.min())
        bottom, right = int(rows.max()) + 1, int(columns.max()) + 1
        if self.array is not None:
            part = self.array[top:bottom, left:right]
        else:
            with without_pillows_limit():
                part = np.asarray(self.image.crop((left, top, right, bottom)))
            part = part[..., None] if part.ndim == 2 else part
        return part[rows - top][:, columns - left]


def stored_values(data: bytes) -> np.ndarray:
    """Reads a mask file's stored values, integers [H,W]: palette indices, gray levels, or 0/1 of a 1-bit mask.

    Colours with three equal channels count as gray. EXIF orientation is applied. Raises ImageError.
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
    """Decodes a mask to class ids, uint8 [H,W], and returns it with its own (height, width).

    `config.mask_values` (not None here) lists the stored value of each class; `config.ignore_index` becomes `IGNORE`.
    Resizes by nearest neighbour, so that no new value appears. Raises ImageError, also for a value that is no class.
    """
    assert config.mask_values is not None, "resolve mask_values first: see masks.infer_values"
    values = stored_values(data)
    own_size = (values.shape[0], values.shape[1])
    wanted = [*config.mask_values] + ([] if config.ignore_index is None else [config.ignore_index])
    ids = [*range(len(config.mask_values))] + ([] if config.ignore_index is None else [IGNORE])
    if values.dtype != np.uint8 and values.size and not 0 <= int(values.min()) <= int(values.max()) < 2**16:
        raise ImageError(f"mask values from {values.min()} to {values.max()}: 0 to 65535 can be class values")
    # Values are checked at full size, since resizing could drop the pixels of a wrong one.
    lookup = np.full(2**8 if values.dtype == np.uint8 else 2**16, -1, np.int16)
    lookup[wanted] = ids
    classes = lookup[values]
    if classes.min(initial=0) < 0:
        unknown = np.unique(values[classes < 0])
        shown = ", ".join(map(str, unknown[:5])) + (" …" if len(unknown) > 5 else "")
        raise ImageError(f"mask value(s) {shown} outside the classes (data.mask_values {[*config.mask_values]})")
    mask = classes.astype(np.uint8)
    if size_hw is not None and own_size != size_hw:
        mask = np.asarray(Image.fromarray(mask).resize(size_hw[::-1], Image.Resampling.NEAREST))
    return mask, own_size


def to_own_size(logits_KHW: np.ndarray, size_hw: tuple[int, int], threshold: float) -> np.ndarray:
    """Decides class ids, uint8 at `size_hw`, from float logits [K,H,W]: first interpolates bilinearly, then decides.

    K = 1: class 1 where the sigmoid is above `threshold`. K > 1: the class of the highest logit.
    """
    # One class at a time, since K planes at full size would take K times the memory.
    return decide((_plane(plane, size_hw) for plane in logits_KHW), len(logits_KHW), threshold)


def decide(planes: Iterable[np.ndarray], count: int, threshold: float) -> np.ndarray:
    """Decides class ids, uint8 [H,W], from `count` planes of float logits [H,W], one for each class."""
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
    """Computes probabilities, uint8 [K,H,W] at `size_hw` with 255 for 1, from float logits [K,H,W].

    K = 1: sigmoid. K > 1: softmax.
    """
    return to_probabilities(np.stack([_plane(plane, size_hw) for plane in logits_KHW]))


def to_probabilities(logits_KHW: np.ndarray) -> np.ndarray:
    """Computes probabilities, uint8 [K,H,W] with 255 for 1, from float32 logits [K,H,W]."""
    if len(logits_KHW) == 1:
        share = 0.5 + 0.5 * np.tanh(logits_KHW / 2)  # the sigmoid, without overflow
    else:
        share = np.exp(logits_KHW - logits_KHW.max(axis=0))
        share /= share.sum(axis=0)
    return np.rint(255 * share).astype(np.uint8)


def _plane(plane: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Interpolates one class's logits [H,W] to `size_hw`, float32."""
    plane = np.ascontiguousarray(plane, np.float32)
    if plane.shape == size_hw:
        return plane
    smaller = size_hw[0] < plane.shape[0] or size_hw[1] < plane.shape[1]
    scores = torch.from_numpy(plane)[None, None]
    return F.interpolate(scores, size=size_hw, mode="bilinear", antialias=smaller)[0, 0].numpy()
