"""Writes `parquet`: all masks in few files."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from unet_ray.inference.formats.base import ImageResult, OutputFormat
from unet_ray.inference.ledger import SideTable

FOLDER = "masks.parquet"


def rows_of(results: pa.Table) -> pa.Table:
    return results.select(["path", "height", "width", "pixels", "confidence", "mask"])


class MaskParquet(OutputFormat):
    """Writes `masks.parquet`: a row for each image, with its mask as a PNG file."""

    owned_names = (FOLDER,)
    # PNG files are compressed: to compress them again costs time and saves nothing.
    table = SideTable(FOLDER, pa.schema([("mask", pa.binary())]), rows_of, compression="none")

    def write(self, result: ImageResult) -> dict[str, Any]:
        return {"mask": result.png}
