"""Which images a prediction has and which of them are done: the files in its output folder that make it exactly once.

    .work/inputs/part-000000.parquet     the images found, 4,096 a part, and where the mask of each goes
    .work/done/part-000000/00012.parquet what a finished chunk of that part has said
    manifest.parquet/part-000000.parquet the part's rows, once all its chunks are done; masks.parquet and others alike

Each file appears whole or not at all. A part of the inputs is written once, in the order of the listing, so a stopped
run goes on with the same chunks and ends with the same files. Images that are found later make further parts; of an
image that has changed, the row in its part is renewed. A row counts as done if a result has its size and time.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from unet_ray.data import storage
from unet_ray.data.chunks import objects, readable, to_parquet
from unet_ray.data.inputs import ImageFile
from unet_ray.inference.digests import DigestMap, digests_of

WORK = ".work"
PART = "part-{:06d}"
PART_ROWS = 4096
MIN_ROWS, MAX_ROWS, MAX_BYTES, SECONDS = 8, 64, 64 * 2**20, 0.25
"""Rows of a chunk; `MAX_BYTES` of it stay below the 128 MiB at which Ray Data splits a block in two. Handing a chunk
around takes Ray some hundredths of a second, so that short folders are not cut finer than into `SECONDS` of work."""
MANIFEST = "manifest.parquet"
READERS = 16
"""Threads that ask what is done: nearly all of it is waiting where the output is a bucket."""

INPUTS_SCHEMA = pa.schema(
    # Names are bytes: a file system's need not be UTF-8.
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
        ("milliseconds", pa.float32()),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
    ]
)
_REGION = [("class_id", pa.int32()), ("area", pa.int64()), ("bbox", pa.list_(pa.int32())), ("counts", pa.string())]
PAYLOADS = {
    "mask": pa.schema([("mask", pa.binary())]),
    "rle": pa.schema([("rle", pa.list_(pa.struct(_REGION)))]),
    "runs": pa.schema([("name", pa.string()), ("runs", pa.string())]),
}
"""What a row may carry beside the manifest, and goes into Parquet files of its own: the mask as PNG, COCO's run
lengths, Kaggle's."""

RESULT = ["size", "mtime_ns", "status"]
"""Columns that say whether a row is done."""

Columns = dict[str, Any]


class RowCost(NamedTuple):
    """What an image costs."""

    bytes: int
    """The largest that its row gets on its way."""
    seconds: float
    """About how long two CPU cores take over it."""


@dataclass(frozen=True, slots=True)
class PartState:
    """How far a part is."""

    todo: list[int]
    """Numbers of the chunks with rows to do."""
    rows: int
    done: int
    """Rows that need nothing."""
    failed: int
    """Of them, those that failed."""
    finished: bool
    """The manifest has it as it is."""


