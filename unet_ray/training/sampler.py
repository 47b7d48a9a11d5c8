"""Draws the rows of each batch, and cuts a batch into micro-batches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from unet_ray.config import OptimizationConfig
from unet_ray.data.rows import Batch, Rows, TimedBatches, prefetched


class MicroBatch(NamedTuple):
    """The rows that one rank passes through the network at once: its share of a batch, or a part of that share."""

    indices: np.ndarray
    """Row numbers, int64 [N]; never empty."""
    unlabeled: np.ndarray
    """Numbers of as many rows without masks, or of none."""
    weight: float
    """Factor of these rows' mean loss. The sum over a step's micro-batches, averaged over ranks, is then the mean over
    the whole batch. 0: the rows do not count."""
    ends_step: bool
    """Whether the optimizer step follows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampler:
    """Draws the micro-batches of one rank.

    Batches do not depend on `world_size`, and every rank takes the same number of steps.
    """

    rows: int
    """Rows with masks."""
    batch_size: int
    """Images per step, over all ranks."""
    seed: int
    rank: int = 0
    world_size: int = 1
    accumulate: int = 1
    """Micro-batches per step, at most."""
    unlabeled: int = 0
    """Rows without masks; their numbers follow those of the others."""

    @classmethod
    def of(
        cls, config: OptimizationConfig, rows: int, *, unlabeled: int = 0, rank: int = 0, world_size: int = 1
    ) -> Sampler:
        """Returns the sampler of these settings."""
        return cls(
            rows=rows,
            unlabeled=unlabeled,
            batch_size=config.batch_size,
            seed=config.seed,
            rank=rank,
            world_size=world_size,
            accumulate=config.accumulate,
        )

    @property
    def steps(self) -> int:
        """Optimizer steps per epoch."""
        return math.ceil(self.rows / self.batch_size)

    def epoch(self, epoch: int) -> list[MicroBatch]:
        """Returns this rank's micro-batches of an epoch.

        All rows, in an order drawn from (seed, epoch), are divided into batches whose sizes differ by at most one row.
        Each batch is dealt out to the ranks, and each rank cuts its share into `accumulate` parts.
        """
        order = np.random.default_rng([self.seed, epoch]).permutation(self.rows)
        batches = np.array_split(order, self.steps)
        both = zip(batches, self._without_masks(batches, epoch), strict=True)
        return [micro for batch, unlabeled in both for micro in self._of_step(batch, unlabeled)]

    def _without_masks(self, batches: list[np.ndarray], epoch: int) -> list[np.ndarray]:
        """Returns as many rows without masks as each batch has rows: none twice before all have come."""
        if not self.unlabeled:
            return [np.zeros(0, np.int64)] * len(batches)
        generator = np.random.default_rng([self.seed, epoch, 1])
        passes = [generator.permutation(self.unlabeled) for _ in range(math.ceil(self.rows / self.unlabeled))]
        order = self.rows + np.concatenate(passes)[: self.rows]
        return np.split(order, np.cumsum([len(batch) for batch in batches])[:-1])

    def _of_step(self, batch: np.ndarray, unlabeled: np.ndarray) -> Iterator[MicroBatch]:
        own, own_unlabeled = (rows[self.rank :: self.world_size] for rows in (batch, unlabeled))
        if not len(own):
            # The gradients' all-reduce needs every rank. If a small batch leaves this one without rows, it takes one
            # row with weight 0.
            yield MicroBatch(batch[:1], unlabeled[:0], 0.0, True)
            return
        count = min(self.accumulate, len(own))
        parts = zip(np.array_split(own, count), np.array_split(own_unlabeled, count), strict=True)
        for number, (indices, without) in enumerate(parts, start=1):
            yield MicroBatch(indices, without, self.world_size * len(indices) / len(batch), number == count)


class LoadedMicroBatch(NamedTuple):
    """A micro-batch with its arrays."""

    arrays: Batch
    labeled: int
    """The first rows have masks, so many; the others have none."""
    weight: float
    """See `MicroBatch`."""
    ends_step: bool


class EpochBatches:
    """The micro-batches of an epoch with their arrays, which a thread fetches ahead. Can be iterated over once."""

    def __init__(self, rows: Rows, micro_batches: list[MicroBatch]) -> None:
        self.steps = sum(micro.ends_step for micro in micro_batches)
        self._micro_batches = micro_batches
        plan = [np.concatenate([micro.indices, micro.unlabeled]) for micro in micro_batches]
        self._arrays = TimedBatches(prefetched(rows.batches(plan)))

    def __iter__(self) -> Iterator[LoadedMicroBatch]:
        for micro, arrays in zip(self._micro_batches, self._arrays, strict=True):
            yield LoadedMicroBatch(arrays, len(micro.indices), micro.weight, micro.ends_step)

    @property
    def wait_seconds(self) -> float:
        """Seconds that the training has waited for arrays so far."""
        return self._arrays.seconds
