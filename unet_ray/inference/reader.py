"""Reads the bytes of images and decodes them."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unet_ray.data import imaging, pages, pictures, storage
from unet_ray.data.buckets import OutOfReachError
from unet_ray.data.chunks import Chunk, objects
from unet_ray.data.imaging import ImageError, Pixels, Source
from unet_ray.data.parquet_images import encoded_images
from unet_ray.models.checkpoint import ModelCard

OVERLAY_SIDE = 1024
"""Largest number of pixels of an overlay's longer side."""


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads images and decodes them in the form that a model needs."""

    channels: int
    value_range: Any
    max_pixels: int
    column: str | None
    """Column of a Parquet file with encoded images; None: the first known one."""

    @classmethod
    def of(cls, card: ModelCard, max_pixels: int, column: str | None = None) -> Reader:
        return cls(card.model.in_channels, card.value_range, max_pixels, column)

    def encoded(self, chunk: Chunk) -> Iterator[Source | str]:
        """Yields the file of each row, or the reason of the failure."""
        inside = "source" in chunk and any(chunk["source"])
        stored = _from_parquet(chunk, self.column) if inside else {}
        for row, path in enumerate(chunk["path"]):
            try:
                if row in stored:
                    yield stored[row]
                else:
                    yield self._file(os.fsdecode(path))
            except OutOfReachError:
                raise
            except (ImageError, OSError, ValueError) as error:
                yield _reason(error)

    def encoded_files(self, paths: Iterable[str]) -> Iterator[Source | str]:
        """Yields each of these files, or the reason of the failure."""
        return self.encoded({"path": objects([os.fsencode(path) for path in paths])})

    def _file(self, path: str) -> bytes:
        if not storage.is_uri(path):
            status = Path(pages.file_of(path)).stat()
            if stat.S_ISDIR(status.st_mode):
                raise ImageError("a folder that cannot be listed")
            if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait forever
                raise ImageError("not a regular file")
        return imaging.read_file(path, self.max_pixels)

    def resized(self, data: Source | str, size_hw: tuple[int, int] | None) -> tuple[np.ndarray, tuple[int, int]]:
        """Decodes an image and resizes it to `size_hw`, see `imaging.decode_image`. Raises ImageError."""
        if isinstance(data, str):
            raise ImageError(data)
        return imaging.decode_image(
            data, self.channels, size_hw, value_range=self.value_range, max_pixels=self.max_pixels
        )

    def pixels(self, data: Source | str) -> Pixels:
        """Returns the image at its own size. Raises ImageError."""
        if isinstance(data, str):
            raise ImageError(data)
        return Pixels(data, self.channels, self.value_range, self.max_pixels)

    def picture(self, data: Source | str, size_hw: tuple[int, int], side: int) -> np.ndarray:
        """Returns a small RGB version of an image for people, uint8 [h,w,3]. Raises ImageError.

        `size_hw`: the image's own size. `side`: largest number of pixels of the longer side.
        """
        picture, _ = self.resized(data, imaging.fitted(size_hw, side))
        return np.ascontiguousarray(picture[..., [0, 1, 2] if picture.shape[-1] in (3, 4) else [0, 0, 0]])

    def overlay(self, data: Source | str, mask: np.ndarray, num_classes: int) -> bytes:
        """Returns a small JPEG picture with a mask drawn in. `mask`: class ids, uint8 [H,W]. Raises ImageError."""
        return pictures.overlay(self.picture(data, mask.shape, OVERLAY_SIDE), mask, num_classes)


@dataclass(frozen=True, slots=True)
class GivenReader(Reader):
    """Returns the images that it was made with, in place of files."""

    images: tuple[Source | str, ...]

    @classmethod
    def of(cls, reader: Reader, images: Sequence[Source | str]) -> GivenReader:  # type: ignore[override]
        return cls(reader.channels, reader.value_range, reader.max_pixels, None, tuple(images))

    def encoded(self, chunk: Chunk) -> Iterator[Source | str]:  # noqa: ARG002
        yield from self.images


def checksum(data: Source | str) -> str:
    """Returns 32 hexadecimal digits that tell an image's file from all others; empty if it could not be read."""
    return hashlib.blake2b(data, digest_size=16).hexdigest() if isinstance(data, (bytes, memoryview)) else ""


def _from_parquet(chunk: Chunk, column: str | None) -> dict[int, bytes | str]:
    """Returns row of the chunk -> encoded image or reason of the failure, for images inside Parquet files."""
    images: dict[int, bytes | str] = {}
    for source in sorted(set(chunk["source"]) - {b""}):
        rows = np.flatnonzero(chunk["source"] == source)
        wanted = {int(chunk["source_row"][row]): int(row) for row in rows}
        try:
            data = encoded_images(os.fsdecode(source), sorted(wanted), column)
            images |= {wanted[number]: image for number, image in data.items()}
        except OutOfReachError:
            raise
        except (OSError, ValueError) as error:
            images |= dict.fromkeys(wanted.values(), _reason(error))
    return images


def _reason(error: Exception) -> str:
    if isinstance(error, ImageError):
        return str(error)
    return f"cannot be read: {getattr(error, 'strerror', None) or error}"
