"""Defines the stages of prediction and evaluation: callables on chunks, independent of Ray.

A *chunk* is a dict of equally long columns, one row per image. It passes through the stages as one block. If a row
fails, its column `error` holds the reason, and the later stages skip it.

    whole images   number ─► preprocess: read, decode ─► model ─► postprocess: own size, clean-up, write or compare
    tiles          number ─► preprocess: rows ─► model: read, decode, tiles, clean-up, write or compare ─► nothing
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from unet_ray.config import Cleanup
from unet_ray.data import masks, own_size
from unet_ray.data.chunks import Chunk, objects
from unet_ray.data.imaging import ImageError, Pixels, Source
from unet_ray.inference.reader import Reader, checksum
from unet_ray.inference.segmenter import BatchSegmenter, SegmentedMask
from unet_ray.models.checkpoint import ModelCard

TIMES = ("decode_ms", "model_ms", "postprocess_ms", "write_ms")
"""Columns for the milliseconds that each stage took for an image."""
NOT_FINITE = "the network's scores are not finite: try --precision fp32, or train again"
DECODE_AHEAD_PIXELS = 50_000_000
"""With tiles, the next image is decoded during the segmentation of the current one if the current one has at most this
many pixels. Two images are then in memory; the next one may have any size."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Holds the mask of one image at its own size, or the reason for a failure."""

    segmented: SegmentedMask | None
    error: str
    """Empty if there is a mask."""
    milliseconds: dict[str, float]
    """Times of the stages so far, named as in `TIMES`."""
    checksum: str = ""
    """Of the image's file, see `reader.checksum`."""


Load = Callable[[int], Chunk]
"""Returns the rows of the chunk with this number: at least the column `path` (bytes)."""
MakeMasks = Callable[[Chunk], Iterator[Prediction]]
"""Makes the masks of a chunk at their own size, one at a time: a chunk of large masks would not fit in memory."""
MaskSink = Callable[[Chunk, Iterator[Prediction]], Chunk]
"""Takes the masks of a chunk one at a time, and writes them (`write.Write`) or compares them
(`evaluation.compare.Compare`). Returns the outcome of each row."""


# --- every pipeline ---


@dataclass(frozen=True, slots=True)
class Preprocess:
    """Loads the rows of a chunk by its number and decodes their images."""

    load: Load
    decode: DecodeImages

    def __call__(self, number: int) -> Chunk:
        chunk = self.load(number)
        return self.decode(chunk) if len(chunk["path"]) else chunk


@dataclass(frozen=True, slots=True)
class MasksToSink:
    """Makes the masks of a chunk and passes each to `sink` before it makes the next."""

    make_masks: MakeMasks
    sink: MaskSink

    def __call__(self, chunk: Chunk) -> Chunk:
        return self.sink(chunk, self.make_masks(chunk))


def unchanged(chunk: Chunk) -> Chunk:
    """Returns the chunk unchanged: the stage of a pipeline that has no work for it."""
    return chunk


@dataclass(frozen=True, slots=True)
class Chunks:
    """Cuts columns in memory into chunks of `size` rows."""

    columns: Mapping[str, Sequence[Any]]
    size: int

    def __len__(self) -> int:
        return -(-len(next(iter(self.columns.values()))) // self.size)

    def __call__(self, number: int) -> Chunk:
        start = number * self.size
        return {name: objects(values[start : start + self.size]) for name, values in self.columns.items()}


def _cleaned(mask: np.ndarray, cleanup: Cleanup) -> np.ndarray:
    return mask if cleanup == Cleanup() else masks.clean(mask, cleanup)


def _milliseconds_since(started: float) -> float:
    return 1e3 * (time.perf_counter() - started)


# --- whole images ---


@dataclass(frozen=True, slots=True)
class DecodeImages:
    """Reads and decodes the images of a chunk.

    Adds the columns `image` uint8 [N,H,W,C] at the model's size (zeros for rows that failed), `height` and `width` of
    the image itself, `error`, `checksum` of its file, and `decode_ms`.
    """

    reader: Reader
    size_hw: tuple[int, int]

    def __call__(self, chunk: Chunk) -> Chunk:
        count = len(chunk["path"])
        image = np.zeros((count, *self.size_hw, self.reader.channels), np.uint8)
        own_size = np.zeros((count, 2), np.int32)
        errors, checksums, milliseconds = [""] * count, [""] * count, np.zeros(count, np.float32)
        started = time.perf_counter()
        for row, data in enumerate(self.reader.encoded(chunk)):
            checksums[row] = checksum(data)
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
            "checksum": objects(checksums),
            "decode_ms": milliseconds,
        }


