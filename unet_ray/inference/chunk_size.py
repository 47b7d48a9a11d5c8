"""Chooses the number of images in a chunk, and of chunks that pass through Ray together."""

from __future__ import annotations

from typing import NamedTuple

from unet_ray.data.chunks import MAX_BYTES

MIN_ROWS, MAX_ROWS, SECONDS = 8, 64, 0.25
"""Limits of a chunk, beside `MAX_BYTES`. Ray needs some hundredths of a second to pass on a chunk, so each holds about
`SECONDS` of work or more, also in small folders."""

MANY_REPLICAS, MAX_CHUNKS, BLOCKS_PER_REPLICA = 8, 16, 8
"""With so many replicas, chunks pass through Ray together, at most so many as a block, as long as there are so many
blocks for each replica. Ray Data takes some 100 ms of CPU for a block, and passes on 25 a second on two cores: measured
with replicas that sleep (`jobs/benchmark.py --section scale`), 1,800 images a second in blocks of one chunk of 64
images, 4,200 in blocks of four. With fewer replicas that is enough: prediction without a network was no faster in
blocks of four on two cores."""
BLOCK_BYTES, BLOCK_SECONDS = 256 * 2**20, 30
"""Limits of a block: what it takes in memory several times over on each node, and what a replica's death loses."""
GPU_SPEED = 50
"""A GPU computes at least so many times as fast as two CPU cores."""


class RowCost(NamedTuple):
    """Gives the cost of an image."""

    bytes: int
    """The most bytes of its row between the stages."""
    seconds: float
    """Approximate time of its stages on two CPU cores; infinite if it may be any."""


def chunk_rows(rows: int, cost: RowCost) -> int:
    """Returns the number of rows per chunk if `rows` rows are cut into chunks."""
    fewest = max(MIN_ROWS, int(SECONDS / cost.seconds))
    return min(max(rows // 64, fewest), MAX_ROWS, max(1, MAX_BYTES // cost.bytes))


def chunks_per_block(chunks: int, cost: RowCost, replicas: int, device: str) -> int:
    """Returns how many of so many chunks pass from stage to stage together."""
    if replicas < MANY_REPLICAS:
        return 1
    rows = chunk_rows(64 * MAX_ROWS, cost)
    seconds = rows * cost.seconds / (GPU_SPEED if device == "cuda" else 1)
    fitting = min(BLOCK_BYTES // (rows * cost.bytes), int(BLOCK_SECONDS / seconds))
    return max(1, min(MAX_CHUNKS, fitting, chunks // (replicas * BLOCKS_PER_REPLICA)))
