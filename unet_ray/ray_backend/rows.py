"""Decodes training rows with Ray Data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import DataContext

from unet_ray.config import UserError
from unet_ray.data import cache
from unet_ray.data.pairs import Pair
from unet_ray.data.rows import Batch, Decodes
from unet_ray.keys import Keys
from unet_ray.ray_backend.data_context import configure

TASKS_AT_ONCE = 1000
ROWS_PER_BLOCK = 16
"""Decoded rows per block: 16 MB at 512²; small enough to spread over many CPUs, large enough to be worth a task."""


@dataclass(frozen=True, slots=True)
class DecodePairs:
    """Decodes a table of pairs. A pair that can't be used carries the reason in the column `error`."""

    decoder: Decodes
    keys: Keys = field(default_factory=Keys)

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
    """Returns lazily decoded rows, one block per group of row numbers, with columns index, image, mask, error."""
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


class _Opened(NamedTuple):
    """Blocks of rows that are mapped into this process."""

    places: np.ndarray
    """(block, offset) of each row, int64 [M,2]."""
    columns: list[dict[str, np.ndarray]]
    """Columns of each block: name -> values of its rows."""


class MaterialisedRows:
    """Keeps rows that Ray Data decodes once, as uint8 in the cluster's object store, for all workers.

    Any worker can read any row: without a copy on its own node, with one copy of a block from another node. So the
    batches of an epoch can be the same for every number of workers.
    """

    def __init__(self, pairs: Sequence[Pair], decoder: Decodes) -> None:
        self.count = len(pairs)
        groups = np.array_split(np.arange(self.count), -(-self.count // ROWS_PER_BLOCK))
        dataset = _dataset_of(pairs, groups, decoder).materialize()
        self.blocks = dataset.to_arrow_refs()
        # Collect the errors where the blocks are, so that the blocks stay there.
        for error in chain.from_iterable(ray.get([_errors_of.remote(block) for block in self.blocks])):
            raise UserError(error)
        self._opened: _Opened | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"count": self.count, "blocks": self.blocks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _opened=None)

    def __len__(self) -> int:
        return self.count

    def _open(self) -> _Opened:
        """Maps every block into this process."""
        places, columns_of_blocks = np.empty((self.count, 2), np.int64), []
        for number, block in enumerate(ray.get(self.blocks)):
            # Views of shared memory, not copies.
            names = [name for name in block.column_names if name not in ("index", "error")]
            columns = {name: block[name].combine_chunks().to_numpy_ndarray() for name in names}
            index = block["index"].to_numpy()
            places[index] = np.stack([np.full(len(index), number), np.arange(len(index))], axis=1)
            columns_of_blocks.append(columns)
        return _Opened(places, columns_of_blocks)

    def batches(self, plan: Sequence[np.ndarray]) -> Iterator[Batch]:
        if self._opened is None:
            self._opened = self._open()
        places, columns = self._opened
        for indices in plan:
            batch = {
                name: np.stack([columns[block][name][offset] for block, offset in places[indices]])
                for name in columns[0]
            }
            yield {**batch, "index": indices}


class RayStreamedRows:
    """Streams rows to this worker in order; Ray Data tasks anywhere on the cluster decode them in every epoch."""

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
            # Blocks are read-only views of shared memory. They are copied, since torch needs writable arrays.
            yield {name: values.copy() for name, values in batch.items() if name != "error"}


@ray.remote
def _error_of_writing(write: cache.Write, pairs: cache.Pairs, _keys: Keys) -> str | None:
    try:
        write(pairs)
    except UserError as error:
        return str(error)
    return None


def run_in_tasks(write: cache.Write, shards: list[cache.Pairs]) -> Iterator[None]:
    """Calls a function with each list of pairs, each in a task anywhere on the cluster: a `cache.Run`.

    Raises UserError if a pair can't be used.
    """
    shared = ray.put(write)
    rest = (_error_of_writing.remote(shared, pairs, Keys()) for pairs in shards)
    pending = list(islice(rest, TASKS_AT_ONCE))
    while pending:
        done, pending = ray.wait(pending)
        for error in ray.get(done):
            if error is not None:
                raise UserError(error)
            pending += islice(rest, 1)
            yield
