"""Looks at a file's size and header before it is decoded: a few kilobytes may claim gigabytes, or hours of work.

Pillow itself bounds PNG's compressed texts and profiles. Everything else that grows with what a file claims is bounded
here, by `max_pixels`.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from unet_ray.data import storage

ROTATED = frozenset({5, 6, 7, 8})
"""EXIF orientations that swap width and height."""
ORIENTATION = 0x0112
NPY_MAGIC = b"\x93NUMPY"
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
JPEG_MAGIC, START_OF_SCAN = b"\xff\xd8", b"\xff\xda"
POSTSCRIPT = (b"%!PS", b"\xc5\xd0\xd3\xc6")
BYTES_PER_PIXEL = 16
"""The most bytes that a file may have for each of the pixels allowed: two channels of float64, or eight of uint16."""
MOST_SCANS = 100
"""Progressive JPEG files have about ten scans. Each takes as long as a whole image."""
MOST_PAGES = 10_000
"""Pages of a TIFF whose pages are channels."""
DEFLATE = (8, 32946)
"""TIFF's compressions by zlib, the only ones of which a few bytes become many without a bound."""


class ImageError(ValueError):
    """A file that cannot be used as an image or mask. The message gives the reason and does not name the file."""


def read_file(location: str, max_pixels: int) -> bytes:
    """Reads an encoded image or mask. Raises OSError, and ImageError if it has more bytes than `max_pixels` allows.

    No byte after the limit is read, whether the file is on a disk or in a bucket.
    """
    limit = BYTES_PER_PIXEL * max_pixels
    data = storage.read_at_most(location, limit + 1)
    if len(data) > limit:
        raise ImageError(f"more than {limit} bytes, which --max-pixels {max_pixels} allows")
    return data


def check_pixels(pixels: int, max_pixels: int) -> None:
    """Raises ImageError for more pixels than are allowed."""
    if pixels > max_pixels:
        raise ImageError(f"{pixels} pixels, more than --max-pixels {max_pixels}")


def size_hw(data: bytes) -> tuple[int, int]:
    """Returns (height, width) of an encoded image as it is shown, by its header. Raises ImageError."""
    try:
        if data.startswith(NPY_MAGIC):
            shape = np.load(io.BytesIO(data), mmap_mode=None, allow_pickle=False).shape
            return int(shape[0]), int(shape[1])
        if data.startswith(TIFF_MAGIC):
            page = tiff_pages(io.BytesIO(data))[0]
            return page.height, page.width
        with Image.open(io.BytesIO(data)) as image:
            turned = Image.Image.getexif(image).get(ORIENTATION, 1) in ROTATED
            return image.size if turned else (image.height, image.width)
    except Exception as error:  # Pillow's plugins raise many types
        raise ImageError(f"its size can't be read: {str(error)[:80]}") from None


def check_encoded(data: bytes) -> None:
    """Raises ImageError for a file that Pillow must not open."""
    if not data:
        raise ImageError("the file is empty")
    if data.startswith(POSTSCRIPT):
        raise ImageError("a PostScript file: decoding it would run the program in it")
    # Inside a scan a byte 255 is followed by 0, so this finds markers (and perhaps a few in a thumbnail).
    if data.startswith(JPEG_MAGIC) and (scans := data.count(START_OF_SCAN)) > MOST_SCANS:
        raise ImageError(f"a JPEG of {scans} scans: at most {MOST_SCANS}")


def check_array(shape: tuple[int, ...], dtype: np.dtype, channels: int, max_pixels: int) -> None:
    """Raises ImageError unless these are numbers [H,W] or [H,W,C] with `channels` channels, and not too many."""
    if len(shape) == 2:
        shape = (*shape, 1)
    if len(shape) != 3 or 0 in shape or dtype.kind not in "biuf":
        raise ImageError(f"an array {[*shape]} of {dtype}: numbers [height, width, channels] are needed")
    check_pixels(shape[0] * shape[1], max_pixels)
    if shape[-1] != channels:
        raise ImageError(f"{shape[-1]} channel(s), the model takes {channels}")


