"""Decoded training rows: in memory or streamed, read in any order.

A *row* is one pair, decoded and resized: image uint8 [H,W,C], mask uint8 [H,W]. Rows are numbered by their place in
the sorted list of pairs. Training asks for batches of row numbers, so that order, batch composition and steps are
decided in one place (`engine.batch_plan`) and are the same however the rows are held.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import psutil

from unet_ray import imaging, storage
from unet_ray.config import DataConfig, ModelConfig, UserError
from unet_ray.imaging import ImageError
from unet_ray.records import Pair

BATCHES_AHEAD = 2

Batch = dict[str, np.ndarray]
"""`image` uint8 [N,H,W,C], `mask` uint8 [N,H,W], `index` int64 [N] (row numbers)."""


class Rows(Protocol):
    """Something that can be asked for batches of rows."""

    def __len__(self) -> int: ...

    def batches(self, plan: Sequence[np.ndarray]) -> Iterator[Batch]:
        """One batch for each array of row numbers in `plan`, in its order."""


@dataclass(frozen=True, slots=True)
class Decoder:
    """Pair -> row: a plain callable that a thread, a process or a Ray task can run."""

    data: DataConfig
    in_channels: int

    @classmethod
    def of(cls, model: ModelConfig, data: DataConfig) -> Decoder:
        return cls(data, model.in_channels)

    def __call__(self, image_path: str, mask_path: str) -> tuple[np.ndarray, np.ndarray]:
        """Image uint8 [H,W,C] and mask uint8 [H,W]. Raises UserError that names the file."""
        size = self.data.size_hw
        try:
            image, image_size = imaging.decode_image(storage.read_bytes(image_path), self.in_channels, size)
        except (ImageError, OSError) as error:
            raise UserError(f"{image_path}: {error}; mend or remove it") from None
        try:
            mask, mask_size = imaging.decode_mask(storage.read_bytes(mask_path), self.data, size)
        except (ImageError, OSError) as error:
            raise UserError(f"{mask_path}: {error}") from None
        if image_size != mask_size:
            raise UserError(
                f"{mask_path}: {mask_size[1]}x{mask_size[0]} pixels, but its image {image_path} has "
                f"{image_size[1]}x{image_size[0]}: the two must match"
            )
        return image, mask

    def row_bytes(self) -> int:
        height, width = self.data.size_hw
        return height * width * (self.in_channels + 1)


def fits_in_memory(count: int, decoder: Decoder, share: float) -> bool:
    """Whether `count` rows take at most this share of the memory that is free now."""
    return count * decoder.row_bytes() <= share * psutil.virtual_memory().available


class Subset:
    """Some of the rows, numbered from 0; `index` in their batches stays the number among all rows."""

    def __init__(self, rows: Rows, indices: Sequence[int]) -> None:
        self.rows, self.indices = rows, np.asarray(indices, np.int64)

    def __len__(self) -> int:
        return len(self.indices)

    def batches(self, plan: Sequence[np.ndarray]) -> Iterator[Batch]:
        return self.rows.batches([self.indices[numbers] for numbers in plan])


class MemoryRows:
    """All rows decoded once, in two arrays."""

    def __init__(self, pairs: Sequence[Pair], decoder: Decoder) -> None:
        height, width = decoder.data.size_hw
        self.image_MHWC = np.empty((len(pairs), height, width, decoder.in_channels), np.uint8)
        self.mask_MHW = np.empty((len(pairs), height, width), np.uint8)

        def fill(index: int) -> None:
            self.image_MHWC[index], self.mask_MHW[index] = decoder(pairs[index].image, pairs[index].mask)

        with ThreadPoolExecutor(os.cpu_count()) as threads:
            for _ in threads.map(fill, range(len(pairs))):
                pass  # raises what a decode raised

    def __len__(self) -> int:
        return len(self.mask_MHW)

    def batches(self, plan: Sequence[np.ndarray]) -> Iterator[Batch]:
        for indices in plan:
            yield {"image": self.image_MHWC[indices], "mask": self.mask_MHW[indices], "index": indices}


class StreamedRows:
    """Rows decoded anew in every epoch by threads of this process, a few batches ahead of the training."""

    def __init__(self, pairs: Sequence[Pair], decoder: Decoder) -> None:
        self.pairs, self.decoder = pairs, decoder

    def __len__(self) -> int:
        return len(self.pairs)

    def batches(self, plan: Sequence[np.ndarray]) -> Iterator[Batch]:
        def load(index: int) -> tuple[np.ndarray, np.ndarray]:
            return self.decoder(self.pairs[index].image, self.pairs[index].mask)

        with ThreadPoolExecutor(os.cpu_count()) as threads:
            # Submitted a few batches ahead: a plain map would decode the whole epoch into memory.
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


def _collect(indices: np.ndarray, futures: list) -> Batch:
    rows = [future.result() for future in futures]
    return {
        "image": np.stack([image for image, _ in rows]),
        "mask": np.stack([mask for _, mask in rows]),
        "index": indices,
    }
