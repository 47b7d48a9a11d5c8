"""Reads the scores of a pool of images from the ledger of their prediction."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unet_ray.data import storage
from unet_ray.data.inputs import ImageFile
from unet_ray.inference.ledger import SHARD_ROWS, Ledger
from unet_ray.selection.choose import classes_shown

INPUTS = ["path", "name", "size", "mtime_ns", "source", "source_row"]


@dataclass(frozen=True, slots=True)
class Pool:
    """Holds the N images of a pool that can be read and have no label. Memory: some ten bytes for each."""

    ledger: Ledger
    places: np.ndarray
    """Row of each image among all, int64 [N]: shard times `SHARD_ROWS` plus its row there."""
    uncertainty: np.ndarray
    """float32 [N]."""
    presence: np.ndarray
    """Which classes each image shows, bool [N,K]."""
    labelled: int
    """Images of the listing that are left out because they have labels."""

    @classmethod
    def read(cls, ledger: Ledger, labelled: Collection[str]) -> Pool:
        """Reads the ledger of a complete prediction. `labelled`: locations of the images that have labels."""
        places, uncertainty, shown, left_out = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)], [], 0
        for shard in ledger.shards():
            [table] = ledger.manifest(["status", "uncertainty", "pixels"], [shard])
            known = np.array([plain(path) in labelled for path in ledger.locations(shard).to_pylist()], bool)
            ok = pc.equal(table["status"], "ok").to_numpy() & ~known
            left_out += int(known.sum())
            rows = np.flatnonzero(ok)
            if len(rows):
                places.append(shard * SHARD_ROWS + rows)
                uncertainty.append(table["uncertainty"].to_numpy()[rows])
                shown.append(classes_shown(_matrix(table["pixels"].take(pa.array(rows)))))
        together = np.concatenate(shown) if shown else np.zeros((0, 2), bool)
        return cls(ledger, np.concatenate(places), np.concatenate(uncertainty), together, left_out)

    def inputs(self, rows: Sequence[int]) -> dict[str, list[Any]]:
        """Returns the ledger's columns of some images, `INPUTS`, with `row`, their place in this pool."""
        found: dict[str, list[Any]] = {name: [] for name in INPUTS}
        for table in self._rows(rows, lambda shard: self.ledger.inputs(shard, INPUTS)):
            for name in INPUTS:
                found[name].append(table[name][0].as_py())
        return {"row": list(rows), **found}

    def manifest_rows(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Returns `path`, `uncertainty` and `pixels` of some images."""
        columns = ["path", "uncertainty", "pixels"]
        tables = self._rows(rows, lambda shard: next(iter(self.ledger.manifest(columns, [shard]))))
        return [row for table in tables for row in table.to_pylist()]

    def _rows(self, rows: Sequence[int], read: Callable[[int], pa.Table]) -> Iterator[pa.Table]:
        """Yields a table of one row for each of `rows`. `read` gets the number of a shard; each is read once."""
        tables: dict[int, pa.Table] = {}
        for place in self.places[list(rows)].tolist():
            shard, row = divmod(place, SHARD_ROWS)
            if shard not in tables:
                tables[shard] = read(shard)
            yield tables[shard].slice(row, 1)

    def image_files(self, rows: Sequence[int]) -> list[ImageFile]:
        """Returns some images as a listing finds them."""
        columns = self.inputs(rows)
        return [
            ImageFile(
                key=os.path.splitext(os.fsdecode(name))[0],  # noqa: PTH122 - may be no UTF-8
                path=os.fsdecode(path),
                name=os.fsdecode(name),
                size=size,
                mtime_ns=mtime_ns,
                source=os.fsdecode(source),
                row=source_row,
            )
            for path, name, size, mtime_ns, source, source_row in zip(*(columns[name] for name in INPUTS), strict=True)
        ]


def plain(path: bytes | str) -> str:
    """Returns a location by which an image is known again: without a bucket's options."""
    return storage.split_options(os.fsdecode(path))[0]


def _matrix(pixels: pa.ChunkedArray) -> np.ndarray:
    """Returns a column of equally long lists as a matrix, int64 [N,K]."""
    return pc.list_flatten(pixels).to_numpy().reshape(len(pixels), -1)
