"""Writes `coco`: one JSON file in COCO's object detection format."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import IO, Any

from unet_ray.data import storage
from unet_ray.data.chunks import readable
from unet_ray.inference.formats import run_lengths
from unet_ray.inference.formats.base import ImageResult, OutputFormat, class_names
from unet_ray.inference.ledger import WORK, Ledger, SideTable
from unet_ray.models.checkpoint import ModelCard

COCO = "coco.json"


class Coco(OutputFormat):
    """Writes `coco.json`: an annotation for each class of each image, with its mask as compressed run lengths.

    Category ids are class ids; a model with one class has the category 1, the foreground. Images that failed are left
    out.
    """

    owned_names = (COCO,)
    table: SideTable

    def __init__(self, card: ModelCard, formats: Sequence[str]) -> None:
        super().__init__(card, formats)
        # With `rle`, both formats share its table. Without it, the table is an intermediate result.
        folder = run_lengths.FOLDER if "rle" in formats else f"{WORK}/rle"
        self.table = SideTable(folder, run_lengths.COLUMNS, run_lengths.rows_of)

    def write(self, result: ImageResult) -> dict[str, Any]:
        return {"rle": result.regions}

    def write_final(self, ledger: Ledger) -> None:
        with storage.writing(storage.join(ledger.out, COCO)) as stream:
            ids = _write_images(stream, ledger)
            self._write_annotations(stream, ledger, ids)
            stream.write(f'],\n"categories": {json.dumps(_categories(self.card))}}}\n'.encode())

    def _write_annotations(self, stream: IO[bytes], ledger: Ledger, ids: dict[str, int]) -> None:
        number = 0
        for table in ledger.side_rows(self.table):
            for row in table.to_pylist():
                number += 1
                annotation = {
                    "id": number,
                    "image_id": ids[row["path"]],
                    "category_id": row["class_id"],
                    "segmentation": {"size": [row["height"], row["width"]], "counts": row["counts"]},
                    "area": row["area"],
                    "bbox": row["bbox"],
                    "iscrowd": 0,
                }
                stream.write((", \n" * (number > 1) + json.dumps(annotation)).encode())


def _write_images(stream: IO[bytes], ledger: Ledger) -> dict[str, int]:
    """Writes the file's beginning, up to its annotations. Returns path -> id of each image."""
    stream.write(b'{"images": [')
    ids: dict[str, int] = {}
    for number, (path, name, height, width) in enumerate(_images(ledger), start=1):
        ids[path] = number
        image = {"id": number, "file_name": name, "height": height, "width": width}
        stream.write((", \n" * (number > 1) + json.dumps(image)).encode())
    stream.write(b'],\n"annotations": [')
    return ids


def _images(ledger: Ledger) -> Iterator[tuple[str, str, int, int]]:
    """Yields (path, name, height, width) of each segmented image, in the order of the manifest."""
    columns = ["path", "status", "height", "width"]
    for shard, table in zip(ledger.shards(), ledger.manifest(columns), strict=True):
        names = [readable(name) for name in ledger.names(shard)]
        for row, name in zip(table.to_pylist(), names, strict=True):
            if row["status"] == "ok":
                yield row["path"], name, row["height"], row["width"]


def _categories(card: ModelCard) -> list[dict[str, Any]]:
    names = [*enumerate(class_names(card))]
    return [{"id": class_id, "name": name} for class_id, name in names[card.model.num_classes == 1 :]]
