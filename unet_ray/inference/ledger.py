"""Records which images a prediction has and which are done, so that each image is segmented exactly once.

    .work/inputs/part-000000.parquet      the images of a shard, 4,096 at most, and where the mask of each goes
    .work/done/part-000000/00012.parquet  journal: the results of a chunk of that shard
    manifest.parquet/part-000000.parquet  the shard's rows, once all its chunks are done; the side tables are alike

Each file appears whole or not at all, and what a record names is on the disk before the record is: a power cut takes
back no row that counts as done. The inputs of a shard are written once, in the order of the listing, so a stopped
run continues with the same chunks and ends with the same files. Images that are found later make further shards. If an
image has changed, its row in its shard is renewed. A row is done if a result records the image's size and time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from unet_ray.data import storage
from unet_ray.data.chunks import objects, readable, to_parquet
from unet_ray.data.output_lock import Holder
from unet_ray.inference.chunk_size import MAX_ROWS
from unet_ray.inference.parts import WHOLE, Part

WORK = ".work"
SHARD_PREFIX = "part-"
SHARD = SHARD_PREFIX + "{:06d}"
SHARD_ROWS = 4096
MANIFEST = "manifest.parquet"
READERS = 16
"""Threads that read the states of shards. If the output is a bucket, they wait nearly all the time."""

MANIFEST_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("status", pa.string()),
        ("error", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("output", pa.string()),
        ("pixels", pa.list_(pa.int64())),
        ("confidence", pa.float32()),
        ("uncertainty", pa.float32()),
        ("milliseconds", pa.float32()),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("checksum", pa.string()),
    ]
)
STATUS_COLUMNS = ["size", "mtime_ns", "status"]
"""Columns that say whether a row is done."""

Columns = dict[str, Any]


class RecordedRows(NamedTuple):
    """Rows that the manifest or a journal records."""

    row_indices: np.ndarray
    """Places among the inputs, int [N]."""
    table: pa.Table
    """N rows, with `STATUS_COLUMNS` at least."""


@dataclass(frozen=True, slots=True)
class SideTable:
    """Describes a folder of Parquet files beside the manifest, one file per shard, that an output format fills."""

    folder: str
    """Its path below the output folder."""
    columns: pa.Schema
    """Columns that the journals carry for this table. Their names must differ from those of `MANIFEST_SCHEMA`: a
    journal holds both in one row."""
    rows_of: Callable[[pa.Table], pa.Table]
    """Makes the table's rows, which need a column `path`, from the journal rows of images that have a mask. It may use
    the manifest's columns, too."""
    compression: str = "zstd"


@dataclass(frozen=True, slots=True)
class ShardState:
    """Says how many rows of a shard are done."""

    todo: list[int]
    """Numbers of the chunks with rows to do."""
    rows: int
    done: int
    """Rows that need no work, failed ones included."""
    failed: int
    """Rows among `done` that failed."""
    merged: bool
    """The manifest holds every row, and no journal is left."""


@dataclass(frozen=True, slots=True)
class RowStates:
    """Says which of N rows are done; each array is bool [N]."""

    todo: np.ndarray
    failed: np.ndarray
    done: np.ndarray


def shard_number(name: str) -> int:
    """Returns the number in the name of a shard's file, as `SHARD` formats it."""
    return int(name.removeprefix(SHARD_PREFIX).partition(".")[0])


