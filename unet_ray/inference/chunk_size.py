"""Chooses the number of images in a chunk."""

from __future__ import annotations

from typing import NamedTuple

from unet_ray.data.chunks import MAX_BYTES

MIN_ROWS, MAX_ROWS, SECONDS = 8, 64, 0.25
"""Limits of a chunk, beside `MAX_BYTES`. Ray needs some hundredths of a second to pass on a chunk, so each holds about
`SECONDS` of work or more, also in small folders."""


class RowCost(NamedTuple):
    """Gives the cost of an image."""

    bytes: int
    """The most bytes of its row between the stages."""
    seconds: float
    """Approximate time of its stages on two CPU cores."""


def chunk_rows(rows: int, cost: RowCost) -> int:
    """Returns the number of rows per chunk if `rows` rows are cut into chunks."""
    fewest = max(MIN_ROWS, int(SECONDS / cost.seconds))
    return min(max(rows // 64, fewest), MAX_ROWS, max(1, MAX_BYTES // cost.bytes))
