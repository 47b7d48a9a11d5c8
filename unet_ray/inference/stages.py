"""The stages of prediction and evaluation: plain callables, columns in, columns out, that know nothing of Ray.

A *chunk* is a dict of equally long columns, one row an image, that travels through the stages as one block. A row that
fails carries its reason in `error` from then on, and the later stages pass it by.

    number ─► before: read, decode ─► model ─► after: own size, clean-up ─► write, or compare
    number ─► before: rows only ─► model: read, decode, tiles, clean-up ─► write, or compare       (with tiles)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from unet_ray.config import Cleanup
from unet_ray.data import imaging, masks
from unet_ray.data.chunks import Chunk, Stage, objects
from unet_ray.data.imaging import ImageError, Pixels, Source
from unet_ray.inference.reader import Reader
from unet_ray.inference.segmenter import BatchSegmenter, WholeImage
from unet_ray.models.checkpoint import ModelCard

Load = Callable[[int], Chunk]
"""The rows of the chunk of that number: at least `path` (bytes) of each."""
Prediction = WholeImage | str
"""Of one image; or why there is none."""
Finish = Callable[[Chunk, Iterator[Prediction]], Chunk]
"""What is done with the masks of a chunk, which are made one at a time."""
DECODE_AHEAD_PIXELS = 50_000_000
"""With tiles, the next image is decoded meanwhile if neither has more pixels."""
TIMES = ("decode_ms", "model_ms", "write_ms")


@dataclass(frozen=True, slots=True)
class Decode:
    """Adds `image` uint8 [N,H,W,C] at the model's size (zeros where it failed), `height`, `width`, `error`."""

    reader: Reader
    size_hw: tuple[int, int]

    def __call__(self, chunk: Chunk) -> Chunk:
        count = len(chunk["path"])
        image = np.zeros((count, *self.size_hw, self.reader.channels), np.uint8)
        own_size = np.zeros((count, 2), np.int32)
        errors, milliseconds = [""] * count, np.zeros(count, np.float32)
        started = time.perf_counter()
        for row, data in enumerate(self.reader.encoded(chunk)):
            try:
                image[row], own_size[row] = self.reader.resized(data, self.size_hw)
            except ImageError as error:
                errors[row] = str(error)
            now = time.perf_counter()
            milliseconds[row], started = 1e3 * (now - started), now
        return {
            **chunk,
            "image": image,
            "height": own_size[:, 0],
            "width": own_size[:, 1],
            "error": objects(errors),
            "decode_ms": milliseconds,
        }


class Segment:
    """`image` -> `logits` float16 [N,K,H,W], `confidence` float32 [N]."""

    def __init__(self, segmenter: BatchSegmenter) -> None:
        self.segmenter = segmenter

    def __call__(self, chunk: Chunk) -> Chunk:
        chunk = dict(chunk)
        image = chunk.pop("image")
        card = self.segmenter.card
        good = np.flatnonzero(chunk["error"] == "")
        logits = np.zeros((len(image), card.model.num_classes, *card.image_size), np.float16)
        confidence = np.zeros(len(image), np.float32)
        started = time.perf_counter()
        if len(good):
            result = self.segmenter(image[good])
            logits[good], confidence[good] = result.logits, result.confidence
        each = 1e3 * (time.perf_counter() - started) / max(1, len(good))
        milliseconds = np.where(chunk["error"] == "", each, 0).astype(np.float32)
        return {**chunk, "logits": logits, "confidence": confidence, "model_ms": milliseconds}


@dataclass(frozen=True, slots=True)
class AtOwnSize:
    """`logits` -> masks at each image's own size, cleaned up, given to `finish`."""

    finish: Finish
    card: ModelCard
    cleanup: Cleanup
    probabilities: bool

    def __call__(self, chunk: Chunk) -> Chunk:
        chunk = dict(chunk)
        return self.finish(chunk, self._predictions(chunk, chunk.pop("logits")))

    def _predictions(self, chunk: Chunk, logits: np.ndarray) -> Iterator[Prediction]:
        for row, error in enumerate(chunk["error"]):
            if error:
                yield str(error)
                continue
            size = (int(chunk["height"][row]), int(chunk["width"][row]))
            mask = imaging.to_own_size(logits[row], size, self.card.threshold)
            maps = imaging.probabilities(logits[row], size) if self.probabilities else None
            yield WholeImage(_cleaned(mask, self.cleanup), float(chunk["confidence"][row]), maps)


def _cleaned(mask: np.ndarray, cleanup: Cleanup) -> np.ndarray:
    return mask if cleanup == Cleanup() else masks.clean(mask, cleanup)


