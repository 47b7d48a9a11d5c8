"""Writes `geotiff`: a mask with the georeference of its image, for GIS programs."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from unet_ray.data import headers, pages, pictures, storage
from unet_ray.data.imaging import ORIENTATION, ImageError
from unet_ray.inference.formats.base import ImageResult, OutputFormat
from unet_ray.models.checkpoint import ModelCard

FOLDER = "geotiff"
GEOREFERENCE = (33550, 33922, 34264, 34735, 34736, 34737, 50844)
"""Tags that say where an image lies on the earth (OGC GeoTIFF 1.1): ModelPixelScale, ModelTiepoint,
ModelTransformation, the three of the GeoKeys, and the rational polynomials of satellites."""
NOWHERE = "it has no georeference inside, so --format geotiff can't place its mask"
TILE = 512

Tag = tuple[int, int, int, Any, bool]
"""Code, type, count, value: an extra tag as tifffile writes it."""


class GeoTiff(OutputFormat):
    """Writes `geotiff/…tif`: class ids of 8 bits, compressed without loss, with the image's own georeference tags, so
    that coordinate system and transform are the image's. An image that has none fails."""

    owned_names = (FOLDER,)

    def __init__(self, card: ModelCard, formats: Sequence[str]) -> None:
        super().__init__(card, formats)
        self.alone = "png" not in formats

    def write(self, result: ImageResult) -> dict[str, Any]:
        [name] = self.files(result.output)
        tags = _georeference(os.fsdecode(result.chunk["path"][result.row]))
        result.write_file(name, _encoded(result.mask, self.card.model.num_classes, tags))
        output = result.output_in_manifest.rpartition(".")[0]
        return {"output": f"{FOLDER}/{output}.tif"} if self.alone else {}

    def files(self, output: str) -> list[str]:
        return [f"{FOLDER}/{output.rpartition('.')[0]}.tif"]


def _georeference(location: str) -> list[Tag]:
    """Reads an image's georeference tags. Raises ImageError if it has none, or is turned, and OSError."""
    import tifffile

    file = pages.file_of(location)
    number = int(location[len(file) + 1 :] or 0) if pages.is_part(location) else 0
    try:
        with storage.reading(file) as stream:
            index = headers.tiff_pages(stream)[number].index  # type: ignore[arg-type]
            stream.seek(0)
            with tifffile.TiffFile(stream) as opened:
                tags = opened.pages[index].tags
                found = [
                    (tag.code, int(tag.dtype), tag.count, tag.value, True) for tag in tags if tag.code in GEOREFERENCE
                ]
                turned = tags.valueof(ORIENTATION, 1) != 1
    except (tifffile.TiffFileError, ImageError, IndexError, ValueError):
        raise ImageError(NOWHERE) from None
    if not found:
        raise ImageError(NOWHERE)
    if turned:
        raise ImageError("its orientation tag turns it, but not its georeference: store it upright")
    return found


def _encoded(mask: np.ndarray, classes: int, tags: Sequence[Tag]) -> bytes:
    """Encodes class ids, uint8 [H,W], as a TIFF with these tags."""
    import tifffile

    stream = io.BytesIO()
    colours = np.frombuffer(pictures.palette(), np.uint8).reshape(256, 3).T.astype(np.uint16) * 257
    tifffile.imwrite(
        stream,
        mask,
        photometric="minisblack" if classes == 1 else "palette",
        colormap=None if classes == 1 else colours,
        compression="zlib",
        tile=(TILE, TILE) if max(mask.shape) > TILE else None,
        extratags=tags,
        software=False,
        metadata=None,
    )
    return stream.getvalue()
