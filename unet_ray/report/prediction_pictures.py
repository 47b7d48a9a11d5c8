"""Draws the pictures on the page of a prediction: each image with its mask."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from unet_ray.config import MAX_PIXELS, UserError
from unet_ray.data import imaging, pictures, storage
from unet_ray.data.imaging import ImageError
from unet_ray.inference.reader import Reader
from unet_ray.report.pictures import SIDE, data_uri
from unet_ray.report.sections import short


@dataclass(frozen=True, slots=True)
class PredictionPictures:
    """Draws masks over their images; reads the masks from PNG files or from masks.parquet, whichever exists."""

    out: str
    classes: int
    """Number of classes, background included: 2 or more."""

    def draw(self, rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str, str]]:
        """Yields (data URI, caption) for the manifest's rows whose mask can be read."""
        rows = list(rows)
        try:
            in_parquet = _from_parquet(storage.join(self.out, "masks.parquet"), {row["path"] for row in rows})
        except (OSError, ValueError):  # a damaged file costs its pictures, not the page
            in_parquet = {}
        for row in rows:
            ids = self.mask(row, in_parquet)
            if ids is None:
                continue
            share = 1 - row["pixels"][0] / max(1, sum(row["pixels"]))
            sure = "" if row["uncertainty"] is None else f"uncertainty {row['uncertainty']:.3f}, "
            caption = f"{short(row['path'])}: {sure}{share:.1%} foreground"
            yield self.overlay(self.picture(row), ids), caption

    def overlay(self, picture: np.ndarray, ids: np.ndarray) -> str:
        """Returns the picture with the mask over it, as a data URI."""
        return data_uri(pictures.overlay(picture, ids, 1 if self.classes == 2 else self.classes))

    def mask(self, row: dict[str, Any], in_parquet: Mapping[str, bytes] = MappingProxyType({})) -> np.ndarray | None:
        """Returns the class ids of a manifest's row, uint8 [H,W]; None if they can't be read."""
        try:
            if row["output"]:
                return imaging.stored_values(imaging.read_file(storage.join(self.out, *row["output"].split("/"))))
            return imaging.stored_values(in_parquet[row["path"]]) if row["path"] in in_parquet else None
        except (OSError, ImageError):
            return None

    def picture(self, row: dict[str, Any]) -> np.ndarray:
        """Returns the picture, or plain gray if the image was moved, is inside a Parquet file, or has many channels."""
        size_hw = row["height"], row["width"]
        try:
            data = imaging.read_file(os.fsdecode(row["location"]))
            return Reader(3, None, 2 * MAX_PIXELS, None).picture(data, size_hw, SIDE)
        except (OSError, ImageError, UserError):
            return np.full((*imaging.fitted(size_hw, SIDE), 3), 128, np.uint8)


def _from_parquet(folder: str, paths: set[str]) -> dict[str, bytes]:
    """Returns path -> mask, PNG bytes, of those images that masks.parquet holds.

    It reads the column of paths, and the masks of row groups that hold one of these.
    """
    import pyarrow.parquet as pq

    masks: dict[str, bytes] = {}
    # A killed run may leave a temporary file, whose name begins with a dot.
    for name in (name for name in storage.names_in(folder) if not name.startswith(".")):
        with storage.reading(storage.join(folder, name)) as stream, pq.ParquetFile(stream) as file:
            for number in range(file.num_row_groups):
                found = file.read_row_group(number, ["path"])["path"].to_pylist()
                if not paths.isdisjoint(found):
                    data = file.read_row_group(number, ["mask"])["mask"]
                    masks |= {path: data[row].as_py() for row, path in enumerate(found) if path in paths}
    return masks