def check_npy(data: bytes, channels: int, max_pixels: int) -> None:
    """Checks a .npy file by its header, see `check_array`. Raises ImageError, or ValueError for a damaged header."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    check_array(shape, dtype, channels, max_pixels)
    if dtype.itemsize * int(np.prod(shape, dtype=object)) > len(data) - stream.tell():
        raise ImageError("truncated: it claims more values than it holds")


@dataclass(frozen=True, slots=True)
class TiffPage:
    """The header of a page of a TIFF."""

    index: int
    """Its place among all directories of the file, smaller copies of pages included."""
    width: int
    height: int
    bits: int
    """Of a sample."""
    samples: int
    """Of a pixel."""
    kind: int
    """PhotometricInterpretation; 2: colour."""
    extra: int
    """ExtraSamples; 0: the samples after red, green and blue are data, not transparency."""

    def needs_tifffile(self, channels: int) -> bool:
        """Whether Pillow can't read these channels, would cut them down to 8 bits, or would make one up."""
        fourth = channels == self.samples == 4 and self.kind == 2 and not self.extra
        return self.samples > 4 or (self.samples > 1 and self.bits > 8) or fourth


def tiff_pages(stream: BinaryIO) -> list[TiffPage]:
    """Returns the pages of a TIFF. Smaller copies of a page (pyramids, overviews) and transparency masks are none.

    Raises ImageError if the chain of directories is too long, or ends outside the file.
    """
    head = stream.read(16)
    order = "<" if head[:1] == b"I" else ">"
    big = head[2:4] in (b"+\0", b"\0+")
    pages: list[TiffPage] = []
    others: list[TiffPage] = []
    try:
        [offset] = struct.unpack_from(order + ("Q" if big else "I"), head, 8 if big else 4)
        for index in range(MOST_PAGES):
            if not offset:
                return pages or others[:1]
            tags, offset = _directory(stream, offset, order, big)
            page = TiffPage(index, *(tags.get(tag, default) for tag, default in DEFAULTS.items()))
            (others if tags.get(KIND, 0) & (REDUCED | MASK) else pages).append(page)
    except (struct.error, OverflowError):
        raise ImageError("truncated: a page lies outside the file") from None
    raise ImageError(f"a TIFF of more than {MOST_PAGES} pages")


KIND, REDUCED, MASK = 254, 1, 4
"""The tag NewSubfileType, and two of its bits."""
DEFAULTS = {256: 0, 257: 0, 258: 1, 277: 1, 262: 1, 338: 0}
"""Tags -> defaults of the fields of `TiffPage`, in their order."""


def _directory(stream: BinaryIO, offset: int, order: str, big: bool) -> tuple[dict[int, int], int]:
    """Reads a directory of a TIFF. Returns tag -> (first) value of those that `tiff_pages` needs, and the offset of the
    next directory."""
    count_format, entry_format, offset_format = (
        (order + "Q", order + "HHQ8s", order + "Q") if big else (order + "H", order + "HHI4s", order + "I")
    )
    stream.seek(offset)
    [count] = struct.unpack(count_format, stream.read(struct.calcsize(count_format)))
    size = struct.calcsize(entry_format)
    data = stream.read(count * size + struct.calcsize(offset_format))
    tags = {}
    for place in range(0, count * size, size):
        tag, kind, number, value = struct.unpack_from(entry_format, data, place)
        if (tag == KIND or tag in DEFAULTS) and kind in (3, 4, 16):
            letter = order + {3: "H", 4: "I", 16: "Q"}[kind]
            if number * struct.calcsize(letter) > len(value):  # the values are elsewhere
                stream.seek(struct.unpack(offset_format, value)[0])
                value = stream.read(struct.calcsize(letter))
            [tags[tag]] = struct.unpack_from(letter, value)
    [following] = struct.unpack_from(offset_format, data, count * size)
    return tags, following


def check_tiff_series(series: Any, channels: int, max_pixels: int) -> None:
    """Checks a tifffile series by its pages' headers, and that no compressed part unpacks to more than it claims.
    Raises ImageError."""
    sides = dict(zip(series.axes, series.shape, strict=True))
    if "Y" not in sides or "X" not in sides:
        raise ImageError(f"a TIFF with the axes {series.axes}: height and width are needed")
    pixels = sides["Y"] * sides["X"]
    others = int(np.prod(series.shape, dtype=object)) // max(1, pixels)
    check_array((sides["Y"], sides["X"], others), series.dtype, channels, max_pixels)
    for page in series.pages:
        if page is not None and page.compression in DEFLATE:
            _check_deflated(page)


def _check_deflated(page: Any) -> None:
    claimed = int(np.prod(page.chunks or page.shape, dtype=object)) * page.dtype.itemsize
    file = page.parent.filehandle
    for offset, size in zip(page.dataoffsets, page.databytecounts, strict=True):
        file.seek(offset)
        unpacking = zlib.decompressobj()
        unpacking.decompress(file.read(size), claimed + 1)
        if unpacking.unconsumed_tail and not unpacking.eof:
            raise ImageError("a compressed part unpacks to more than the image has")
