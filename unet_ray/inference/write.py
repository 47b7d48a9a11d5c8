"""The stage that writes masks in each format and records them in the ledger."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from unet_ray.data import storage
from unet_ray.data.chunks import Chunk, objects, readable
from unet_ray.inference.formats.base import ImageResult, OutputFormat, location
from unet_ray.inference.ledger import Ledger
from unet_ray.inference.reader import Reader
from unet_ray.inference.segmenter import WholeImage
from unet_ray.inference.stages import TIMES, Prediction
from unet_ray.models.checkpoint import ModelCard

OF_THIS_NAME = (errno.ENAMETOOLONG, errno.EILSEQ, errno.EISDIR, errno.ENOTDIR)
"""Errors that concern one mask; others, such as a full disk, concern all."""


@dataclass(frozen=True, slots=True)
class Write:
    """Writes the masks of a chunk in each format, then its rows into the ledger.

    A row is recorded after its files are written, so all files that the ledger names are there. Returns `number`,
    `status`, `error` and the times of each row.
    """

    ledger: Ledger
    formats: tuple[OutputFormat, ...]
    card: ModelCard
    reader: Reader

    def __call__(self, chunk: Chunk, predictions: Iterator[Prediction]) -> Chunk:
        if not len(chunk["path"]):
            return {}
        rows: list[dict[str, Any]] = []
        for row, prediction in enumerate(predictions):
            started = time.perf_counter()
            result = self._result(chunk, row, prediction)
            times = {**prediction.milliseconds, "write_ms": 1e3 * (time.perf_counter() - started)}
            rows.append({**result, **times, "milliseconds": sum(times.values())})
        results = {name: [row.get(name) for row in rows] for name in self.ledger.result_columns()}
        self.ledger.record(int(chunk["number"][0]), chunk["row"], results)
        return {
            "number": chunk["number"],
            "status": objects(results["status"]),
            "error": objects(results["error"]),
            **{name: np.array([row[name] for row in rows], np.float32) for name in TIMES},
        }

    def _result(self, chunk: Chunk, row: int, prediction: Prediction) -> dict[str, Any]:
        """Writes the files of one image and returns its columns of the ledger."""
        known = {
            "path": storage.without_secrets(readable(chunk["path"][row])),
            "size": chunk["size"][row],
            "mtime_ns": chunk["mtime_ns"][row],
        }
        if prediction.image is None:
            return {**known, **self._failed(chunk, row, prediction.error)}
        try:
            return {**known, **self._written(chunk, row, prediction.image)}
        except OSError as error:
            if error.errno not in OF_THIS_NAME:
                raise
            return {**known, **self._failed(chunk, row, f"its mask cannot be written: {error.strerror}")}

    def _written(self, chunk: Chunk, row: int, image: WholeImage) -> dict[str, Any]:
        output = os.fsdecode(chunk["output"][row])
        result = ImageResult(self.ledger.out, image, output, chunk, row, self.card.model.num_classes, self.reader)
        height, width = image.mask.shape
        columns = {"status": "ok", "error": "", "height": height, "width": width, "output": ""}
        columns |= {"pixels": result.pixels, "confidence": image.confidence}
        for format in self.formats:
            columns |= format.write(result)
        return columns

    def _failed(self, chunk: Chunk, row: int, error: str) -> dict[str, Any]:
        if chunk["redone"][row]:  # an earlier version of the image may have left files
            output = os.fsdecode(chunk["output"][row])
            for format in self.formats:
                for name in format.files(output):
                    storage.delete_file(location(self.ledger.out, name))
        nothing = {"height": 0, "width": 0, "output": "", "pixels": None, "confidence": 0}
        return {"status": "failed", "error": error, **nothing}
