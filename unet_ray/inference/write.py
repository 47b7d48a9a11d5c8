"""Writes masks in each format and records them in the ledger."""

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
from unet_ray.data.imaging import ImageError
from unet_ray.inference.formats.base import ImageResult, OutputFormat, output_path
from unet_ray.inference.ledger import Ledger
from unet_ray.inference.reader import Reader
from unet_ray.inference.segmenter import SegmentedMask
from unet_ray.inference.stages import TIMES, Prediction
from unet_ray.models.checkpoint import ModelCard

PATH_ERRORS = (errno.ENAMETOOLONG, errno.EILSEQ, errno.EISDIR, errno.ENOTDIR)
"""Errors of one mask's path, which fail that image alone. Others, such as a full disk, stop the run."""

SECONDS_BETWEEN_CHECKS = 1.0
"""Masks are written for at most so long after the run has lost its lock."""


@dataclass(frozen=True, slots=True)
class Write:
    """Writes the masks of a chunk in each format, then records its rows in the ledger. It is a `stages.MaskSink`.

    Files are written, and stored by the disk, before their rows are recorded: every file that the ledger names exists,
    also after a power cut. Returns the columns `number`, `status`, `error` and those of `stages.TIMES`.
    """

    ledger: Ledger
    formats: tuple[OutputFormat, ...]
    card: ModelCard
    reader: Reader

    def __call__(self, chunk: Chunk, predictions: Iterator[Prediction]) -> Chunk:
        if not len(chunk["path"]):
            return {}
        rows: list[dict[str, Any]] = []
        touched: list[str] = []
        checked = float("-inf")
        for row, prediction in enumerate(predictions):
            started = time.perf_counter()
            if started - checked > SECONDS_BETWEEN_CHECKS:
                self.ledger.check_lock()
                checked = started
            columns = self._write_image(chunk, row, prediction, touched)
            times = {**prediction.milliseconds, "write_ms": 1e3 * (time.perf_counter() - started)}
            rows.append({**columns, **times, "milliseconds": sum(times.values())})
        results = {name: [row.get(name) for row in rows] for name in self.ledger.result_columns()}
        storage.sync(touched)  # once for the chunk, because the disk stores many files together
        self.ledger.record(int(chunk["number"][0]), chunk["row"], results)
        return {
            "number": chunk["number"],
            "status": objects(results["status"]),
            "error": objects(results["error"]),
            **{name: np.array([row[name] for row in rows], np.float32) for name in TIMES},
        }

    def _write_image(self, chunk: Chunk, row: int, prediction: Prediction, touched: list[str]) -> dict[str, Any]:
        """Writes the files of one image, and adds their locations to `touched`. Returns its columns of the ledger."""
        of_input = {
            "path": storage.without_secrets(readable(chunk["path"][row])),
            "size": chunk["size"][row],
            "mtime_ns": chunk["mtime_ns"][row],
            "checksum": prediction.checksum,
        }
        if prediction.segmented is None:
            return {**of_input, **self._fail(chunk, row, prediction.error, touched)}
        try:
            return {**of_input, **self._write_mask(chunk, row, prediction.segmented, touched)}
        except OSError as error:
            if error.errno not in PATH_ERRORS:
                raise
            return {**of_input, **self._fail(chunk, row, f"its mask cannot be written: {error.strerror}", touched)}
        except ImageError as error:
            return {**of_input, **self._fail(chunk, row, str(error), touched)}

    def _write_mask(self, chunk: Chunk, row: int, segmented: SegmentedMask, touched: list[str]) -> dict[str, Any]:
        """Writes a mask in each format. Returns the image's columns of the ledger."""
        output = os.fsdecode(chunk["output"][row])
        classes = self.card.model.num_classes
        result = ImageResult(self.ledger.out, segmented, output, chunk, row, classes, self.reader, touched)
        height, width = segmented.mask.shape
        columns = {"status": "ok", "error": "", "height": height, "width": width, "output": ""}
        columns |= {"pixels": result.pixels, "confidence": segmented.confidence, "uncertainty": segmented.uncertainty}
        for format in self.formats:
            columns |= format.write(result)
        return columns

    def _fail(self, chunk: Chunk, row: int, error: str, touched: list[str]) -> dict[str, Any]:
        """Deletes the files that an earlier version of the image, or a run that was killed, may have left. Returns the
        columns of its failure."""
        output = os.fsdecode(chunk["output"][row])
        for format in self.formats:
            for name in format.files(output):
                location = output_path(self.ledger.out, name)
                try:
                    storage.delete_file(location)
                except OSError as problem:
                    if problem.errno not in PATH_ERRORS:  # a name that can't be written can't be there either
                        raise
                else:
                    touched.append(location)
        nothing = {"height": 0, "width": 0, "output": "", "pixels": None, "confidence": 0, "uncertainty": 0}
        return {"status": "failed", "error": error, **nothing}
