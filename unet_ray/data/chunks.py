"""Chunks: rows that travel through the stages of prediction and evaluation as one block of columns."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def readable(name: bytes) -> str:
    """A path as text; bytes that are no UTF-8 as \\\\xNN."""
    return name.decode("utf-8", "backslashreplace")


def objects(values: Sequence[Any]) -> np.ndarray:
    """A column of Python objects (NumPy would make a matrix of equally long lists)."""
    column = np.empty(len(values), dtype=object)
    column[:] = values
    return column


def to_parquet(table: pa.Table, compression: str = "zstd", row_group_size: int | None = None) -> bytes:
    stream = io.BytesIO()
    pq.write_table(table, stream, compression=compression, row_group_size=row_group_size)
    return stream.getvalue()


Chunk = dict[str, np.ndarray]
Stage = Callable[[Chunk], Chunk]