class Segment:
    """Replaces the column `image` with `logits` float16 [N,K,H,W], `confidence` and `uncertainty` float32 [N], and
    `model_ms`."""

    def __init__(self, segmenter: BatchSegmenter) -> None:
        self.segmenter = segmenter

    def __call__(self, chunk: Chunk) -> Chunk:
        chunk = dict(chunk)
        image = chunk.pop("image")
        card = self.segmenter.card
        good = np.flatnonzero(chunk["error"] == "")
        logits = np.zeros((len(image), card.model.num_classes, *card.image_size), np.float16)
        confidence, uncertainty = np.zeros((2, len(image)), np.float32)
        started = time.perf_counter()
        if len(good):
            result = self.segmenter(image[good])
            logits[good], confidence[good], uncertainty[good] = result.logits, result.confidence, result.uncertainty
        each = _milliseconds_since(started) / max(1, len(good))
        milliseconds = np.where(chunk["error"] == "", each, 0).astype(np.float32)
        sure = {"confidence": confidence, "uncertainty": uncertainty}
        return {**chunk, "logits": logits, **sure, "model_ms": milliseconds}


@dataclass(frozen=True, slots=True)
class ToOwnSize:
    """Makes masks at each image's own size from the column `logits`, and cleans them up."""

    card: ModelCard
    cleanup: Cleanup
    probabilities: bool

    def __call__(self, chunk: Chunk) -> Iterator[Prediction]:
        for row, error in enumerate(chunk["error"]):
            if not error and not np.isfinite(chunk["confidence"][row]):
                error = NOT_FINITE
            started = time.perf_counter()
            segmented = None if error else self._segmented(chunk, row)
            milliseconds = {name: float(chunk[name][row]) for name in ("decode_ms", "model_ms")}
            milliseconds["postprocess_ms"] = _milliseconds_since(started)
            yield Prediction(segmented, str(error), milliseconds, chunk["checksum"][row])

    def _segmented(self, chunk: Chunk, row: int) -> SegmentedMask:
        logits = chunk["logits"][row]
        size_hw = (int(chunk["height"][row]), int(chunk["width"][row]))
        mask = own_size.to_own_size(logits, size_hw, self.card.threshold)
        maps = own_size.probabilities(logits, size_hw) if self.probabilities else None
        confidence, uncertainty = (float(chunk[name][row]) for name in ("confidence", "uncertainty"))
        return SegmentedMask(_cleaned(mask, self.cleanup), confidence, uncertainty, maps)


# --- tiles ---


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentByTiles:
    """Reads, decodes, segments and cleans up each image of a chunk at its own size, a tile at a time.

    It is one stage, so a large image never moves between processes. The next image is decoded during the segmentation
    of the current one, see `DECODE_AHEAD_PIXELS`.
    """

    segmenter: BatchSegmenter
    reader: Reader
    cleanup: Cleanup
    tile: int
    """Pixels of a tile's side."""
    overlap: float
    """Share of a tile's side that the next tile covers, too."""
    threshold: float
    """See `ModelCard`."""
    probabilities: bool

    def __call__(self, chunk: Chunk) -> Iterator[Prediction]:
        with ThreadPoolExecutor(1) as decoding:
            encoded = self.reader.encoded(chunk)
            upcoming = decoding.submit(self._decoded, encoded)
            for _ in chunk["path"]:
                pixels, digest, decode_ms = upcoming.result()
                decode_ahead = isinstance(pixels, str) or np.prod(pixels.size_hw) <= DECODE_AHEAD_PIXELS
                if decode_ahead:
                    upcoming = decoding.submit(self._decoded, encoded)
                if isinstance(pixels, str):
                    nothing = {"decode_ms": decode_ms, "model_ms": 0, "postprocess_ms": 0}
                    yield Prediction(None, pixels, nothing, digest)
                else:
                    prediction = self._prediction(pixels, decode_ms)
                    del pixels
                    yield dataclasses.replace(prediction, checksum=digest)
                    del prediction
                if not decode_ahead:
                    upcoming = decoding.submit(self._decoded, encoded)

    def _decoded(self, encoded: Iterator[Source | str]) -> tuple[Pixels | str, str, float]:
        """Returns the next image, or the reason of its failure, the checksum of its file, and the milliseconds that
        this took."""
        started = time.perf_counter()
        data = next(encoded, "")
        if data == "":  # after the last row
            return "", "", 0
        digest = checksum(data)
        try:
            pixels: Pixels | str = self.reader.pixels(data)
        except ImageError as error:
            pixels = str(error)
        return pixels, digest, _milliseconds_since(started)

    def _prediction(self, pixels: Pixels, decode_ms: float) -> Prediction:
        started = time.perf_counter()
        raw = self.segmenter.by_tiles(pixels, self.tile, self.overlap, self.threshold, probabilities=self.probabilities)
        model_ms, started = _milliseconds_since(started), time.perf_counter()
        finite = np.isfinite(raw.confidence)
        cleaned = dataclasses.replace(raw, mask=_cleaned(raw.mask, self.cleanup)) if finite else None
        milliseconds = {"decode_ms": decode_ms, "model_ms": model_ms, "postprocess_ms": _milliseconds_since(started)}
        return Prediction(cleaned, "" if finite else NOT_FINITE, milliseconds)
