"""Reads images and masks that are encoded in the cells of Parquet files, as Hugging Face stores them.

The location of a cell is `FILE.parquet#ROW:COLUMN`, before the options of a bucket.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import PurePosixPath
from threading import Lock

import pyarrow as pa
import pyarrow.parquet as pq

from unet_ray.data import storage
from unet_ray.data.buckets import patient
from unet_ray.data.headers import ImageError

BYTES_COLUMNS = ("image", "bytes", "image_bytes", "data", "content")
"""Columns of a Parquet file that may hold encoded images; the first one present is used."""
NAME_COLUMNS = ("path", "file_name", "name", "id")
"""Columns that may name those images; the first one present is used."""
NO_IMAGE = "this row of the list names no image"
ROWS_AT_ONCE = 1024
CELL = re.compile(r"(.+\.parquet)#(\d+):(.+)", re.DOTALL)
KEPT = 2
"""Columns of row groups that stay in memory: a training reads the images and the masks of one after the other."""


def cell(file: str, row: int, column: str) -> str:
    """Returns the location of an encoded image."""
    base, options = storage.split_options(file)
    return f"{base}#{row}:{column}{options}"


def split_cell(location: str) -> tuple[str, int, str] | None:
    """Returns file, row and column of the location of a cell; None for any other location."""
    base, options = storage.split_options(location)
    found = CELL.fullmatch(base)
    return None if found is None else (found[1] + options, int(found[2]), found[3])


def read_cell(file: str, row: int, column: str) -> bytes:
    """Reads one encoded image. Raises OSError, and ImageError if there is no such row or nothing in it.

    The row group that holds it is kept, so that reading all rows in their order reads each byte once.
    """
    with _READING:
        start, values = _row_group_of(file, row, column)
    if not 0 <= row - start < len(values):
        raise ImageError(f"the file has no row {row}")
    value = values[row - start].as_py()
    data = value["bytes"] if isinstance(value, dict) else value
    if not data:
        raise ImageError("nothing in this cell")
    return data


_READING = Lock()


@patient
def _row_group_of(file: str, row: int, column: str) -> tuple[int, pa.ChunkedArray]:
    """Returns the first row of the row group that holds a row, and its values."""
    start = 0
    for number, rows in enumerate(_row_groups(file)):
        if row < start + rows:
            return start, _values(file, number, column)
        start += rows
    return start, pa.chunked_array([pa.array([])])


@lru_cache(maxsize=64)
def _row_groups(file: str) -> tuple[int, ...]:
    filesystem, inner = storage.resolve(file)
    with pq.ParquetFile(inner, filesystem=filesystem) as opened:
        metadata = opened.metadata
        return tuple(metadata.row_group(number).num_rows for number in range(metadata.num_row_groups))


@lru_cache(maxsize=KEPT)
def _values(file: str, number: int, column: str) -> pa.ChunkedArray:
    filesystem, inner = storage.resolve(file)
    with pq.ParquetFile(inner, filesystem=filesystem) as opened:
        return opened.read_row_group(number, columns=[column]).column(0)


def is_text(schema: pa.Schema, name: str) -> bool:
    kind = schema.field(name).type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def names_in(file: pq.ParquetFile, images: str) -> Iterator[str | None]:
    """Yields the name of each encoded image in a Parquet file: of a column, or of the image's own `path`."""
    schema = file.schema_arrow
    own = pa.types.is_struct(schema.field(images).type) and schema.field(images).type.get_field_index("path") >= 0
    name = next((n for n in NAME_COLUMNS if n in schema.names and n != images and is_text(schema, n)), None)
    if name is None and not own:
        yield from [None] * file.metadata.num_rows
        return
    for batch in file.iter_batches(ROWS_AT_ONCE, columns=[name or f"{images}.path"]):
        for value in batch.column(0).to_pylist():
            yield (value or {}).get("path") if name is None else value


def image_column(schema: pa.Schema, column: str | None = None) -> str | None:
    """Returns the column with encoded images (binary, or a struct with `bytes`) of a Parquet schema; None if none.
    `column`: look only at this one."""
    names = [column] if column else BYTES_COLUMNS
    return next((name for name in names if name in schema.names and holds_images(schema, name)), None)


def holds_images(schema: pa.Schema, name: str) -> bool:
    """Returns whether a column may hold encoded images."""
    kind = schema.field(name).type
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


@patient
def encoded_images(location: str, rows: Sequence[int], column: str | None = None) -> dict[int, bytes]:
    """Reads some rows (ascending) of a Parquet file. Returns row -> encoded image. `column`: as in `iter_images`.

    Reads only their row groups, a batch at a time. Raises OSError, or ValueError if the file holds no images: a list is
    the source of a line that names none.
    """
    if PurePosixPath(storage.split_options(location)[0]).suffix != ".parquet":
        raise ValueError(NO_IMAGE)
    filesystem, inner = storage.resolve(location)
    found: dict[int, bytes] = {}
    with pq.ParquetFile(inner, filesystem=filesystem) as file:
        images = image_column(file.schema_arrow, column)
        if images is None:
            raise ValueError(NO_IMAGE)
        start = 0
        for number in range(file.metadata.num_row_groups):
            stop = start + file.metadata.row_group(number).num_rows
            wanted = [row for row in rows if start <= row < stop]
            if wanted:
                found.update(_of_row_group(file, number, images, start, wanted))
            start = stop
    return found


def _of_row_group(
    file: pq.ParquetFile, number: int, column: str, start: int, wanted: Sequence[int]
) -> Iterator[tuple[int, bytes]]:
    """Yields (row, encoded image) for the wanted rows of a row group whose first row is `start`."""
    for batch in file.iter_batches(64, row_groups=[number], columns=[column]):
        inside = [row - start for row in wanted if start <= row < start + batch.num_rows]
        if inside:
            for offset, value in zip(inside, batch.column(0).take(inside).to_pylist(), strict=True):
                yield start + offset, (value["bytes"] if isinstance(value, dict) else value) or b""
        start += batch.num_rows
        if start > wanted[-1]:
            return
