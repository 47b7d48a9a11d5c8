"""One file for all masks: Kaggle's submission, COCO's JSON. Written at the end, from the ledger's Parquet files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from typing import IO, Any

from unet_ray.data import storage
from unet_ray.data.chunks import readable
from unet_ray.inference.ledger import Ledger
from unet_ray.models.checkpoint import ModelCard

SUBMISSION, COCO = "submission.csv", "coco.json"


def write(book: Ledger, formats: Sequence[str], card: ModelCard) -> None:
    """Writes what `formats` names of the two; images that failed are in neither."""
    if "kaggle" in formats:
        with storage.writing(storage.join(book.out, SUBMISSION)) as stream:
            _write_submission(stream, book)
    if "coco" in formats:
        with storage.writing(storage.join(book.out, COCO)) as stream:
            _write_coco(stream, book, card)


def _write_submission(stream: IO[bytes], book: Ledger) -> None:
    """`img,rle_mask`, a line an image, as the Carvana challenge took it: file name, run lengths (`masks.row_runs`)."""
    stream.write(b"img,rle_mask\n")
    for table in book.payload("runs"):
        lines = io.StringIO()
        writer = csv.writer(lines, lineterminator="\n")
        names = (name.rpartition("/")[2] for name in table["name"].to_pylist())
        writer.writerows(zip(names, table["runs"].to_pylist(), strict=True))
        stream.write(lines.getvalue().encode())


def _write_coco(stream: IO[bytes], book: Ledger, card: ModelCard) -> None:
    """COCO's object detection format: an annotation for each class of each image, its mask as compressed run lengths.

    Category ids are class ids (of one class: 1, the foreground).
    """
    stream.write(b'{"images": [')
    ids: dict[str, int] = {}
    for number, (path, name, height, width) in enumerate(_images(book), start=1):
        ids[path] = number
        image = {"id": number, "file_name": name, "height": height, "width": width}
        stream.write((", \n" * (number > 1) + json.dumps(image)).encode())
    stream.write(b'],\n"annotations": [')
    number = 0
    for table in book.payload("rle"):
        for row in table.to_pylist():
            number += 1
            size = [row["height"], row["width"]]
            annotation = {
                "id": number,
                "image_id": ids[row["path"]],
                "category_id": row["class_id"],
                "segmentation": {"size": size, "counts": row["counts"]},
                "area": row["area"],
                "bbox": row["bbox"],
                "iscrowd": 0,
            }
            stream.write((", \n" * (number > 1) + json.dumps(annotation)).encode())
    stream.write(f'],\n"categories": {json.dumps(_categories(card))}}}\n'.encode())


def _images(book: Ledger) -> Iterator[tuple[str, str, int, int]]:
    """(path, name, height, width) of each image that was segmented, in the order of the manifest."""
    for part, table in zip(book.parts(), book.manifest(["path", "status", "height", "width"]), strict=True):
        names = [readable(name) for name in book.names(part)]
        for row, name in zip(table.to_pylist(), names, strict=True):
            if row["status"] == "ok":
                yield row["path"], name, row["height"], row["width"]


def _categories(card: ModelCard) -> list[dict[str, Any]]:
    classes = card.model.num_classes
    if classes == 1:
        return [{"id": 1, "name": card.classes[1] if len(card.classes) > 1 else "foreground"}]
    names = card.classes or tuple(f"class {class_id}" for class_id in range(classes))
    return [{"id": class_id, "name": name} for class_id, name in enumerate(names)]
