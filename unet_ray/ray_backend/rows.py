"""Training rows decoded by Ray Data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import DataContext

from unet_ray.config import UserError
from unet_ray.data import cache
from unet_ray.data.pairs import Pair
from unet_ray.data.rows import Batch, Decodes
from unet_ray.ray_backend.data_context import configure

ROWS_A_BLOCK = 16
"""Decoded rows a block: 16 MB at 512²; small enough to spread over many CPUs, large enough to be worth a task."""


@dataclass(frozen=True, slots=True)
class DecodePairs:
    """Table of pairs -> rows; a pair that can't be used carries its reason in `error`."""

    decoder: Decodes

    def __call__(self, table: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        count = len(table["index"])
        decoded = self.decoder.empty(count)
        errors = np.full(count, "", dtype=object)
        for row in range(count):
            try:
                for name, values in self.decoder(str(table["image"][row]), str(table["mask"][row])).items():
                    decoded[name][row] = values
            except UserError as error:
                errors[row] = str(error)
        return {"index": table["index"], **decoded, "error": errors}


def _dataset_of(pairs: Sequence[Pair], groups: Sequence[np.ndarray], decoder: Decodes) -> ray.data.Dataset:
    """Lazily decoded rows, one block for each group of row numbers, with columns index, image, mask, error."""
    tables = [
        pa.table(
            {
                "index": np.asarray(group, np.int64),
                "image": [pairs[index].image for index in group],
                "mask": [pairs[index].mask for index in group],
            }
        )
        for group in groups
    ]
    return ray.data.from_arrow(tables).map_batches(DecodePairs(decoder), batch_size=None, batch_format="numpy")


@ray.remote(num_cpus=0)
def _errors_of(block: pa.Table) -> list[str]:
    return [error for error in block["error"].to_pylist() if error]


class MaterialisedRows:
    """Rows decoded once by Ray Data, held in the cluster's object store as uint8 and shared by all workers.

    Any worker reads any row: on its own node without a copy, from another node once. That is what lets the batches of
    an epoch be the same for every number of workers.
    """

    def __init__(self, pairs: Sequence[Pair], decoder: Decodes) -> None:
        self.count = len(pairs)
        groups = np.array_split(np.arange(self.count), -(-self.count // ROWS_A_BLOCK))
        dataset = _dataset_of(pairs, groups, decoder).materialize()
        self.blocks = dataset.to_arrow_refs()
        # Asked where the blocks are, rather than brought here.
        for error in chain.from_iterable(ray.get([_errors_of.remote(block) for block in self.blocks])):
            raise UserError(error)
        self._place: np.ndarray | None = None
        self._columns: list[dict[str, np.ndarray]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"count": self.count, "blocks": self.blocks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _place=None, _columns=[])

    def __len__(self) -> int:
        return self.count

    def _open(self) -> np.ndarray:
        """Maps every block into this process; returns (block, offset) of each row, int64 [M,2]."""
        place = np.empty((self.count, 2), np.int64)
        for number, block in enumerate(ray.get(self.blocks)):
            # Views of shared memory, not copies.
            names = [name for name in block.column_names if name not in ("index", "error")]
            columns = {name: block[name].combine_chunks().to_numpy_ndarray() for name in names}
            index = block["index"].to_numpy()
            place[index] = np.stack([np.full(len(index), number), np.arange(len(index))], axis=1)
            self._columns.append(columns)
        return place

    def batches(self, plan: Sequence[np.ndarray]) -> Iterator[Batch]:
        if self._place is None:
            self._place = self._open()
        for indices in plan:
            where = self._place[indices]
            batch = {
                name: np.stack([self._columns[block][name][offset] for block, offset in where])
                for name in self._columns[0]
            }
            yield {**batch, "index": indices}


class RayStreamedRows:
    """Rows decoded anew in every epoch by Ray Data tasks anywhere on the cluster, streamed to this worker in order."""

    def __init__(self, pairs: Sequence[Pair], decoder: Decodes) -> None:
        self.pairs, self.decoder = pairs, decoder

    def __len__(self) -> int:
        return len(self.pairs)

    def batches(self, plan: Sequence[np.ndarray]) -> Iterator[Batch]:
        if not len(plan):
            return
        configure()
        DataContext.get_current().execution_options.preserve_order = True
        dataset = _dataset_of(self.pairs, plan, self.decoder)
        for batch in dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2):
            for error in batch["error"]:
                if error:
                    raise UserError(error)
            # A copy: blocks are read-only views of shared memory, which torch must not be given.
            yield {name: values.copy() for name, values in batch.items() if name != "error"}


@ray.remote
def _error_of_writing(write: cache.Write, part: cache.Pairs) -> str | None:
    try:
        write(part)
    except UserError as error:
        return str(error)
    return None


def fill_cache(write: cache.Write, parts: list[cache.Pairs]) -> Iterator[None]:
    """For `cache.filled`: a task for each part, anywhere on the cluster."""
    shared = ray.put(write)
    waiting = [_error_of_writing.remote(shared, part) for part in parts]
    while waiting:
        done, waiting = ray.wait(waiting)
        for error in ray.get(done):
            if error is not None:
                raise UserError(error)
            yield
