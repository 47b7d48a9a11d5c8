"""Defines chunks: blocks of rows, held as columns, that pass through the stages of prediction and evaluation."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def readable(name: bytes) -> str:
    """Decodes a path; bytes that are not UTF-8 become \\\\xNN."""
    return name.decode("utf-8", "backslashreplace")


def objects(values: Sequence[Any]) -> np.ndarray:
    """Makes a column of Python objects; np.array would turn lists of equal length into a matrix."""
    column = np.empty(len(values), dtype=object)
    column[:] = values
    return column


def to_parquet(table: pa.Table, compression: str = "zstd", row_group_size: int | None = None) -> bytes:
    """Encodes a table as a Parquet file."""
    stream = io.BytesIO()
    pq.write_table(table, stream, compression=compression, row_group_size=row_group_size)
    return stream.getvalue()


MAX_BYTES = 64 * 2**20
"""The most bytes of a chunk between the stages. It is below the 128 MiB at which Ray Data splits a block in two."""
Chunk = dict[str, np.ndarray]
Stage = Callable[[Chunk], Chunk]
