"""Renames the folders of the inputs in the records of a prediction: `predict --moved OLD=NEW`."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from unet_ray.config import UserError
from unet_ray.data import storage
from unet_ray.data.chunks import readable
from unet_ray.inference.ledger import Ledger

COLUMNS = ("path", "source")
"""Columns of the records that hold the location of an image."""


@dataclass(frozen=True, slots=True)
class Move:
    """A folder, or a list, that has another name than it had in the earlier run."""

    old: str
    new: str

    @classmethod
    def parse(cls, text: str, recorded: Sequence[str]) -> Move:
        """Reads `OLD=NEW`. `recorded`: the inputs of the earlier run. Raises UserError if none of them is in OLD."""
        places = [place for place, letter in enumerate(text) if letter == "="]  # folders may have a `=` in their name
        moves = [cls(_folder(text[:place]), _folder(text[place + 1 :])) for place in places]
        for move in moves:
            # After a stop between the renaming and the end, NEW is what the earlier run has.
            if any(_inside(folder, location) for folder in (move.old, move.new) for location in recorded):
                return move
        raise UserError(f"--moved {text!r}: OLD=NEW, where OLD is an input of the earlier run: {', '.join(recorded)}")

    def of(self, location: str) -> str:
        """Returns the location's name now."""
        return self.new + location[len(self.old) :] if _inside(self.old, location) else location


def renamed(location: str, moves: Sequence[Move]) -> str:
    """Returns the location's name after all moves."""
    for move in moves:
        location = move.of(location)
    return location


def _inside(folder: str, location: str) -> bool:
    """Returns whether a location is this folder, or in it; or this list, or a row of it."""
    return location == folder or location.startswith((f"{folder}/", f"{folder}#", f"{folder}?"))


def _folder(location: str) -> str:
    return storage.split_options(storage.absolute(location))[0].rstrip("/")


def rename(ledger: Ledger, moves: Sequence[Move]) -> None:
    """Writes the new names into all records. A stop does no harm: given again, it renames the rest. Raises UserError
    if the run has lost its lock."""
    for location in ledger.files() if moves else ():
        data = storage.read_bytes(location)
        new = _with_new_names(data, moves)
        if new is not None:
            ledger.check_lock()
            storage.write_bytes(location, new, durable=True)


def _with_new_names(data: bytes, moves: Sequence[Move]) -> bytes | None:
    """Returns a Parquet file with new names, in the same row groups; None if no name changes."""
    file = pq.ParquetFile(io.BytesIO(data))
    names = [name for name in COLUMNS if name in file.schema_arrow.names]
    if not names or not file.metadata.num_row_groups:
        return None
    stream, changed = io.BytesIO(), False
    stored = file.metadata.row_group(0).column(0).compression
    compression = "none" if stored == "UNCOMPRESSED" else stored
    with pq.ParquetWriter(stream, file.schema_arrow, compression=compression) as writer:
        for number in range(file.metadata.num_row_groups):
            table = file.read_row_group(number)
            for name in names:
                column = _new_column(table[name], moves)
                changed |= not column.equals(table[name])
                table = table.set_column(table.schema.get_field_index(name), name, column)
            writer.write_table(table)
    return stream.getvalue() if changed else None


def _new_column(column: pa.ChunkedArray, moves: Sequence[Move]) -> pa.ChunkedArray:
    values: list[Any]
    if pa.types.is_binary(column.type):
        values = [os.fsencode(renamed(os.fsdecode(value), moves)) for value in column.to_pylist()]
    else:
        readable_moves = [Move(readable(os.fsencode(move.old)), readable(os.fsencode(move.new))) for move in moves]
        values = [renamed(value, readable_moves) for value in column.to_pylist()]
    return pa.chunked_array([pa.array(values, column.type)])
