"""Writes `kaggle`: one CSV file in the form of Kaggle's Carvana challenge."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from unet_ray.config import UserError
from unet_ray.data import run_lengths, storage
from unet_ray.inference.formats.base import ImageResult, OutputFormat
from unet_ray.inference.ledger import WORK, Ledger, SideTable
from unet_ray.models.checkpoint import ModelCard

SUBMISSION = "submission.csv"


def rows_of(results: pa.Table) -> pa.Table:
    return results.select(["path", "name", "runs"])


class KaggleSubmission(OutputFormat):
    """Writes `submission.csv`: `img,rle_mask`, then each image's file name and run lengths (`run_lengths.row_runs`)."""

    owned_names = (SUBMISSION,)
    table = SideTable(f"{WORK}/runs", pa.schema([("name", pa.string()), ("runs", pa.string())]), rows_of)

    def __init__(self, card: ModelCard, formats: Sequence[str]) -> None:
        super().__init__(card, formats)
        classes = card.model.num_classes
        if classes > 1:
            raise UserError(f"--format kaggle is for one class, the model has {classes}: use rle or coco")

    def write(self, result: ImageResult) -> dict[str, Any]:
        return {"name": result.name, "runs": run_lengths.row_runs(result.mask)}

    def write_final(self, ledger: Ledger) -> None:
        with storage.writing(storage.join(ledger.out, SUBMISSION)) as stream:
            stream.write(b"img,rle_mask\n")
            for table in ledger.side_rows(self.table):
                lines = io.StringIO()
                writer = csv.writer(lines, lineterminator="\n")
                names = (name.rpartition("/")[2] for name in table["name"].to_pylist())
                writer.writerows(zip(names, table["runs"].to_pylist(), strict=True))
                stream.write(lines.getvalue().encode())
