"""Writes the images of the inputs into the ledger, in shards, with the path of each mask."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import pyarrow as pa

from unet_ray.data import storage
from unet_ray.data.chunks import objects, to_parquet
from unet_ray.data.inputs import ImageFile
from unet_ray.inference.chunk_size import RowCost, chunk_rows
from unet_ray.inference.digests import DigestMap, digests_of
from unet_ray.inference.ledger import SHARD_ROWS, Ledger
from unet_ray.inference.parts import Proposals
from unet_ray.inference.reader import Reader, checksum

log = logging.getLogger("unet_ray")

INPUTS_SCHEMA = pa.schema(
    # Names are bytes, because a file system's names need not be UTF-8.
    [
        ("path", pa.binary()),
        ("name", pa.binary()),
        ("output", pa.binary()),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("source", pa.binary()),
        ("source_row", pa.int64()),
    ]
)


CHECKSUM_THREADS, CHECKSUMS_AT_ONCE = 16, 64
"""Threads that read images, more than processors because a disk or bucket takes part of the time; images for each."""


class Survey:
    """Adds new images to the ledger, and renews the size and time of changed ones.

    `reader` reads the images of another time but the same size, to compare checksums: those whose content is the same
    are not changed. None: they are. Memory grows by about 60 bytes per image.
    """

    def __init__(self, ledger: Ledger, cost: RowCost, reader: Reader | None = None) -> None:
        self.ledger, self.reader = ledger, reader
        self.known, self.taken = DigestMap(), DigestMap()
        """Paths of the images and of their masks -> row, counted over all shards."""
        self._read_earlier()
        self.rows = self.earlier = len(self.sizes)
        self.seen = np.zeros(self.earlier, bool)
        """Which of the earlier images this listing contains, bool [N]."""
        self.unseen = np.diff(self.bounds)
        """How many images of each earlier shard it does not contain so far, int [S]; negative: one has changed."""
        self.changed: dict[int, tuple[int, int]] = {}
        """Row of an earlier image -> its new size and time."""
        self.count = 0
        """Different images in this listing."""
        self.twice = 0
        """Lines that named an image again."""
        self.ready: list[int] = []
        """Shards that can be worked on: new ones, and those of earlier runs of which this listing has all images, and
        none has changed. Once it is `complete`, all shards."""
        self.complete = False
        self.writer = _ShardWriter(ledger, cost, self.ready)

    def add_all(self, images: Iterable[ImageFile], outputs_of: Proposals) -> None:
        """Adds images, shard by shard. `outputs_of` proposes paths for the mask of each; the first that no other image
        has is taken. `close` adds the last shard, and renews the images that have changed."""
        images = iter(images)
        while batch := list(islice(images, SHARD_ROWS)):
            self._add(batch, outputs_of)

    @property
    def renewed(self) -> set[int]:
        """Earlier shards in which images have changed."""
        return {self.shards[place] for place in np.flatnonzero(self.unseen < 0)}

    def _read_earlier(self) -> None:
        sizes, times, count = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
        self.shards, bounds = self.ledger.shards(), [0]
        for shard in self.shards:
            table = self.ledger.inputs(shard, ["path", "output", "size", "mtime_ns"])
            rows = np.arange(count, count + len(table))
            self.known.add(digests_of(table["path"].to_pylist()), rows)
            self.taken.add(digests_of(table["output"].to_pylist()), rows)
            sizes.append(table["size"].to_numpy())
            times.append(table["mtime_ns"].to_numpy())
            count += len(table)
            bounds.append(count)
        self.sizes, self.times = np.concatenate(sizes), np.concatenate(times)
        self.bounds = np.array(bounds)
        """The row at which each earlier shard begins, then the number of rows, int [S+1]."""

    def _add(self, batch: list[ImageFile], outputs_of: Proposals) -> None:
        digests = digests_of([os.fsencode(image.path) for image in batch])
        new, earlier = self._new(batch, digests)
        self._settle(earlier)
        if not new:
            return
        images = [batch[place] for place in new]
        outputs, output_digests = self._free_outputs(images, outputs_of)
        for image, output in zip(images, outputs, strict=True):
            self.writer.add(image, output)
        self.known.add(digests[new], np.arange(self.rows, self.rows + len(new)))
        self.taken.add(output_digests, np.zeros(len(new), np.int64))
        self.rows += len(new)
        self.count += len(new)

    def _new(self, batch: list[ImageFile], digests: np.ndarray) -> tuple[list[int], list[int]]:
        """Returns the places in the batch of images that are in no shard yet, and the rows of the others."""
        new, earlier = [], []
        in_batch: set[bytes] = set()
        for place, row in enumerate(self.known.find(digests).tolist()):
            digest = digests[place].tobytes()
            if row >= self.earlier or digest in in_batch or (row >= 0 and self.seen[row]):
                self.twice += 1
                continue
            in_batch.add(digest)
            if row >= 0:
                self._note_earlier(row, batch[place])
                earlier.append(row)
            else:
                new.append(place)
        return new, earlier

    def _note_earlier(self, row: int, image: ImageFile) -> None:
        self.count += 1
        self.seen[row] = True
        if (image.size, image.mtime_ns) != (self.sizes[row], self.times[row]):
            self.changed[row] = (image.size, image.mtime_ns)

    def _settle(self, rows: list[int]) -> None:
        """Counts these rows as seen. Earlier shards that are thereby seen whole are ready, if nothing has changed."""
        changed = self._places([row for row in rows if row in self.changed])
        self.unseen[changed] = -1  # and never 0 again: such a shard is ready once it is renewed
        places, counts = np.unique(self._places(rows), return_counts=True)
        self.unseen[places] -= counts
        self.ready += [self.shards[place] for place in places[self.unseen[places] == 0]]

    def _places(self, rows: list[int]) -> np.ndarray:
        """Returns the place of each row's shard among the earlier ones."""
        return np.searchsorted(self.bounds, np.array(rows, np.int64), side="right") - 1

    def _free_outputs(self, images: list[ImageFile], outputs_of: Proposals) -> tuple[list[bytes], np.ndarray]:
        """Returns an unused path for each image's mask, and the digests of the paths."""
        proposals = [outputs_of(image) for image in images]
        outputs = [os.fsencode(next(proposal)) for proposal in proposals]
        digests = digests_of(outputs).copy()
        in_batch: set[bytes] = set()
        for place, used in enumerate(self.taken.find(digests) >= 0):
            while used or digests[place].tobytes() in in_batch:
                outputs[place] = os.fsencode(next(proposals[place]))
                digests[place] = digests_of([outputs[place]])[0]
                used = self.taken.find(digests[place][None])[0] >= 0
            in_batch.add(digests[place].tobytes())
        return outputs, digests

    def close(self) -> None:
        """Writes the last shard, and renews the images that have changed, in whose shards nobody may work meanwhile."""
        self.writer.close()
        if self.twice:
            log.warning("%d images are listed more than once: each is done once", self.twice)
        if self.changed:
            self._renew_changed()
        self.ready += sorted({*self.shards} - {*self.ready})
        self.complete = True
        self.known = self.taken = DigestMap()  # gives the memory back: the work may take much longer than the listing

    def _renew_changed(self) -> None:
        sizes = sum(size != self.sizes[row] for row, (size, _) in self.changed.items())
        same = _renew(self.ledger, self.changed, self.reader)
        if same:
            log.warning("%d images have other times and the same content: they are kept", same)
        kinds = {"other sizes": sizes, "other times": len(self.changed) - sizes - same}
        said = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
        if said:
            advice = "" if self.reader or not kinds["other times"] else " (--same-content compares their bytes instead)"
            log.warning(
                "%d images have changed since the earlier run (%s): they are done again%s",
                len(self.changed) - same,
                said,
                advice,
            )