class SegmentByTiles:
    """Rows -> what `finish` returns: reads, decodes and segments each image at its own size, a tile at a time.

    One stage, as an image of any size need then never leave the process; the next image of ordinary size is read and
    decoded meanwhile.
    """

    def __init__(
        self,
        segmenter: BatchSegmenter,
        finish: Finish,
        *,
        reader: Reader,
        cleanup: Cleanup,
        tile: int,
        overlap: float,
        probabilities: bool,
    ) -> None:
        self.segmenter, self.finish, self.reader, self.cleanup = segmenter, finish, reader, cleanup
        self.tile, self.overlap, self.probabilities = tile, overlap, probabilities

    def __call__(self, chunk: Chunk) -> Chunk:
        count = len(chunk["path"])
        chunk = {**chunk, "decode_ms": np.zeros(count, np.float32), "model_ms": np.zeros(count, np.float32)}
        return self.finish(chunk, self._predictions(chunk))

    def _predictions(self, chunk: Chunk) -> Iterator[Prediction]:
        with ThreadPoolExecutor(1) as ahead:
            encoded = self.reader.encoded(chunk)
            upcoming = ahead.submit(self._decoded, encoded)
            for row in range(len(chunk["path"])):
                pixels, milliseconds = upcoming.result()
                chunk["decode_ms"][row] = milliseconds
                small = isinstance(pixels, str) or np.prod(pixels.size_hw) <= DECODE_AHEAD_PIXELS
                if small:
                    upcoming = ahead.submit(self._decoded, encoded)
                if isinstance(pixels, str):
                    yield pixels
                else:
                    started = time.perf_counter()
                    whole = self.segmenter.by_tiles(pixels, self.tile, self.overlap, probabilities=self.probabilities)
                    chunk["model_ms"][row] = 1e3 * (time.perf_counter() - started)
                    del pixels
                    yield WholeImage(_cleaned(whole.mask, self.cleanup), whole.confidence, whole.probabilities)
                    del whole
                if not small:
                    upcoming = ahead.submit(self._decoded, encoded)

    def _decoded(self, encoded: Iterator[Source | str]) -> tuple[Pixels | str, float]:
        started = time.perf_counter()
        data = next(encoded, "")
        if data == "":  # beyond the last row
            return "", 0
        try:
            pixels: Pixels | str = self.reader.pixels(data)
        except ImageError as error:
            pixels = str(error)
        return pixels, 1e3 * (time.perf_counter() - started)


@dataclass(frozen=True, slots=True)
class Chunks:
    """Chunks that are in memory: columns cut into pieces of `size` rows."""

    columns: Mapping[str, Sequence[Any]]
    size: int

    def __len__(self) -> int:
        return -(-len(next(iter(self.columns.values()))) // self.size)

    def __call__(self, number: int) -> Chunk:
        start = number * self.size
        return {name: objects(values[start : start + self.size]) for name, values in self.columns.items()}


@dataclass(frozen=True, slots=True)
class Preprocess:
    """Number of a chunk -> its rows, decoded unless that is left to the model's stage."""

    load: Load
    decode: Decode | None

    def __call__(self, number: int) -> Chunk:
        chunk = self.load(number)
        return chunk if self.decode is None or not len(chunk["path"]) else self.decode(chunk)


def run_here(
    numbers: Sequence[int], before: Callable[[int], Chunk], model: Callable[[], Stage], after: Stage
) -> Iterator[Chunk]:
    """The stages in this process: the model on this thread, decoding one chunk ahead and writing one behind on others.

    Yields what `after` returns, in the order of `numbers`; nothing for a chunk with no rows.
    """
    segment = model()
    threads = torch.get_num_threads()
    # One thread each: more would take turns with the network's on the same cores. The setting is each thread's own, and
    # the default of later ones.
    alone = partial(ThreadPoolExecutor, 1, initializer=torch.set_num_threads, initargs=(1,))
    with alone() as decoding, alone() as writing:
        upcoming = [decoding.submit(before, number) for number in numbers[:1]]
        written = None
        try:
            for place in range(len(numbers)):
                decoded = upcoming.pop().result()
                upcoming = [decoding.submit(before, number) for number in numbers[place + 1 : place + 2]]
                if not len(decoded["path"]):
                    continue
                segmented = segment(decoded)
                if written is not None:
                    yield written.result()
                written = writing.submit(after, segmented)
            if written is not None:
                yield written.result()
        finally:
            decoding.shutdown(wait=False, cancel_futures=True)
            torch.set_num_threads(threads)
