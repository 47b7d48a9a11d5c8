"""Writes `labelstudio`: one JSON file of tasks with predictions, to correct them in Label Studio."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa

from unet_ray.data import polygons, storage
from unet_ray.data.annotations.drawing import packed_brush
from unet_ray.inference.formats.base import ImageResult, OutputFormat, class_names
from unet_ray.inference.ledger import WORK, Ledger, SideTable
from unet_ray.models.checkpoint import ModelCard

TASKS = "label_studio.json"
LOCAL = "/data/local-files/?d="
"""Label Studio's address of files below LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT, which is to be the images' folder."""
BACKGROUND = "background"
"""Label of a hole, which is drawn after what it is in."""


def rows_of(results: pa.Table) -> pa.Table:
    return results.select(["path", "confidence", "image_name", "results"])


class LabelStudio(OutputFormat):
    """Writes `label_studio.json`: a task for each image, with polygons that give the mask back with an IoU of 0.99 or
    more for each class. A class for which none do is a brush."""

    owned_names = (TASKS,)
    table = SideTable(f"{WORK}/tasks", pa.schema([("image_name", pa.string()), ("results", pa.string())]), rows_of)

    def __init__(self, card: ModelCard, formats: Sequence[str]) -> None:
        super().__init__(card, formats)
        self.model = f"unet-ray {card.weights_sha256[:8]}"

    def write(self, result: ImageResult) -> dict[str, Any]:
        return {"image_name": result.name, "results": json.dumps(_results(result.mask, self.card))}

    def write_final(self, ledger: Ledger) -> None:
        with storage.writing(storage.join(ledger.out, TASKS)) as stream:
            stream.write(b"[")
            number = 0
            for table in ledger.side_rows(self.table):
                for row in table.to_pylist():
                    prediction = {"model_version": self.model, "score": round(row["confidence"], 4)}
                    prediction["result"] = json.loads(row["results"])
                    task = {"data": {"image": LOCAL + quote(row["image_name"])}, "predictions": [prediction]}
                    stream.write((",\n" * bool(number) + json.dumps(task)).encode())
                    number += 1
            stream.write(b"]\n")


def _results(mask: np.ndarray, card: ModelCard) -> list[dict[str, Any]]:
    names = class_names(card)
    height, width = mask.shape
    percent = np.array([width / 100, height / 100])  # pixels

    def stored(points: np.ndarray) -> np.ndarray:
        return (points / percent).round(5)

    rings, bad = polygons.outlined(mask, "polygons", lambda points: stored(points) * percent)
    found = []
    for ring in rings:
        if ring.class_id not in bad:
            points = stored(ring.points).tolist()
            label = names[ring.class_id] if ring.class_id else BACKGROUND
            value = {"points": points, "closed": True, "polygonlabels": [label]}
            found.append(_result("polygonlabels", value, mask.shape))
    for class_id in bad:
        rle = packed_brush(mask == class_id)
        value = {"format": "rle", "rle": rle, "brushlabels": [names[class_id]]}
        found.append(_result("brushlabels", value, mask.shape))
    return found


def _result(kind: str, value: dict[str, Any], size_hw: tuple[int, ...]) -> dict[str, Any]:
    digest = hashlib.blake2b(json.dumps(value).encode(), digest_size=5).hexdigest()
    return {
        "id": digest,
        "type": kind,
        "from_name": "label",
        "to_name": "image",
        "original_width": size_hw[1],
        "original_height": size_hw[0],
        "image_rotation": 0,
        "value": value,
    }