@dataclass(frozen=True, slots=True)
class Ledger:
    """Reads and writes the ledger in the folder `out`."""

    out: str
    tables: tuple[SideTable, ...]
    retry_failed: bool = False
    """Whether rows that failed are to be done again."""
    holder: Holder | None = None
    """The run that may write; None: nobody else does."""
    part: Part = WHOLE
    """The part of the prediction whose shards it has."""

    # --- which rows are done ---

    def shards(self) -> list[int]:
        """Returns the numbers of the shards, sorted."""
        names = storage.names_in(storage.join(self.out, WORK, "inputs"))
        numbers = sorted(shard_number(name) for name in names if name.startswith(SHARD_PREFIX))
        return [*filter(self.part.has_shard, numbers)]

    def states(self, shards: list[int]) -> Iterator[ShardState]:
        """Yields the state of each shard."""
        manifests = set(storage.names_in(storage.join(self.out, MANIFEST)))
        begun = set(storage.names_in(storage.join(self.out, WORK, "done")))
        with ThreadPoolExecutor(READERS) as threads:
            # Only some shards at a time, because the states of a hundred million rows need much memory.
            numbers = iter(shards)
            waiting = [threads.submit(self._state, shard, manifests, begun) for shard in islice(numbers, 2 * READERS)]
            while waiting:
                yield waiting.pop(0).result()
                waiting += [threads.submit(self._state, shard, manifests, begun) for shard in islice(numbers, 1)]

    def _state(self, shard: int, manifests: set[str], begun: set[str]) -> ShardState:
        file = self.open_inputs(shard)
        bounds = _bounds(file)
        name = SHARD.format(shard)
        if f"{name}.parquet" not in manifests and name not in begun:
            return ShardState([shard * SHARD_ROWS + n for n in range(len(bounds) - 1)], bounds[-1], 0, 0, False)
        inputs = file.read(["size", "mtime_ns"])
        rows = self._row_states(inputs, self._recorded_rows(shard, journals=name in begun))
        chunks = [
            shard * SHARD_ROWS + n for n, (start, stop) in enumerate(pairwise(bounds)) if rows.todo[start:stop].any()
        ]
        failed = int((~rows.todo & rows.failed).sum())
        merged = not chunks and name not in begun
        return ShardState(chunks, len(inputs), int((~rows.todo).sum()), failed, merged)

    def _row_states(self, inputs: pa.Table, recorded: Iterable[RecordedRows]) -> RowStates:
        """Returns the state of each input. If a row is recorded more than once, the last record with the input's size
        and time counts."""
        size, mtime_ns = inputs["size"].to_numpy(), inputs["mtime_ns"].to_numpy()
        done, failed = np.zeros(len(inputs), bool), np.zeros(len(inputs), bool)
        for rows, table in recorded:
            current = (table["size"].to_numpy() == size[rows]) & (table["mtime_ns"].to_numpy() == mtime_ns[rows])
            done[rows[current]] = True
            failed[rows[current]] = pc.equal(table["status"], "failed").to_numpy()[current]
        return RowStates(todo=~done | (failed & self.retry_failed), failed=failed, done=done)

    def _recorded_rows(self, shard: int, *, journals: bool) -> Iterator[RecordedRows]:
        """Yields the recorded rows of a shard, oldest first: from the manifest, then from the journals."""
        for folder, name in self._records(shard, journals=journals):
            columns = STATUS_COLUMNS if folder == MANIFEST else ["row", *STATUS_COLUMNS]
            table = self._read(folder, name, columns)
            if table is not None:
                rows = np.arange(len(table)) if folder == MANIFEST else table["row"].to_numpy()
                yield RecordedRows(rows, table)

    def _records(self, shard: int, *, journals: bool = True) -> Iterator[tuple[str, str]]:
        """Yields (folder, file) of the records of a shard, oldest first; the first may not exist yet."""
        yield MANIFEST, f"{SHARD.format(shard)}.parquet"
        if journals:
            folder = f"{WORK}/done/{SHARD.format(shard)}"
            yield from ((folder, name) for name in storage.names_in(storage.join(self.out, *folder.split("/"))))

    def same_content(self, shard: int, found: Mapping[int, tuple[int, str]]) -> set[int]:
        """Returns the rows that are recorded with the checksum that their file has now, and renews their recorded time.

        `found`: row -> (modification time in ns, checksum) of the file now.
        """
        checksums: dict[int, str] = {}
        for folder, name in self._records(shard):
            table = self._read(folder, name, None)
            if table is None or "checksum" not in table.schema.names:  # of version 0.1
                continue
            rows = range(len(table)) if folder == MANIFEST else table["row"].to_pylist()
            recorded, times = table["checksum"].to_pylist(), table["mtime_ns"].to_pylist()
            checksums |= {row: value for row, value in zip(rows, recorded, strict=True) if row in found}
            for place, row in enumerate(rows):
                if row in found and recorded[place] and recorded[place] == found[row][1]:
                    times[place] = found[row][0]
            place_of_times = table.schema.get_field_index("mtime_ns")
            table = table.set_column(place_of_times, "mtime_ns", pa.array(times, pa.int64()))
            self.check_lock()
            location = storage.join(self.out, *folder.split("/"), name)
            storage.write_bytes(location, to_parquet(table), durable=True)
        return {row for row, (_, value) in found.items() if value and checksums.get(row) == value}

    # --- loading and recording chunks ---

    def load(self, number: int, inputs: pq.ParquetFile | None = None) -> Columns:
        """Returns the rows of a chunk that are to be done, as columns. There may be none. `inputs`: those of its shard;
        None: they are read."""
        shard, chunk = divmod(number, SHARD_ROWS)
        file = inputs or self.open_inputs(shard)
        start = _bounds(file)[chunk]
        table = file.read_row_group(chunk, use_threads=False)
        row_indices = np.arange(start, start + len(table))
        recorded = []
        manifest = self._read(MANIFEST, f"{SHARD.format(shard)}.parquet", STATUS_COLUMNS)
        if manifest is not None:
            recorded.append(RecordedRows(row_indices - start, manifest.slice(start, len(table))))
        journal = self._read(*_journal(number), ["row", *STATUS_COLUMNS])
        if journal is not None:
            recorded.append(RecordedRows(journal["row"].to_numpy() - start, journal))
        todo = self._row_states(table, recorded).todo
        columns = {name: objects(table[name].to_pylist()) for name in ("path", "name", "output", "source")}
        columns |= {name: table[name].to_numpy() for name in ("size", "mtime_ns", "source_row")}
        columns |= {"row": row_indices, "number": np.full(len(table), number)}
        return {name: values[todo] for name, values in columns.items()}

    def first_location(self, number: int) -> str:
        """Returns the location of a chunk's first image, or of the Parquet file that holds it."""
        shard, chunk = divmod(number, SHARD_ROWS)
        row = self.open_inputs(shard).read_row_group(chunk, ["path", "source"]).slice(0, 1).to_pylist()[0]
        return os.fsdecode(row["source"] or row["path"])

    def record(self, number: int, row_indices: np.ndarray, results: Columns) -> None:
        """Writes the results of some rows of a chunk into its journal. Rows that were recorded before are replaced.

        `row_indices`: places of the rows among the shard's inputs. `results`: the columns `result_columns`.
        """
        schema = self._journal_schema()
        table = pa.table({"row": row_indices, **{name: results[name] for name in schema.names[1:]}}, schema)
        folder, name = _journal(number)
        earlier = self._read(folder, name, schema.names)
        if earlier is not None:
            kept = earlier.filter(pc.invert(pc.is_in(earlier["row"], table["row"])))
            table = pa.concat_tables([kept, table]).sort_by("row")
        self.check_lock()
        location = storage.join(self.out, *folder.split("/"), name)
        storage.write_bytes(location, to_parquet(table, compression="none"), durable=True)

    def result_columns(self) -> list[str]:
        """Returns the names of the columns that `record` takes: those of `MANIFEST_SCHEMA` and of the side tables."""
        return self._journal_schema().names[1:]

    # --- merging journals ---

    def merge_shard(self, shard: int) -> None:
        """Merges the journals of a shard into its file of the manifest and of each side table.

        All rows of the shard must be done. A merge that was stopped can be repeated. Memory holds the side tables' rows
        of one chunk at a time.
        """
        name = SHARD.format(shard)
        journals = storage.names_in(storage.join(self.out, WORK, "done", name))
        if not journals:
            return  # merged before
        file = self.open_inputs(shard)
        inputs = file.read(["path", "size", "mtime_ns"])
        earlier = self._read(MANIFEST, f"{name}.parquet", MANIFEST_SCHEMA.names)
        recorded = [] if earlier is None else [RecordedRows(np.arange(len(earlier)), earlier)]
        manifest = []
        with self._side_files(name, inputs) as side_files:
            for chunk, (start, stop) in enumerate(pairwise(_bounds(file))):
                new = self._journal_rows(name, chunk, journals)
                renewed = set(new["row"].to_pylist())
                kept = pa.array([row for row in range(start, stop) if row not in renewed], pa.int64())
                recorded.append(RecordedRows(new["row"].to_numpy(), new.select(STATUS_COLUMNS)))
                manifest.append(_merged_manifest(earlier, kept, new))
                for side_file in side_files:
                    side_file.write(kept, new)
            self._check_complete(name, inputs, recorded)  # inside the block: if it raises, no side table appears
            self.check_lock()
        data = to_parquet(pa.concat_tables(manifest).combine_chunks())
        self.check_lock()
        storage.write_bytes(storage.join(self.out, MANIFEST, f"{name}.parquet"), data, durable=True)
        self.check_lock()  # else it might delete what another run has recorded
        storage.delete_folder(storage.join(self.out, WORK, "done", name))

    @contextmanager
    def _side_files(self, name: str, inputs: pa.Table) -> Iterator[list[_SideFile]]:
        """Opens the file of a shard in each side table. The files appear if the block ends without an error."""
        paths = pa.array([storage.without_secrets(readable(path)) for path in inputs["path"].to_pylist()])
        nothing = self._journal_schema().empty_table()
        with ExitStack() as stack:
            side_files = []
            for table in self.tables:
                earlier = self._read(table.folder, f"{name}.parquet", None)
                location = storage.join(self.out, *table.folder.split("/"), f"{name}.parquet")
                stream = stack.enter_context(storage.writing(location))
                schema = table.rows_of(nothing).schema
                writer = stack.enter_context(pq.ParquetWriter(stream, schema, compression=table.compression))
                side_files.append(_SideFile(table, paths, earlier, writer))
            yield side_files

    def _journal_rows(self, name: str, chunk: int, journals: list[str]) -> pa.Table:
        """Returns the rows of a chunk's journal, or a table without rows if the chunk has none."""
        file_name = f"{chunk:05d}.parquet"
        if file_name not in journals:
            return self._journal_schema().empty_table()
        new = self._read(f"{WORK}/done/{name}", file_name, self._journal_schema().names)
        assert new is not None, "only `merge_shard` deletes journals"
        return new

    def _check_complete(self, name: str, inputs: pa.Table, recorded: list[RecordedRows]) -> None:
        missing = int((~self._row_states(inputs, recorded).done).sum())
        if missing:
            raise RuntimeError(f"{self.out}: {missing} rows of {name} have no result: start the command again")

    def check_lock(self) -> None:
        """Raises UserError if another run has taken over. A process that was stopped for an hour finds out here."""
        if self.holder is not None:
            self.holder.check()

    # --- files ---

    def files(self) -> Iterator[str]:
        """Yields the location of every file that names images: inputs, records and side tables."""
        for shard in self.shards():
            yield self.inputs_file(shard)
            side_files = [(table.folder, f"{SHARD.format(shard)}.parquet") for table in self.tables]
            for folder, name in [*self._records(shard), *side_files]:
                location = storage.join(self.out, *folder.split("/"), name)
                if storage.exists(location):
                    yield location

    def inputs_file(self, shard: int) -> str:
        return storage.join(self.out, WORK, "inputs", f"{SHARD.format(shard)}.parquet")

    def open_inputs(self, shard: int) -> pq.ParquetFile:
        return _parquet_file(storage.read_bytes(self.inputs_file(shard)))

    def inputs(self, shard: int, columns: list[str]) -> pa.Table:
        return self.open_inputs(shard).read(columns)

    def names(self, shard: int) -> list[bytes]:
        """Returns the path of each image below its input."""
        return self.inputs(shard, ["name"])["name"].to_pylist()

    def locations(self, shard: int) -> pa.ChunkedArray:
        """Returns the location of each image, as bytes. Locations in buckets keep their options, which may hold
        secrets: never write them into files that others may read."""
        return self.inputs(shard, ["path"])["path"]

    def manifest(self, columns: list[str], shards: Sequence[int] | None = None) -> Iterator[pa.Table]:
        """Yields the manifest's columns shard by shard: of `shards`, or of all."""
        for shard in self.shards() if shards is None else shards:
            table = self._read(MANIFEST, f"{SHARD.format(shard)}.parquet", columns)
            if table is not None:
                yield table

    def side_rows(self, table: SideTable) -> Iterator[pa.Table]:
        """Yields the rows of a side table, `MAX_ROWS` at a time."""
        for shard in self.shards():
            location = storage.join(self.out, *table.folder.split("/"), f"{SHARD.format(shard)}.parquet")
            if storage.exists(location):
                filesystem, path = storage.resolve(location)
                with pq.ParquetFile(path, filesystem=filesystem) as file:
                    for batch in file.iter_batches(MAX_ROWS):
                        yield pa.Table.from_batches([batch])

    def _journal_schema(self) -> pa.Schema:
        return pa.schema([pa.field("row", pa.int32()), *MANIFEST_SCHEMA, *(f for t in self.tables for f in t.columns)])

    def _read(self, folder: str, name: str, columns: list[str] | None) -> pa.Table | None:
        try:
            data = storage.read_bytes(storage.join(self.out, *folder.split("/"), name))
        except FileNotFoundError:
            return None
        table = _parquet_file(data).read(columns, use_threads=False)
        if columns is None:
            return table
        for column in {*columns} - {*table.schema.names}:  # a file of version 0.1 lacks some
            table = table.append_column(column, pa.nulls(len(table), MANIFEST_SCHEMA.field(column).type))
        return table.select(columns)