def _renew(ledger: Ledger, changed: dict[int, tuple[int, int]], reader: Reader | None) -> int:
    """Writes the new sizes and times of changed images into their shards. Returns the number of those whose content is
    the same, which are not to be done again (with a `reader`)."""
    first = same = 0
    for shard in ledger.shards():
        file = ledger.open_inputs(shard)
        table = file.read()
        mine = {row - first: new for row, new in changed.items() if first <= row < first + len(table)}
        first += len(table)
        if not mine:
            continue
        sizes, times = table["size"].to_numpy().copy(), table["mtime_ns"].to_numpy().copy()
        if reader is not None:
            touched = {row: mtime_ns for row, (size, mtime_ns) in mine.items() if size == sizes[row]}
            same += len(ledger.same_content(shard, _checksums(table, touched, reader)))
        for row, (size, mtime_ns) in mine.items():
            sizes[row], times[row] = size, mtime_ns
        for name, values in (("size", sizes), ("mtime_ns", times)):
            table = table.set_column(table.schema.get_field_index(name), name, pa.array(values))
        _write_inputs(ledger, shard, table, file.metadata.row_group(0).num_rows)
    return same


def _checksums(inputs: pa.Table, times: dict[int, int], reader: Reader) -> dict[int, tuple[int, str]]:
    """Returns row -> (time, checksum of the file now). `times`: row -> time."""
    columns = {name: objects(inputs[name].to_pylist()) for name in ("path", "source", "source_row")}

    def some(rows: list[int]) -> Iterator[tuple[int, tuple[int, str]]]:
        encoded = reader.encoded({name: values[rows] for name, values in columns.items()})
        return ((row, (times[row], checksum(data))) for row, data in zip(rows, encoded, strict=True))

    rows = [*times]
    batches = [rows[start : start + CHECKSUMS_AT_ONCE] for start in range(0, len(rows), CHECKSUMS_AT_ONCE)]
    with ThreadPoolExecutor(CHECKSUM_THREADS) as threads:
        return dict(itertools.chain.from_iterable(threads.map(lambda batch: [*some(batch)], batches)))


def _write_inputs(ledger: Ledger, shard: int, table: pa.Table, rows_per_chunk: int) -> None:
    """Writes the inputs of a shard. Each row group is a chunk."""
    data = to_parquet(table, row_group_size=rows_per_chunk)
    ledger.check_lock()
    storage.write_bytes(ledger.inputs_file(shard), data, durable=True)


class _ShardWriter:
    """Collects inputs and writes them shard by shard; `written` gets the numbers."""

    def __init__(self, ledger: Ledger, cost: RowCost, written: list[int]) -> None:
        self.ledger, self.cost, self.written = ledger, cost, written
        self.shards = len(ledger.shards())
        self.rows: list[tuple] = []

    def add(self, image: ImageFile, output: bytes) -> None:
        names = (os.fsencode(image.path), os.fsencode(image.name), output)
        self.rows.append((*names, image.size, image.mtime_ns, os.fsencode(image.source), image.row))
        if len(self.rows) == SHARD_ROWS:
            self.close()

    def close(self) -> None:
        if not self.rows:
            return
        columns = zip(*self.rows, strict=True)
        table = pa.table([pa.array(c, f.type) for c, f in zip(columns, INPUTS_SCHEMA, strict=True)], INPUTS_SCHEMA)
        shard = self.ledger.part.shard(self.shards)
        _write_inputs(self.ledger, shard, table, chunk_rows(len(table), self.cost))
        self.written.append(shard)
        self.shards += 1
        self.rows = []
