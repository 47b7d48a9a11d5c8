"""Reads the headers of files, and finds damaged files, without decoding pixels."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from unet_ray.config import ValueRange
from unet_ray.data import headers, imaging, pages, storage
from unet_ray.data.inputs import ImageFile
from unet_ray.data.volumes import CHANNELS
from unet_ray.doctor.report import Finding, error
from unet_ray.doctor.words import number

THREADS = 8
AT_ONCE = 32
LOOK = 128
"""Images are examined at this side, in pixels."""
END = 16
"""Number of bytes at the end of a file in which its end mark is searched."""
END_MARKS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND", "GIF": b";"}

_AGAIN = "copy it again, or remove it with its partner: a training stops at it"
DAMAGE = {
    "file-not-there": ("can't be opened", "a broken link, or no permission: repair or remove it"),
    "empty-file": ("empty", _AGAIN),
    "not-an-image": ("no image", "remove or convert it: a training stops at it"),
    "truncated-file": ("cut off", _AGAIN),
    "cannot-be-decoded": ("damaged", "repair it, or remove it with its partner: a training stops at it"),
    "too-many-pixels": ("too large", "cut it into parts, or make it smaller"),
}
"""Code -> text and remedy."""


@dataclass(slots=True)
class Header:
    """The header of a file."""

    name: str
    """Relative path."""
    format: str = ""
    mode: str = ""
    channels: int = 0
    """Stored channels: 1 to 4 for an image, any number for an array."""
    depth: Literal["8", "more", "float"] = "8"
    """Bits of a channel: at most 8, more, or floating point."""
    array: bool = False
    """.npy, or TIFF of many channels: the model must have exactly its channels."""
    size: tuple[int, int] = (0, 0)
    """(width, height) in pixels, after EXIF orientation."""
    stored: tuple[int, int] = (0, 0)
    """(width, height) in pixels, before EXIF orientation."""
    orientation: int = 1
    """EXIF orientation."""
    volumes: tuple[str, ...] = ()
    """Names of the channels, of slices that `unet-ray slices` wrote."""
    frames: int = 1
    code: str = ""
    """A key of `DAMAGE`; empty: no damage is known."""
    trouble: str = ""
    """Details of the damage, or empty."""

    @property
    def bands(self) -> str:
        """Number and depth of the bands: `3 bands of 8 bits`. A palette is one band."""
        kind, _, _ = self.mode.partition("×")
        known = {"1": "1 bit", "I": "32 bits", "F": "32-bit floats"}
        depth = known.get(self.mode) or ("16 bits" if self.mode.startswith("I;16") else "8 bits")
        if self.array:
            name, bits = kind.rstrip("0123456789"), kind[len(kind.rstrip("0123456789")) :]
            depth = {"float": f"{bits}-bit floats", "bool": "1 bit"}.get(name, f"{bits} bits")
        count = 1 if self.mode in ("P", "1") else self.channels
        return f"{count} band{'' if count == 1 else 's'} of {depth}"

    def damaged(self, reason: Exception) -> None:
        """Records the error that reading raised as the file's damage."""
        text = " ".join(str(reason).split())[:100]
        self.code, self.trouble = "truncated-file" if "truncated" in text else "cannot-be-decoded", text


def read_headers(files: Sequence[ImageFile], max_pixels: int, on_read: Callable[[Header], None]) -> dict[str, Header]:
    """Reads headers in threads. Returns path -> header; `on_read` gets each header."""
    headers = {}
    # Threads get batches, because passing one file to a thread takes as long as reading its header.
    batches = [files[start : start + AT_ONCE] for start in range(0, len(files), AT_ONCE)]
    with ThreadPoolExecutor(THREADS) as threads:
        read = threads.map(lambda batch: [_header(file, max_pixels) for file in batch], batches)
        for file, header in zip(files, itertools.chain.from_iterable(read), strict=True):
            headers[file.path] = header
            on_read(header)
    return headers


def damage(headers: Iterable[Header]) -> Iterator[Finding]:
    """Reports the damaged files."""
    bad = [header for header in headers if header.code]
    for code, (what, remedy) in DAMAGE.items():
        some = [header for header in bad if header.code == code]
        reason = f" ({some[0].trouble})" if some and some[0].trouble else ""
        yield from error(code, f"{number(some, 'file')} {what}{reason}", remedy, [header.name for header in some])


def _header(file: ImageFile, max_pixels: int) -> Header:
    if file.size <= 0:
        return Header(file.name, code="empty-file" if file.size == 0 else "file-not-there")
    header = Header(file.name)
    try:
        if pages.is_part(file.path) or storage.is_uri(file.path):
            data = pages.read_file(file.path, max_pixels)
            _read(header, io.BytesIO(data), len(data), max_pixels)
        else:
            with Path(file.path).open("rb") as stream:
                _read(header, stream, file.size, max_pixels)
    except imaging.ImageError as reason:
        header.damaged(reason)
    except OSError as reason:
        header.code, header.trouble = "file-not-there", reason.strerror or str(reason)
    return header