class Loader:
    """`Ledger.load` for a run: keeps the inputs of the last shard, since most chunks follow on each other.

    Reading a shard's file again for each chunk took longer than all else that a load does.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.last: tuple[int, bytes, pq.FileMetaData] | None = None
        """Shard, its file, and what the file says of its columns."""

    def __reduce__(self) -> tuple[type[Loader], tuple[Ledger]]:
        return Loader, (self.ledger,)

    def __call__(self, number: int) -> Columns:
        last, shard = self.last, number // SHARD_ROWS  # several threads may load at once
        if last is None or last[0] != shard:
            data = storage.read_bytes(self.ledger.inputs_file(shard))
            last = self.last = (shard, data, _parquet_file(data).metadata)
        return self.ledger.load(number, _parquet_file(last[1], last[2]))


def _parquet_file(data: bytes, metadata: pq.FileMetaData | None = None) -> pq.ParquetFile:
    """Opens a file of the ledger. To read it with threads takes longer: a chunk has few rows."""
    return pq.ParquetFile(pa.BufferReader(data), metadata=metadata)


@dataclass(frozen=True, slots=True)
class _SideFile:
    """Writes the file of one shard in a side table."""

    table: SideTable
    paths: pa.Array
    """Paths of all inputs of the shard, in their order."""
    earlier: pa.Table | None
    """Rows of the file that this one replaces."""
    writer: pq.ParquetWriter

    def write(self, kept: pa.Array, new: pa.Table) -> None:
        """Writes the rows of one chunk in the order of the inputs: those kept from the earlier file, and new ones."""
        rows = self.table.rows_of(new.filter(pc.equal(new["status"], "ok")))
        if self.earlier is not None and len(kept):
            old = self.earlier.filter(pc.is_in(self.earlier["path"], self.paths.take(kept)))
            rows = pa.concat_tables([old, rows])
            rows = rows.take(pc.array_sort_indices(pc.index_in(rows["path"], self.paths)))
        if len(rows):
            self.writer.write_table(rows)


def _merged_manifest(earlier: pa.Table | None, kept: pa.Array, new: pa.Table) -> pa.Table:
    """Returns a chunk's rows of the manifest in the order of the inputs: those kept from the earlier one, and new."""
    rows = new.select(MANIFEST_SCHEMA.names)
    if earlier is None or not len(kept):
        return rows
    numbers = pa.concat_arrays([kept, pc.cast(new["row"], pa.int64()).combine_chunks()])
    return pa.concat_tables([earlier.take(kept), rows]).take(pc.array_sort_indices(numbers))


def _journal(number: int) -> tuple[str, str]:
    """Returns the folder and the name of a chunk's journal."""
    shard, chunk = divmod(number, SHARD_ROWS)
    return f"{WORK}/done/{SHARD.format(shard)}", f"{chunk:05d}.parquet"


def _bounds(file: pq.ParquetFile) -> list[int]:
    """Returns the row at which each chunk of a shard begins, then the number of rows."""
    counts = [file.metadata.row_group(n).num_rows for n in range(file.metadata.num_row_groups)]
    return [0, *np.cumsum(counts).tolist()]
