"""Samples the manifest for the page of a prediction: a bounded amount, however long the manifest is."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

COLUMNS = ["path", "status", "error", "height", "width", "output", "pixels", "uncertainty", "milliseconds"]
GALLERY = 12
"""Images in each gallery."""
NAMES = 5
"""The most paths for each reason of failure."""


class ManifestSample:
    """Collects rows of the manifest, table by table."""

    def __init__(self) -> None:
        self.count = 0
        """Number of rows."""
        self.ok = 0
        """Number of rows that are not failures."""
        self.names: dict[str, list[str]] = {}
        """Reason of failure -> some of the paths."""
        self.pixels: np.ndarray = np.zeros(0, np.int64)
        """Pixels of each class, int64 [K]."""
        self._foreground: list[np.ndarray] = []
        self._uncertainty: list[np.ndarray] = []
        self._least_sure: list[tuple[float, str, dict[str, Any]]] = []
        self._random: list[tuple[str, str, dict[str, Any]]] = []

    def add(self, table: pa.Table) -> None:
        """Adds rows of the manifest, with the column `location` beside `COLUMNS`."""
        self.count += len(table)
        failed = table.filter(pc.equal(table["status"], "failed"))
        for path, error in zip(failed["path"].to_pylist(), failed["error"].to_pylist(), strict=True):
            names = self.names.setdefault(error, [])
            if len(names) < NAMES:
                names.append(path)
        ok = table.filter(pc.equal(table["status"], "ok"))
        if not len(ok):
            return
        self.ok += len(ok)
        pixels = np.stack(ok["pixels"].to_pylist())
        self.pixels = pixels.sum(axis=0) + (self.pixels if len(self.pixels) else 0)
        self._foreground.append(1 - pixels[:, 0] / np.maximum(1, pixels.sum(axis=1)))
        uncertainty = ok["uncertainty"].to_numpy()
        self._uncertainty.append(uncertainty)
        for i in np.argsort(-uncertainty, kind="stable")[:GALLERY].tolist():
            row = ok.slice(i, 1).to_pylist()[0]
            if row["uncertainty"] is not None:
                self._least_sure.append((-row["uncertainty"], row["path"], row))
        self._least_sure = sorted(self._least_sure, key=lambda entry: entry[:2])[:GALLERY]
        # A hash of the path chooses the same dozen on every machine and in every run.
        hashes = [hashlib.sha256(path.encode()).hexdigest() for path in ok["path"].to_pylist()]
        for i in np.argsort(hashes)[:GALLERY].tolist():
            row = ok.slice(i, 1).to_pylist()[0]
            self._random.append((hashes[i], row["path"], row))
        self._random = sorted(self._random, key=lambda entry: entry[:2])[:GALLERY]

    def foreground(self) -> np.ndarray:
        """Returns the share of pixels that are not background, float64 [N]."""
        return np.concatenate(self._foreground)

    def uncertainty(self) -> np.ndarray:
        """Returns the uncertainty of each image, float32 [N]; NaN if version 0.1 has segmented it."""
        return np.concatenate(self._uncertainty)

    def least_sure(self) -> list[dict[str, Any]]:
        """Returns the rows with the highest uncertainty, the highest first."""
        return [row for _, _, row in self._least_sure]

    def random(self) -> list[dict[str, Any]]:
        """Returns rows chosen by a hash of the path."""
        return [row for _, _, row in self._random]
