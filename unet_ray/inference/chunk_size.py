"""How many images a chunk holds."""

from __future__ import annotations

from typing import NamedTuple

MIN_ROWS, MAX_ROWS, MAX_BYTES, SECONDS = 8, 64, 64 * 2**20, 0.25
"""Rows of a chunk; `MAX_BYTES` of it stay below the 128 MiB at which Ray Data splits a block in two. Handing a chunk
around takes Ray some hundredths of a second, so short folders are not cut finer than into `SECONDS` of work."""


class RowCost(NamedTuple):
    """What an image costs."""

    bytes: int
    """The largest that its row gets between the stages."""
    seconds: float
    """About how long two CPU cores take over it."""


def chunk_rows(rows: int, cost: RowCost) -> int:
    """Returns how many rows a chunk holds when there are `rows` to cut into chunks."""
    fewest = max(MIN_ROWS, int(SECONDS / cost.seconds))
    return min(max(rows // 64, fewest), MAX_ROWS, max(1, MAX_BYTES // cost.bytes))
