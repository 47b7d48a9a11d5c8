"""Parts of files as images of their own: pages of a TIFF, frames of a GIF or a video, cells of a Parquet file.

`volume.tif#3` is the fourth page; for cells see `parquet_images`. A mask drawn from annotations is one, too, see
`annotations.drawing`.
"""

from __future__ import annotations

import io
import os
import re
from pathlib import Path

import numpy as np
from PIL import Image

from unet_ray.data import headers, parquet_images, storage, video
from unet_ray.data.annotations import drawing
from unet_ray.data.headers import ImageError

FRAMES = frozenset({".gif", *video.SUFFIXES})
PAGED = "|".join(sorted(suffix[1:] for suffix in {".tif", ".tiff", *FRAMES}))
PAGE = re.compile(rf"(.+\.(?:{PAGED}))#(\d+)", re.IGNORECASE | re.DOTALL)


def file_of(location: str) -> str:
    """Returns the file that a location is in, or is."""
    if found := drawing.split_drawn(location) or parquet_images.split_cell(location):
        return found[0]
    return _split(location)[0]


def shown(location: str) -> str:
    """Returns a location for a message: a drawn mask as its file and image."""
    shapes = drawing.split_drawn(location)
    return location if shapes is None else f"{shapes[0]} ({drawing.name_of(shapes[1])})"


def is_part(location: str) -> bool:
    """Returns whether a location is a page or a cell, and no whole file."""
    return file_of(location) != location


def _split(location: str) -> tuple[str, int | None]:
    """Returns the file of a location, and the number of its page; None: the location is no page."""
    found = PAGE.fullmatch(location)
    if found is None or storage.is_uri(location) or os.path.lexists(location):
        return location, None
    return found[1], int(found[2])


def count(path: str, *, frames: bool) -> int:
    """Returns how many images a file on a disk holds: the pages of a TIFF that have one size, and with `frames` those
    of a GIF or a video; 1 for all others, and for a file that can't be read: decoding it says why."""
    kind = os.path.splitext(path)[1].lower()  # noqa: PTH122 - called often
    if storage.is_uri(path) or not (kind in (".tif", ".tiff") or (frames and kind in FRAMES)):
        return 1
    try:
        if kind in video.SUFFIXES:
            return video.count(path)
        with Path(path).open("rb") as stream:
            if kind == ".gif":
                with Image.open(stream) as image:
                    return getattr(image, "n_frames", 1)
            found = headers.tiff_pages(stream)
    except Exception:  # Pillow's plugins raise many types
        return 1
    return len(found) if len({(page.width, page.height) for page in found}) == 1 else 1


def _read_page(path: str, number: int, max_pixels: int) -> bytes:
    """Returns one page or frame as a file of its own, with the same values. Raises ImageError, OSError."""
    if video.is_video(path):
        if storage.is_uri(path):
            raise ImageError("a video in a bucket: copy it to a disk, where its frames can be read")
        return _encoded(Image.fromarray(np.ascontiguousarray(video.read_frame(path, number, max_pixels))))
    with Path(path).open("rb") as stream:
        if path.lower().endswith(".gif"):
            with Image.open(stream) as image:
                headers.check_pixels(image.width * image.height, max_pixels)
                image.seek(number)
                return _encoded(image.convert("RGBA" if "transparency" in image.info else "RGB"))
        found = headers.tiff_pages(stream)
        if number >= len(found):
            raise ImageError(f"it has {len(found)} page(s), and no number {number}")
        page = found[number]
        headers.check_pixels(page.width * page.height, max_pixels)
        if page.needs_tifffile(page.samples):
            return _array(stream, page.index)
        stream.seek(0)
        with Image.open(stream) as image:
            image.seek(page.index)
            image.load()
            return _encoded(image)


def read_file(location: str, max_pixels: int) -> bytes:
    """Reads an encoded image or mask, a whole file or a part, see `headers.read_file`. Raises OSError, ImageError."""
    if shapes := drawing.split_drawn(location):
        return drawing.draw_png(*shapes, max_pixels, lambda image: headers.size_hw(read_file(image, max_pixels)))
    if cell := parquet_images.split_cell(location):
        return parquet_images.read_cell(*cell)
    path, page = _split(location)
    if page is None and video.is_video(path):
        page = 0  # the only frame, or else it says what is wrong with the video
    return headers.read_file(path, max_pixels) if page is None else _read_page(path, page, max_pixels)


def _encoded(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "TIFF")
    return stream.getvalue()


def _array(stream: io.BufferedReader, index: int) -> bytes:
    import tifffile

    stream.seek(0)
    with tifffile.TiffFile(stream) as file:
        page = file.pages[index]
        values = page.asarray()
        axes = page.axes
    if "S" in axes and axes.index("S") == 0:  # planes one after the other
        values = np.moveaxis(values, 0, -1)
    out = io.BytesIO()
    np.save(out, values)
    return out.getvalue()
