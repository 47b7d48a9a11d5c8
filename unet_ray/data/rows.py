"""Reads decoded training rows in any order, from memory or streamed.

A *row* is one pair, decoded and resized: image uint8 [H,W,C], mask uint8 [H,W] and, if the loss needs it, border uint8
[H,W] (`masks.border_map`). Its number is its index in the sorted list of pairs. Training asks for batches of row
numbers. So `training.sampler` alone decides their order, and it does not depend on where the rows are kept.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import psutil

from unet_ray.config import IGNORE, DataConfig, TrainConfig, UserError
from unet_ray.data import imaging, mask_files, masks
from unet_ray.data.imaging import ImageError
from unet_ray.data.pairs import Pair

BATCHES_AHEAD = 2

EncodedMask = bytes | list[bytes | None]
"""A mask as `imaging.decode_mask` takes it."""
Row = dict[str, np.ndarray]
Batch = dict[str, np.ndarray]
"""`image` uint8 [N,H,W,C], `mask` and perhaps `border` uint8 [N,H,W], `index` int64 [N] (row numbers)."""


class Decodes(Protocol):
    """Decodes a pair into a row: a plain callable that a thread, a process or a Ray task can run."""

    def __call__(self, image_path: str, mask_path: str) -> Row: ...

    def empty(self, count: int) -> Batch:
        """Allocates a batch of this many rows, filled with zeros."""

    def row_bytes(self) -> int:
        """Returns the size of a row in bytes."""


class Rows(Protocol):
    """A source of batches of rows."""

    def __len__(self) -> int: ...

    def batches(self, plan: Sequence[np.ndarray]) -> Iterator[Batch]:
        """Yields one batch for each array of row numbers in `plan`, in its order."""


@dataclass(frozen=True, slots=True)
class Decoder:
    """Decodes pairs from their files."""

    data: DataConfig
    in_channels: int
    border_sigma: float = 0.0
    """Sigma of the border map in pixels; 0: rows have no border map."""

    @classmethod
    def of(cls, config: TrainConfig) -> Decoder:
        fit = config.train
        return cls(config.data, config.model.in_channels, fit.border_sigma if fit.border_weight else 0.0)

    def __call__(self, image_path: str, mask_path: str) -> Row:
        """Reads and decodes a pair. Raises UserError that names the file.

        Without a mask (an empty path) all its pixels are `IGNORE`, or 0 if the image can't be read.
        """
        if not mask_path:
            return self._unlabeled(image_path)
        return self.row(self.read(image_path), self.read_mask(mask_path), image_path, mask_path)

    def _unlabeled(self, path: str) -> Row:
        row = {name: values[0] for name, values in self.empty(1).items()}
        try:
            data = imaging.read_file(path)
            row["image"], _ = imaging.decode_image(
                data, self.in_channels, self.data.size_hw, value_range=self.data.value_range
            )
        except (OSError, ImageError):
            return row
        row["mask"][:] = IGNORE
        return row

    @staticmethod
    def read(path: str) -> bytes:
        """Reads an encoded file. Raises UserError that names it."""
        try:
            return imaging.read_file(path)
        except (OSError, ImageError) as error:
            raise UserError(f"{path}: {error}") from None

    @staticmethod
    def read_mask(location: str) -> EncodedMask:
        """Reads the files of a mask. Raises UserError that names it."""
        try:
            return mask_files.read(location)
        except (OSError, ImageError) as error:
            raise UserError(f"{mask_files.shown(location)}: {error}") from None

    def row(self, encoded_image: bytes, encoded_mask: EncodedMask, image_path: str, mask_path: str) -> Row:
        """Decodes a pair whose files have been read. Raises UserError that names the file."""
        size = self.data.size_hw
        try:
            image, image_size = imaging.decode_image(
                encoded_image, self.in_channels, size, value_range=self.data.value_range
            )
        except ImageError as error:
            raise UserError(f"{image_path}: {error}; repair or remove it") from None
        try:
            mask, mask_size = imaging.decode_mask(encoded_mask, self.data, size, encoded_image)
        except ImageError as error:
            raise UserError(f"{mask_files.shown(mask_path)}: {error}") from None
        if problem := imaging.problem_of_sizes(image_size, mask_size, self.data):
            raise UserError(f"{mask_files.shown(mask_path)}: {problem}")
        row = {"image": image, "mask": mask}
        if self.border_sigma:
            row["border"] = masks.border_map(mask, self.border_sigma)
        return row

    def empty(self, count: int) -> Batch:
        height, width = self.data.size_hw
        batch = {
            "image": np.zeros((count, height, width, self.in_channels), np.uint8),
            "mask": np.zeros((count, height, width), np.uint8),
        }
        if self.border_sigma:
            batch["border"] = np.zeros_like(batch["mask"])
        return batch

    def row_bytes(self) -> int:
        height, width = self.data.size_hw
        return height * width * (self.in_channels + 1 + bool(self.border_sigma))


def fits_in_memory(count: int, decoder: Decodes, share: float) -> bool:
    """Returns whether `count` rows take at most this share of the memory that is available now."""
    return count * decoder.row_bytes() <= share * psutil.virtual_memory().available


class Subset:
    """Selects some of the rows and numbers them from 0; `index` in their batches is still the number among all rows."""

    def __init__(self, rows: Rows, indices: Sequence[int]) -> None:
        self.rows, self.indices = rows, np.asarray(indices, np.int64)

    def __len__(self) -> int:
        return len(self.indices)

    def batches(self, plan: Sequence[np.ndarray]) -> Iterator[Batch]:
        return self.rows.batches([self.indices[numbers] for numbers in plan])


class MemoryRows:
    """Decodes all rows once and keeps them in memory: one array for images, one for masks, one for borders."""

    def __init__(self, pairs: Sequence[Pair], decoder: Decodes) -> None:
        self.arrays = decoder.empty(len(pairs))

        def fill(index: int) -> None:
            for name, values in decoder(pairs[index].image, pairs[index].mask).items():
                self.arrays[name][index] = values

        with ThreadPoolExecutor(os.cpu_count()) as threads:
            for _ in threads.map(fill, range(len(pairs))):
                pass  # re-raises an error of a decoder

    def __len__(self) -> int:
        return len(self.arrays["mask"])

    def batches(self, plan: Sequence[np.ndarray]) -> Iterator[Batch]:
        for indices in plan:
            yield {**{name: values[indices] for name, values in self.arrays.items()}, "index": indices}


class StreamedRows:
    """Decodes rows anew in every epoch, in threads of this process, a few batches ahead of the training."""

    def __init__(self, pairs: Sequence[Pair], decoder: Decodes) -> None:
        self.pairs, self.decoder = pairs, decoder

    def __len__(self) -> int:
        return len(self.pairs)

    def batches(self, plan: Sequence[np.ndarray]) -> Iterator[Batch]:
        def load(index: int) -> Row:
            return self.decoder(self.pairs[index].image, self.pairs[index].mask)

        with ThreadPoolExecutor(os.cpu_count()) as threads:
            # Only a few batches are submitted ahead; a plain map would decode the whole epoch into memory.
            waiting: deque[tuple[np.ndarray, list]] = deque()
            try:
                for indices in plan:
                    waiting.append((indices, [threads.submit(load, int(index)) for index in indices]))
                    if len(waiting) > BATCHES_AHEAD:
                        yield _collect(*waiting.popleft())
                while waiting:
                    yield _collect(*waiting.popleft())
            finally:
                threads.shutdown(wait=False, cancel_futures=True)


def prefetched(batches: Iterator[Batch], ahead: int = BATCHES_AHEAD) -> Iterator[Batch]:
    """Yields the same batches; a thread fetches the next ones while the caller works on an earlier one."""
    with ThreadPoolExecutor(1) as thread:
        waiting: deque[Future[Batch | None]] = deque()
        try:
            waiting.extend(thread.submit(next, batches, None) for _ in range(ahead))
            while (batch := waiting.popleft().result()) is not None:
                waiting.append(thread.submit(next, batches, None))
                yield batch
        finally:
            thread.shutdown(cancel_futures=True)


class TimedBatches:
    """Yields the same batches and measures how long the caller waits for them, in `seconds`."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self.batches, self.seconds = batches, 0.0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        started = time.perf_counter()
        try:
            return next(self.batches)
        finally:
            self.seconds += time.perf_counter() - started


def _collect(indices: np.ndarray, futures: list) -> Batch:
    rows = [future.result() for future in futures]
    return {**{name: np.stack([row[name] for row in rows]) for name in rows[0]}, "index": indices}
