"""Which rows make a batch, and how a batch is cut into micro-batches."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


class MicroBatch(NamedTuple):
    """What one rank passes through the network at once: its part of a batch, or a part of that."""

    indices: np.ndarray
    """Row numbers; never empty."""
    share: float
    """What the mean loss of these rows is multiplied by, so that the sum over a step's parts and the mean over ranks is
    the mean over the whole batch."""


Step = list[MicroBatch]
"""One optimizer step of one rank."""


def batch_plan(
    count: int, batch_size: int, *, seed: int, epoch: int, rank: int = 0, world: int = 1, accumulate: int = 1
) -> list[Step]:
    """This rank's steps of an epoch over `count` rows: all rows in an order drawn from (seed, epoch), in batches of
    equal size give or take one row, each dealt out to the ranks and there cut into at most `accumulate` parts.

    Batches do not depend on `world`, and every rank takes the same number of steps.
    """
    order = np.random.default_rng([seed, epoch]).permutation(count)
    steps = []
    for batch in np.array_split(order, math.ceil(count / batch_size)):
        own = batch[rank::world]
        # A rank that a small batch leaves with nothing takes a row for nothing: the gradients' all-reduce needs it.
        parts = np.array_split(own, min(accumulate, len(own))) if len(own) else [batch[:1]]
        steps.append([MicroBatch(part, world * len(part) / len(batch) if len(own) else 0.0) for part in parts])
    return steps
