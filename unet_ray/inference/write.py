"""The stage that writes masks in each format and records them."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from unet_ray.data import masks, pictures, run_lengths, storage
from unet_ray.data.chunks import Chunk, objects, readable
from unet_ray.data.imaging import ImageError
from unet_ray.inference.ledger import Ledger
from unet_ray.inference.reader import Reader
from unet_ray.inference.segmenter import WholeImage
from unet_ray.inference.stages import Prediction
from unet_ray.models.checkpoint import ModelCard

MASKS, PROBABILITIES, OVERLAYS = "masks", "probabilities", "overlays"


@dataclass(frozen=True, slots=True)
class Write:
    """Writes the masks in each format, then what was found of each row into the ledger.

    Returns `status` and `error` of each row, and its times. A row of the ledger is written after the row's files: what
    it names is done.
    """

    ledger: Ledger
    formats: tuple[str, ...]
    card: ModelCard
    reader: Reader

    def __call__(self, chunk: Chunk, predictions: Iterator[Prediction]) -> Chunk:
        count = len(chunk["path"])
        if not count:
            return {}
        rows: list[dict[str, Any]] = []
        milliseconds = np.zeros(count, np.float32)
        for row, prediction in enumerate(predictions):
            started = time.perf_counter()
            result = self._failed(chunk, row, prediction) if isinstance(prediction, str) else {}
            if isinstance(prediction, WholeImage):
                try:
                    result = self._written(chunk, row, prediction)
                except OSError as error:
                    # Of this name alone; a full disk, say, is everybody's trouble.
                    if error.errno not in (errno.ENAMETOOLONG, errno.EILSEQ, errno.EISDIR, errno.ENOTDIR):
                        raise
                    result = self._failed(chunk, row, f"its mask cannot be written: {error.strerror}")
            rows.append(result)
            milliseconds[row] = 1e3 * (time.perf_counter() - started)
        times = {"decode_ms": chunk["decode_ms"], "model_ms": chunk["model_ms"], "write_ms": milliseconds}
        told = ("status", "error", "height", "width", "output", "pixels", "confidence", "mask", "rle", "runs")
        results: dict[str, Any] = {name: [row.get(name) for row in rows] for name in told}
        results |= {
            "path": [storage.without_secrets(readable(path)) for path in chunk["path"]],
            "name": [readable(name) for name in chunk["name"]],
            "size": chunk["size"],
            "mtime_ns": chunk["mtime_ns"],
            "milliseconds": sum(times.values()),
        }
        self.ledger.record(int(chunk["number"][0]), chunk["row"], results)
        return {
            "number": chunk["number"],
            "status": objects(results["status"]),
            "error": objects(results["error"]),
            **times,
        }

    def _failed(self, chunk: Chunk, row: int, error: str) -> dict[str, Any]:
        if chunk["redone"][row]:  # what an earlier version of the image has left
            for location in self._files(os.fsdecode(chunk["output"][row])):
                storage.delete_file(location)
        nothing = {"height": 0, "width": 0, "output": "", "pixels": None, "confidence": 0}
        return {"status": "failed", "error": error, **nothing}

    def _files(self, output: str) -> list[str]:
        """All files that an image can have."""
        stem = output.rpartition(".")[0]
        found = [self._at(MASKS, output), self._at(OVERLAYS, f"{stem}.jpg")]
        return found + [self._at(PROBABILITIES, name) for name in self._map_names(output)]

    def _at(self, folder: str, name: str) -> str:
        return storage.join(self.ledger.out, folder, *name.split("/"))

    def _map_names(self, output: str) -> list[str]:
        classes = self.card.model.num_classes
        stem = output.rpartition(".")[0]
        return [output] if classes == 1 else [f"{stem}.{class_id}.png" for class_id in range(classes)]

    def _written(self, chunk: Chunk, row: int, whole: WholeImage) -> dict[str, Any]:
        mask, classes = whole.mask, self.card.model.num_classes
        output = os.fsdecode(chunk["output"][row])
        counted = masks.pixel_counts(mask, max(2, classes))
        result = {
            "status": "ok",
            "error": "",
            "height": mask.shape[0],
            "width": mask.shape[1],
            "output": f"{MASKS}/{readable(chunk['output'][row])}" if "png" in self.formats else "",
            "pixels": counted,
            "confidence": whole.confidence,
        }
        if {"png", "parquet"} & set(self.formats):
            result["mask"] = pictures.encode_png(mask, classes)
        if "png" in self.formats:
            storage.write_bytes(self._at(MASKS, output), result["mask"])
        if {"rle", "coco"} & set(self.formats):
            # One class is the foreground alone; of several, each that occurs.
            result["rle"] = [
                {"class_id": class_id, "area": counted[class_id], **run_lengths.coco_region(mask == class_id)}
                for class_id in range(int(classes == 1), len(counted))
                if counted[class_id]
            ]
        if "kaggle" in self.formats:
            result["runs"] = run_lengths.row_runs(mask)
        if whole.probabilities is not None:
            for name, values in zip(self._map_names(output), whole.probabilities, strict=True):
                storage.write_bytes(self._at(PROBABILITIES, name), pictures.encode_gray(values))
        if "overlay" in self.formats:
            self._write_overlay(chunk, row, mask, f"{output.rpartition('.')[0]}.jpg")
        return result

    def _write_overlay(self, chunk: Chunk, row: int, mask: np.ndarray, name: str) -> None:
        # Read again, small: at its own size the picture is nowhere else on the way.
        one = {key: values[row : row + 1] for key, values in chunk.items()}
        try:
            drawn = self.reader.overlay(next(self.reader.encoded(one)), mask, self.card.model.num_classes)
        except ImageError:  # gone or changed meanwhile: the mask is what counts
            return
        storage.write_bytes(self._at(OVERLAYS, name), drawn)