@dataclass(frozen=True, slots=True)
class Ledger:
    """The ledger in the folder `out`."""

    out: str
    payloads: tuple[tuple[str, str], ...]
    """(name in `PAYLOADS`, folder below `out`) of what goes into Parquet files of its own."""
    retry_failed: bool = False

    # --- what there is ---

    def survey(
        self,
        images: Iterable[ImageFile],
        outputs_of: Callable[[ImageFile], Iterator[str]],
        cost: RowCost,
        on_listed: Callable[[int], None] = lambda _count: None,
    ) -> int:
        """Writes down the images that are not known yet, and the new size and time of those that have changed.

        `outputs_of` proposes paths for an image's mask; the first that no other image has is taken. Returns how
        many different images there are. Memory grows by about 60 bytes an image.
        """
        known, taken, sizes, times = self._known()
        earlier = len(sizes)
        writer = _PartWriter(self, len(self.parts()), cost)
        changed: dict[int, tuple[int, int]] = {}
        seen_again = np.zeros(earlier, bool)
        count, fresh = 0, earlier
        images = iter(images)
        while batch := list(islice(images, PART_ROWS)):
            keys = digests_of([os.fsencode(image.path) for image in batch])
            places = known.find(keys)
            proposals = [outputs_of(image) for image in batch]
            firsts = [os.fsencode(next(proposal)) for proposal in proposals]
            first_keys = digests_of(firsts)
            first_taken = taken.find(first_keys) >= 0
            in_batch: set[bytes] = set()
            new_keys, new_outputs = [], []
            for number, image in enumerate(batch):
                place, key = int(places[number]), keys[number].tobytes()
                if place >= earlier or key in in_batch:
                    continue  # named twice in this listing
                in_batch.add(key)
                if place >= 0:
                    count += not seen_again[place]
                    seen_again[place] = True
                    if (image.size, image.mtime_ns) != (sizes[place], times[place]):
                        changed[place] = (image.size, image.mtime_ns)
                    continue
                output, output_key, used = firsts[number], first_keys[number], first_taken[number]
                while used or output_key.tobytes() in in_batch:
                    output = os.fsencode(next(proposals[number]))
                    output_key = digests_of([output])[0]
                    used = taken.find(output_key[None])[0] >= 0
                in_batch.add(output_key.tobytes())
                new_keys.append(keys[number])
                new_outputs.append(output_key)
                count += 1
                writer.add(image, output)
            if new_keys:
                known.add(np.stack(new_keys), np.arange(fresh, fresh + len(new_keys)))
                taken.add(np.stack(new_outputs), np.zeros(len(new_keys), np.int64))
                fresh += len(new_keys)
            on_listed(count)
        writer.close()
        self._renew(changed)
        return count

    def _known(self) -> tuple[DigestMap, DigestMap, np.ndarray, np.ndarray]:
        """Paths and outputs of all inputs written down so far, numbered in their order, and their sizes and times."""
        known, taken, sizes, times = DigestMap(), DigestMap(), [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        count = 0
        for part in self.parts():
            table = self._inputs(part, ["path", "output", "size", "mtime_ns"])
            numbers = np.arange(count, count + len(table))
            known.add(digests_of(table["path"].to_pylist()), numbers)
            taken.add(digests_of(table["output"].to_pylist()), numbers)
            sizes.append(table["size"].to_numpy())
            times.append(table["mtime_ns"].to_numpy())
            count += len(table)
        return known, taken, np.concatenate(sizes), np.concatenate(times)

    def _renew(self, changed: dict[int, tuple[int, int]]) -> None:
        if not changed:
            return
        first = 0
        for part in self.parts():
            location = self._inputs_file(part)
            file = pq.ParquetFile(io.BytesIO(storage.read_bytes(location)))
            table = file.read()
            mine = {place - first: new for place, new in changed.items() if first <= place < first + len(table)}
            first += len(table)
            if mine:
                sizes, times = table["size"].to_numpy().copy(), table["mtime_ns"].to_numpy().copy()
                for row, (size, mtime_ns) in mine.items():
                    sizes[row], times[row] = size, mtime_ns
                table = table.set_column(3, "size", pa.array(sizes)).set_column(4, "mtime_ns", pa.array(times))
                storage.write_bytes(location, to_parquet(table, row_group_size=file.metadata.row_group(0).num_rows))

    def parts(self) -> list[int]:
        """Numbers of the parts there are."""
        names = storage.names_in(storage.join(self.out, WORK, "inputs"))
        return sorted(int(name[5:11]) for name in names if name.startswith("part-"))

    # --- what is done ---

    def states(self, parts: list[int]) -> Iterator[PartState]:
        """How far each part is."""
        manifests = set(storage.names_in(storage.join(self.out, MANIFEST)))
        begun = set(storage.names_in(storage.join(self.out, WORK, "done")))
        with ThreadPoolExecutor(READERS) as threads:
            # A window of them: the states of a hundred million rows are not asked for at once.
            numbers = iter(parts)
            waiting = [threads.submit(self._state, part, manifests, begun) for part in islice(numbers, 2 * READERS)]
            while waiting:
                yield waiting.pop(0).result()
                waiting += [threads.submit(self._state, part, manifests, begun) for part in islice(numbers, 1)]

    def _state(self, part: int, manifests: set[str], begun: set[str]) -> PartState:
        file = self._open_inputs(part)
        bounds = _bounds(file)
        name = PART.format(part)
        if f"{name}.parquet" not in manifests and name not in begun:
            return PartState([part * PART_ROWS + n for n in range(len(bounds) - 1)], bounds[-1], 0, 0, False)
        inputs = file.read(["size", "mtime_ns"])
        results = self._results(inputs, self._told(part, RESULT, journals=name in begun))
        todo = results["todo"]
        chunks = [part * PART_ROWS + n for n, (start, stop) in enumerate(pairwise(bounds)) if todo[start:stop].any()]
        failed = int((~todo & results["failed"]).sum())
        finished = not chunks and name not in begun
        return PartState(chunks, len(todo), int((~todo).sum()), failed, finished)

    def _results(self, inputs: pa.Table, told: Iterable[tuple[np.ndarray, pa.Table]]) -> dict[str, np.ndarray]:
        """Of each row: whether it is `done`, whether it `failed`, and whether it is `todo`; later results count."""
        size, mtime_ns = inputs["size"].to_numpy(), inputs["mtime_ns"].to_numpy()
        done, failed = np.zeros(len(inputs), bool), np.zeros(len(inputs), bool)
        for rows, table in told:
            current = (table["size"].to_numpy() == size[rows]) & (table["mtime_ns"].to_numpy() == mtime_ns[rows])
            done[rows[current]] = True
            failed[rows[current]] = _failed(table)[current]
        return {"todo": ~done | (failed & self.retry_failed), "failed": failed, "done": done}

    def _told(self, part: int, columns: list[str], *, journals: bool) -> Iterator[tuple[np.ndarray, pa.Table]]:
        """(row numbers, results) of a part, oldest first: the manifest, then what finished chunks have said since."""
        manifest = self._read(MANIFEST, f"{PART.format(part)}.parquet", columns)
        if manifest is not None:
            yield np.arange(len(manifest)), manifest
        if journals:
            folder = f"{WORK}/done/{PART.format(part)}"
            for name in storage.names_in(storage.join(self.out, *folder.split("/"))):
                journal = self._read(folder, name, ["row", *columns])
                if journal is not None:
                    yield journal["row"].to_numpy(), journal

    # --- doing ---

    def load(self, number: int) -> Columns:
        """A chunk's rows that are to be done, as columns; perhaps none."""
        part, chunk = divmod(number, PART_ROWS)
        file = self._open_inputs(part)
        start = _bounds(file)[chunk]
        table = file.read_row_group(chunk)
        rows = np.arange(start, start + len(table))
        told = []
        manifest = self._read(MANIFEST, f"{PART.format(part)}.parquet", RESULT)
        if manifest is not None:
            told.append((rows - start, manifest.slice(start, len(rows))))
        journal = self._read(*self._journal(number), ["row", *RESULT])
        if journal is not None:
            told.append((journal["row"].to_numpy() - start, journal))
        todo = self._results(table, told)["todo"]
        columns = {name: objects(table[name].to_pylist()) for name in ("path", "name", "output", "source")}
        columns |= {name: table[name].to_numpy() for name in ("size", "mtime_ns", "source_row")}
        columns |= {"row": rows, "redone": np.full(len(rows), bool(told)), "number": np.full(len(rows), number)}
        return {name: values[todo] for name, values in columns.items()}

    def first(self, number: int) -> str:
        """The file of the first image of a chunk: of its own, or the Parquet file that holds it."""
        part, chunk = divmod(number, PART_ROWS)
        row = self._open_inputs(part).read_row_group(chunk, ["path", "source"]).slice(0, 1).to_pylist()[0]
        return os.fsdecode(row["source"] or row["path"])

    def record(self, number: int, rows: np.ndarray, results: Columns) -> None:
        """Writes down what was found of some rows of a chunk: columns of `MANIFEST_SCHEMA` and of the payloads."""
        schema = self._nothing().schema
        table = pa.table({"row": rows, **{name: results[name] for name in schema.names[1:]}}, schema)
        folder, name = self._journal(number)
        earlier = self._read(folder, name, None)
        if earlier is not None:
            kept = earlier.filter(pc.invert(pc.is_in(earlier["row"], table["row"])))
            table = pa.concat_tables([kept, table]).sort_by("row")
        storage.write_bytes(storage.join(self.out, *folder.split("/"), name), to_parquet(table, compression="none"))

    def finish(self, part: int) -> None:
        """Makes a part of the manifest, and of the other Parquet files, of what its chunks have said.

        All of its rows must be done. Safe to be stopped at any moment and done again. One chunk is in memory at a time.
        """
        name = PART.format(part)
        file = self._open_inputs(part)
        inputs, bounds = file.read(["path", "size", "mtime_ns"]), _bounds(file)
        journals = storage.names_in(storage.join(self.out, WORK, "done", name))
        if not journals:
            return  # done before
        paths = pa.array([storage.without_secrets(readable(path)) for path in inputs["path"].to_pylist()])
        targets = {payload: (*folder.split("/"), f"{name}.parquet") for payload, folder in self.payloads}
        earlier = {payload: self._read(folder, f"{name}.parquet", None) for payload, folder in self.payloads}
        before = self._read(MANIFEST, f"{name}.parquet", MANIFEST_SCHEMA.names)
        results = [] if before is None else [(np.arange(len(before)), before)]
        parts: list[pa.Table] = []
        with ExitStack() as stack:
            writers: dict[str, pq.ParquetWriter] = {}
            for payload, target in targets.items():
                stream = stack.enter_context(storage.writing(storage.join(self.out, *target)))
                schema = _payload(payload, self._nothing()).schema
                # Masks are compressed already: to do it again costs time and saves nothing.
                compression = "none" if payload == "mask" else "zstd"
                writers[payload] = stack.enter_context(pq.ParquetWriter(stream, schema, compression=compression))
            for chunk, (start, stop) in enumerate(pairwise(bounds)):
                file_name = f"{chunk:05d}.parquet"
                new = self._read(f"{WORK}/done/{name}", file_name, None) if file_name in journals else self._nothing()
                assert new is not None
                results.append((new["row"].to_numpy(), new.select(RESULT)))
                renewed = set(new["row"].to_pylist())
                kept = pa.array([row for row in range(start, stop) if row not in renewed], pa.int64())
                good = new.filter(pc.equal(new["status"], "ok"))
                for payload, writer in writers.items():
                    rows, old = _payload(payload, good), earlier[payload]
                    if old is not None and len(kept):
                        rows = pa.concat_tables([old.filter(pc.is_in(old["path"], paths.take(kept))), rows])
                        rows = rows.take(pc.array_sort_indices(pc.index_in(rows["path"], paths)))
                    if len(rows):
                        writer.write_table(rows)
                told = new.select(MANIFEST_SCHEMA.names)
                if before is not None and len(kept):
                    numbers = pa.concat_arrays([kept, pc.cast(new["row"], pa.int64()).combine_chunks()])
                    told = pa.concat_tables([before.take(kept), told]).take(pc.array_sort_indices(numbers))
                parts.append(told)
            missing = int((~self._results(inputs, results)["done"]).sum())
            if missing:  # what has been written so far does not appear
                raise RuntimeError(f"{self.out}: {missing} rows of {name} have no result: start the command again")
        manifest = to_parquet(pa.concat_tables(parts).combine_chunks())
        storage.write_bytes(storage.join(self.out, MANIFEST, f"{name}.parquet"), manifest)
        storage.delete_folder(storage.join(self.out, WORK, "done", name))

    # --- files ---

    def _nothing(self) -> pa.Table:
        """What finished chunks write down, without a row."""
        fields = [pa.field("row", pa.int32()), *MANIFEST_SCHEMA]
        for name, _ in self.payloads:
            fields += list(PAYLOADS[name])
        return pa.schema(fields).empty_table()

    def _inputs_file(self, part: int) -> str:
        return storage.join(self.out, WORK, "inputs", f"{PART.format(part)}.parquet")

    def _open_inputs(self, part: int) -> pq.ParquetFile:
        return pq.ParquetFile(io.BytesIO(storage.read_bytes(self._inputs_file(part))))

    def _inputs(self, part: int, columns: list[str]) -> pa.Table:
        return self._open_inputs(part).read(columns)

    def _journal(self, number: int) -> tuple[str, str]:
        part, chunk = divmod(number, PART_ROWS)
        return f"{WORK}/done/{PART.format(part)}", f"{chunk:05d}.parquet"

    def _read(self, folder: str, name: str, columns: list[str] | None) -> pa.Table | None:
        try:
            data = storage.read_bytes(storage.join(self.out, *folder.split("/"), name))
        except FileNotFoundError:
            return None
        return pq.ParquetFile(io.BytesIO(data)).read(columns)

    def names(self, part: int) -> list[bytes]:
        """The images' paths below their inputs."""
        return self._inputs(part, ["name"])["name"].to_pylist()

    def locations(self, part: int) -> pa.ChunkedArray:
        """Where the images lie, bytes, with the options of buckets: not for what others may read."""
        return self._inputs(part, ["path"])["path"]

    def manifest(self, columns: list[str], parts: Sequence[int] | None = None) -> Iterator[pa.Table]:
        """The manifest, a part at a time; of all parts, or of these."""
        for part in self.parts() if parts is None else parts:
            table = self._read(MANIFEST, f"{PART.format(part)}.parquet", columns)
            if table is not None:
                yield table

    def payload(self, name: str) -> Iterator[pa.Table]:
        """The rows of a payload, some at a time."""
        folder = dict(self.payloads)[name]
        for part in self.parts():
            location = storage.join(self.out, *folder.split("/"), f"{PART.format(part)}.parquet")
            if storage.exists(location):
                filesystem, path = storage.resolve(location)
                with pq.ParquetFile(path, filesystem=filesystem) as file:
                    for batch in file.iter_batches(MAX_ROWS):
                        yield pa.Table.from_batches([batch])


def _payload(name: str, good: pa.Table) -> pa.Table:
    """The rows of a Parquet file of its own, of finished rows."""
    if name == "mask":
        return good.select(["path", "height", "width", "pixels", "confidence", "mask"])
    if name == "runs":
        return good.select(["path", "name", "runs"])
    runs = good["rle"].combine_chunks()
    parent = pc.list_parent_indices(runs)
    each = runs.flatten()
    columns = {column: good[column].take(parent) for column in ("path", "height", "width", "confidence")}
    return pa.table({**columns, **{field: each.field(field) for field, _ in _REGION}})


class _PartWriter:
    """Collects inputs and writes them, a part at a time."""

    def __init__(self, ledger: Ledger, number: int, cost: RowCost) -> None:
        self.ledger, self.number, self.cost = ledger, number, cost
        self.rows: list[tuple] = []

    def add(self, image: ImageFile, output: bytes) -> None:
        names = (os.fsencode(image.path), os.fsencode(image.name), output)
        self.rows.append((*names, image.size, image.mtime_ns, os.fsencode(image.source), image.row))
        if len(self.rows) == PART_ROWS:
            self.close()

    def close(self) -> None:
        if not self.rows:
            return
        columns = zip(*self.rows, strict=True)
        table = pa.table([pa.array(c, f.type) for c, f in zip(columns, INPUTS_SCHEMA, strict=True)], INPUTS_SCHEMA)
        data = to_parquet(table, row_group_size=chunk_rows(len(table), self.cost))
        storage.write_bytes(self.ledger._inputs_file(self.number), data)
        self.number += 1
        self.rows = []


def chunk_rows(rows: int, cost: RowCost) -> int:
    """Rows of a chunk in a part of so many."""
    fewest = max(MIN_ROWS, int(SECONDS / cost.seconds))
    return min(max(rows // 64, fewest), MAX_ROWS, max(1, MAX_BYTES // cost.bytes))


def _bounds(file: pq.ParquetFile) -> list[int]:
    """Where the chunks of a part begin, and where the last ends."""
    counts = [file.metadata.row_group(n).num_rows for n in range(file.metadata.num_row_groups)]
    return [0, *np.cumsum(counts).tolist()]


def _failed(results: pa.Table) -> np.ndarray:
    return pc.equal(results["status"], "failed").to_numpy()
