"""Writes `rle`: COCO's compressed run lengths as a table."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from unet_ray.inference.formats.base import ImageResult, OutputFormat
from unet_ray.inference.ledger import SideTable

FOLDER = "rle.parquet"
REGION = [("class_id", pa.int32()), ("area", pa.int64()), ("bbox", pa.list_(pa.int32())), ("counts", pa.string())]
COLUMNS = pa.schema([("rle", pa.list_(pa.struct(REGION)))])


def rows_of(results: pa.Table) -> pa.Table:
    """Makes a row for each class in each image."""
    regions = results["rle"].combine_chunks()
    image = pc.list_parent_indices(regions)
    flat = regions.flatten()
    columns = {name: results[name].take(image) for name in ("path", "height", "width", "confidence")}
    return pa.table({**columns, **{name: flat.field(name) for name, _ in REGION}})


class RunLengths(OutputFormat):
    """Writes `rle.parquet`: a row for each class of each image: its area, box and run lengths (`data.run_lengths`)."""

    owned_names = (FOLDER,)
    table = SideTable(FOLDER, COLUMNS, rows_of)

    def write(self, result: ImageResult) -> dict[str, Any]:
        return {"rle": result.regions}