def _read(header: Header, stream: IO[bytes], size: int, max_pixels: int) -> None:
    magic = stream.read(6)
    stream.seek(0)
    try:
        if magic == imaging.NPY_MAGIC:
            _read_array(header, stream, size)
        elif magic.startswith(imaging.TIFF_MAGIC) and _needs_tifffile(stream):
            _read_tiff(header, stream)
        else:
            _read_image(header, stream, size, max_pixels)
    except UnidentifiedImageError:
        header.code = "not-an-image"
        if magic.startswith(imaging.TIFF_MAGIC):
            _read_tiff(header, stream)
    except Exception as reason:  # Pillow's plugins raise many types
        header.damaged(reason)
    pixels = header.size[0] * header.size[1]
    if not header.code and pixels > max_pixels:
        header.code, header.trouble = "too-many-pixels", f"{pixels} pixels, more than {max_pixels}"


def _needs_tifffile(stream: IO[bytes]) -> bool:
    found = headers.tiff_pages(stream)  # type: ignore[arg-type]
    stream.seek(0)
    return len(found) == 1 and found[0].needs_tifffile(found[0].samples)


def _read_image(header: Header, stream: IO[bytes], size: int, max_pixels: int) -> None:
    image = Image.open(stream)
    header.format, header.mode = image.format or "", image.mode
    header.channels = 3 if image.mode in ("P", "PA") else len(image.getbands())
    if CHANNELS in image.info:
        header.volumes = tuple(str(image.info[CHANNELS]).split(","))
    header.depth = "float" if image.mode == "F" else "more" if image.mode.startswith("I") else "8"
    # Pillow's method for PNG would decode all pixels first.
    header.orientation = Image.Image.getexif(image).get(imaging.ORIENTATION, 1)
    header.size = header.stored = image.size
    if header.orientation in imaging.ROTATED:
        header.size = (image.size[1], image.size[0])
    if _ends_early(image, stream, size):
        # The file may still be complete; only decoding shows it.
        stream.seek(0)
        value_range: ValueRange = None if header.depth == "8" else "percentiles"
        try:
            imaging.decode_image(stream.read(), 3, (LOOK, LOOK), value_range=value_range, max_pixels=max_pixels)
        except imaging.ImageError as reason:
            header.damaged(reason)
            header.code = "truncated-file"
            return
    if image.format != "MPO":  # the frames of an MPO are a photograph and its preview
        header.frames = getattr(image, "n_frames", 1)


def _ends_early(image: Image.Image, stream: IO[bytes], size: int) -> bool:
    """Returns whether a file lacks its end mark, or (TIFF) is shorter than its header says."""
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        parts = ((273, 279), (324, 325))  # offsets and lengths of strips, of tiles
        return any(
            offset + length > size
            for where, lengths in parts
            for offset, length in zip(tags.get(where, ()), tags.get(lengths, ()), strict=False)
        )
    stream.seek(max(0, size - END))
    return END_MARKS.get(image.format or "", b"") not in stream.read()


def _read_array(header: Header, stream: IO[bytes], size: int) -> None:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    if len(shape) not in (2, 3) or dtype.kind not in "biuf" or 0 in shape:
        header.code = "not-an-image"
        header.trouble = f"an array {[*shape]} of {dtype}, not [height, width, channels]"
    elif stream.tell() + int(np.prod(shape)) * dtype.itemsize > size:
        header.code = "truncated-file"
    else:
        _set_array(header, "npy", (shape[1], shape[0]), shape[2] if len(shape) == 3 else 1, dtype)


def _read_tiff(header: Header, stream: IO[bytes]) -> None:
    """Reads the header of a TIFF that Pillow doesn't know, such as one of many channels."""
    import tifffile

    try:
        stream.seek(0)
        with tifffile.TiffFile(stream) as file:
            series = file.series[0]
            sizes = dict(zip(series.axes, series.shape, strict=True))
            extent = (sizes["X"], sizes["Y"])
            header.code = ""
            _set_array(header, "TIFF", extent, int(np.prod(series.shape)) // (extent[0] * extent[1]), series.dtype)
    except Exception as reason:
        header.damaged(reason)


def _set_array(header: Header, kind: str, size: tuple[int, int], channels: int, dtype: np.dtype) -> None:
    header.format, header.mode, header.channels, header.array = kind, f"{dtype}×{channels}", channels, True
    header.depth = "float" if dtype.kind == "f" else "8" if dtype.itemsize == 1 else "more"
    header.size = header.stored = size
