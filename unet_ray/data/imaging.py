"""Decodes images and masks to uint8 arrays.

Legend: H, W height and width in pixels; C channels.
Only this module resizes images and masks for the network.
"""

from __future__ import annotations

import ctypes
import io
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pyarrow as pa
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

from unet_ray.config import MAX_PIXELS, DataConfig, ValueRange
from unet_ray.data import headers, mask_meaning, pages
from unet_ray.data.headers import NPY_MAGIC, ORIENTATION, ROTATED, TIFF_MAGIC, ImageError

Source = bytes | Image.Image
"""The bytes of an image file, or an open image, which is loaded but never changed."""
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
"""Channels -> Pillow's mode."""
HEIC = re.compile(rb"....ftyp(hei|hev|mif1|msf1)", re.DOTALL)
"""What a HEIC file begins with."""
PERCENTILES = (0.5, 99.5)


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
    """Reads an encoded image or mask, see `pages.read_file`. Raises OSError, ImageError."""
    return pages.read_file(location, max_pixels)


@contextmanager
def _opened(data: Source, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    if isinstance(data, Image.Image):
        headers.check_pixels(data.width * data.height, max_pixels)
        with _reading():
            data.load()  # `draft` can't make a loaded JPEG smaller in place
            yield data
        return
    headers.check_encoded(data)
    if data.startswith(TIFF_MAGIC):
        _check_pages(data)
    if HEIC.match(data):
        _open_heic()
    with _reading(), Image.open(io.BytesIO(data)) as image:
        headers.check_pixels(image.width * image.height, max_pixels)
        yield image


def _open_heic() -> None:
    """Teaches Pillow to open HEIC. Raises ImageError."""
    try:
        import pillow_heif
    except ImportError:
        raise ImageError("a HEIC image: pip install 'unet_ray[heic]'") from None
    pillow_heif.register_heif_opener()


def _check_pages(data: bytes) -> None:
    """Raises ImageError for a TIFF of several pages: one alone would be silently wrong."""
    try:
        found = headers.tiff_pages(io.BytesIO(data))
    except ImageError:  # Pillow says what is wrong
        return
    if len(found) < 2:
        return
    sizes = sorted({(page.width, page.height) for page in found})
    if len(sizes) > 1:
        shown = " and ".join(f"{width}x{height}" for width, height in sizes[:2])
        raise ImageError(f"a TIFF of {len(found)} pages of different sizes ({shown}): save each as a file of its own")
    raise ImageError(f"a TIFF of {len(found)} pages: in a folder on a disk each page is an image")


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
    # torch has Pillow's antialiased resize in AVX2, which takes a quarter of the time on one thread. It takes half of
    # that if it knows the memory as channels_last, which the order of these two steps decides.
    pixels = _pixels(band)[None].permute(0, 3, 1, 2)
    small = F.interpolate(pixels, size=size_hw, mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
    if band.mode == "L":
        return small[..., 0]
    if small.shape[-1] == len(band.getbands()):
        return small
    rgb = np.empty((*size_hw, 3), np.uint8)
    for channel in range(3):  # a quarter of the time of all at once
        rgb[..., channel] = small[..., channel]
    return rgb


def _pixels(image: Image.Image) -> torch.Tensor:
    """Returns an image's pixels, uint8 [H,W,C]. RGB has a fourth channel without a meaning where Pillow's memory, which
    has one, need not be copied: `np.array` copies it three times, and keeps other threads from running meanwhile."""
    if image.mode == "RGB" and hasattr(image, "__arrow_c_array__"):  # Pillow 11.2 and newer
        try:
            flat = torch.from_dlpack(pa.array(image).flatten())
        except ValueError:  # an image of more than 16 MB is in several pieces
            pass
        else:
            return flat.reshape(image.height, image.width, -1)
    return torch.from_numpy(np.array(image)).reshape(image.height, image.width, -1)


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
        top = int(values.max(initial=0))
        if top > 65535 or values.min(initial=0) < 0:
            raise ImageError("its values are beyond 16 bits")
        if values.dtype.itemsize > 2 and 0 < top < 256:  # of which the upper 8 bits would be 0
            raise ImageError(
                f"values from 0 to {top} in {values.dtype}: store uint8, or train with data.value_range='[0, 255]'"
            )
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
    elif data.startswith(TIFF_MAGIC) and _needs_tifffile(data, channels):
        with _reading():
            values = _tiff_channels_last(data, channels, max_pixels)
    else:
        return None
    return values[..., None] if values.ndim == 2 else values


def _needs_tifffile(data: bytes, channels: int) -> bool:
    if channels not in MODES:
        return True
    try:
        found = headers.tiff_pages(io.BytesIO(data))
    except ImageError:  # Pillow says what is wrong
        return False
    return len(found) == 1 and found[0].needs_tifffile(channels)


def _tiff_channels_last(data: bytes, channels: int, max_pixels: int) -> np.ndarray:
    """Reads a TIFF with any axes as [H,W,C]; all axes except X and Y become channels."""
    import tifffile

    headers.tiff_pages(io.BytesIO(data))  # raises if the chain of pages is a bomb
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

    Colours with three equal channels count as gray. If they are the same everywhere, and parts are transparent, the
    opacity is the mask. Floating-point values must be whole numbers. EXIF orientation is applied. Raises ImageError.
    """
    values = _array(data, 1, MAX_PIXELS)
    if values is not None:
        return _whole(values[..., 0])
    with _opened(data) as image:
        image.load()
        mask = _upright(image)
        if mask.mode in ("RGB", "RGBA", "LA", "CMYK", "YCbCr"):
            return _gray(mask)
        return _whole(np.asarray(mask))


def _gray(mask: Image.Image) -> np.ndarray:
    """Returns the gray levels, or the transparency, of a mask that is stored in colours. Raises ImageError."""
    bands = np.asarray(mask if mask.mode == "LA" else mask.convert("RGB"))
    colour = bands[..., :1] if mask.mode == "LA" else bands
    if mask.mode in ("LA", "RGBA"):
        alpha = np.asarray(mask.getchannel("A"))
        if (colour == colour[:1, :1]).all() and (alpha != 255).any():
            return alpha
    if (colour.min(axis=-1) != colour.max(axis=-1)).any():
        raise ImageError("a mask in colours: name them with data.mask_colors (`unet-ray doctor` prints it)")
    return colour[..., 0]


def _whole(values: np.ndarray) -> np.ndarray:
    """Returns integers. Raises ImageError for values between them."""
    if values.dtype == bool:
        return values.astype(np.uint8)
    if values.dtype.kind != "f":
        return values
    if not np.isfinite(values).all() or (values != np.rint(values)).any():
        raise ImageError("a mask with floating-point values: store class ids, 0/255 or a palette")
    return values.astype(np.int32)


def stored_colours(data: bytes) -> np.ndarray:
    """Reads a mask file's colours, uint32 [H,W], as `config.colour_code` writes them. A palette gives its colours, and
    gray levels are colours too. EXIF orientation is applied. Raises ImageError."""
    with _opened(data) as image:
        image.load()
        mask = _upright(image)
        if mask.mode.startswith("I") or mask.mode == "F":
            raise ImageError("a mask of numbers, not of colours: name them with data.mask_values")
        red, green, blue = np.moveaxis(np.asarray(mask.convert("RGB"), np.uint32), -1, 0)
        return red << 16 | green << 8 | blue


def orientation(data: Source) -> int:
    """Returns the EXIF orientation, 1 to 8; 1 also for what is no picture."""
    try:
        if isinstance(data, Image.Image):
            return int(data.getexif().get(ORIENTATION, 1))
        with Image.open(io.BytesIO(data)) as image:
            return int(Image.Image.getexif(image).get(ORIENTATION, 1))  # PNG's own method would decode all pixels
    except Exception:  # an array, or a file that Pillow doesn't know
        return 1


def turned(ids: np.ndarray, orientation: int) -> np.ndarray:
    """Returns class ids, uint8 [H,W], turned as EXIF says that an image is to be shown."""
    method = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(orientation)
    return ids if method is None else np.asarray(Image.fromarray(ids).transpose(method))


def decode_mask(
    data: bytes | Sequence[bytes | None],
    config: DataConfig,
    size_hw: tuple[int, int] | None,
    image: Source | None = None,
) -> tuple[np.ndarray, tuple[int, int]]:
    """Decodes a mask to class ids, uint8 [H,W], and returns it with its own (height, width).

    `config` says what the stored values mean (`mask_meaning.class_ids`; resolved), and what several masks of one image
    mean, of which None is one that the image lacks. `image`: its image, like which `config.mask_turn` turns it. Resizes
    by nearest neighbour, so that no new value appears. Raises ImageError, also for a value that is no class.
    """
    if isinstance(data, bytes):
        mask = _decoded_mask(data, config)
    else:
        parts = [None if part is None else _decoded_mask(part, config) for part in data]
        mask = mask_meaning.combined(parts, classes=config.several_masks == "classes")
    if config.mask_turn and image is not None:
        first = data if isinstance(data, bytes) else next(part for part in data if part is not None)
        if orientation(first) == 1:
            mask = turned(mask, orientation(image))
    own_size = (mask.shape[0], mask.shape[1])
    if size_hw is not None and own_size != size_hw:
        mask = np.asarray(Image.fromarray(mask).resize(size_hw[::-1], Image.Resampling.NEAREST))
    return mask, own_size


def resized_ids(ids: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Returns class ids, uint8 [H,W], resized by nearest neighbour."""
    if ids.shape == size_hw:
        return ids
    return np.array(Image.fromarray(ids).resize(size_hw[::-1], Image.Resampling.NEAREST))


ASPECTS = 0.02
"""Masks that are larger or smaller than their images may differ from them in proportions by this share: 256x171 for
1024x683 does, by rounding."""


def problem_of_sizes(image_hw: tuple[int, int], mask_hw: tuple[int, int], config: DataConfig) -> str:
    """Returns why a mask of this (height, width) is not one of this image, with the remedy; or an empty text."""
    if image_hw == mask_hw:
        return ""
    sizes = f"{mask_hw[1]}x{mask_hw[0]} pixels, but its image has {image_hw[1]}x{image_hw[0]}"
    aspects = [width / height for height, width in (image_hw, mask_hw)]
    rounded = 1 / min(*mask_hw, *image_hw)  # of one pixel
    if abs(aspects[0] / aspects[1] - 1) > ASPECTS + rounded:
        return f"{sizes}: the two must match"
    return "" if config.mask_resize else f"{sizes}: the same proportions; --set data.mask_resize=true resizes it"


def _decoded_mask(data: bytes, config: DataConfig) -> np.ndarray:
    # Values are checked at full size, since resizing could drop the pixels of a wrong one.
    return mask_meaning.class_ids(stored_colours(data) if config.mask_colors else stored_values(data), config)
