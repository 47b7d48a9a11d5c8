"""The stages of prediction and evaluation: callables on columns that know nothing of Ray.

A *chunk* is a dict of equally long columns, one row per image, that travels through the stages as one block. A row that
fails carries its reason in `error`, and the later stages skip it.

    whole images   number ─► preprocess: read, decode ─► model ─► postprocess: own size, clean-up, write or compare
    tiles          number ─► preprocess: rows ─► model: read, decode, tiles, clean-up, write or compare ─► nothing
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from unet_ray.config import Cleanup
from unet_ray.data import imaging, masks
from unet_ray.data.chunks import Chunk, objects
from unet_ray.data.imaging import ImageError, Pixels, Source
from unet_ray.inference.reader import Reader
from unet_ray.inference.segmenter import BatchSegmenter, WholeImage
from unet_ray.models.checkpoint import ModelCard

TIMES = ("decode_ms", "model_ms", "postprocess_ms", "write_ms")
"""Milliseconds that each stage took for an image."""
DECODE_AHEAD_PIXELS = 50_000_000
"""With tiles, the next image is decoded meanwhile if neither has more pixels."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """The mask of one image at its own size, or the reason why there is none."""

    image: WholeImage | None
    error: str
    """Empty if there is a mask."""
    milliseconds: dict[str, float]
    """Of `TIMES`, those of the stages so far."""


Load = Callable[[int], Chunk]
"""Returns the rows of the chunk of that number: at least `path` (bytes) of each."""
Predict = Callable[[Chunk], Iterator[Prediction]]
"""Makes the masks of a chunk at their own size, one at a time: a chunk of large ones would not fit in memory."""
Finish = Callable[[Chunk, Iterator[Prediction]], Chunk]
"""Uses the masks of a chunk, one at a time: writes or compares them."""


# --- every pipeline ---


@dataclass(frozen=True, slots=True)
class Preprocess:
    """Returns the rows of the chunk of a number, decoded."""

    load: Load
    decode: Decode

    def __call__(self, number: int) -> Chunk:
        chunk = self.load(number)
        return self.decode(chunk) if len(chunk["path"]) else chunk


@dataclass(frozen=True, slots=True)
class Finishing:
    """Makes the masks of a chunk and hands each to `finish` before the next is made."""

    predict: Predict
    finish: Finish

    def __call__(self, chunk: Chunk) -> Chunk:
        return self.finish(chunk, self.predict(chunk))


def unchanged(chunk: Chunk) -> Chunk:
    """Returns the chunk: the stage after the last one that has work."""
    return chunk


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


def _cleaned(mask: np.ndarray, cleanup: Cleanup) -> np.ndarray:
    return mask if cleanup == Cleanup() else masks.clean(mask, cleanup)


def _milliseconds_since(started: float) -> float:
    return 1e3 * (time.perf_counter() - started)


# --- whole images ---


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
    """Replaces `image` by `logits` float16 [N,K,H,W] and `confidence` float32 [N]."""

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
        each = _milliseconds_since(started) / max(1, len(good))
        milliseconds = np.where(chunk["error"] == "", each, 0).astype(np.float32)
        return {**chunk, "logits": logits, "confidence": confidence, "model_ms": milliseconds}


@dataclass(frozen=True, slots=True)
class ToOwnSize:
    """Makes masks at each image's own size from `logits`, and cleans them up."""

    card: ModelCard
    cleanup: Cleanup
    probabilities: bool

    def __call__(self, chunk: Chunk) -> Iterator[Prediction]:
        for row, error in enumerate(chunk["error"]):
            started = time.perf_counter()
            image = None if error else self._image(chunk, row)
            milliseconds = {name: float(chunk[name][row]) for name in ("decode_ms", "model_ms")}
            milliseconds["postprocess_ms"] = _milliseconds_since(started)
            yield Prediction(image, str(error), milliseconds)

    def _image(self, chunk: Chunk, row: int) -> WholeImage:
        logits = chunk["logits"][row]
        size_hw = (int(chunk["height"][row]), int(chunk["width"][row]))
        mask = imaging.to_own_size(logits, size_hw, self.card.threshold)
        maps = imaging.probabilities(logits, size_hw) if self.probabilities else None
        return WholeImage(_cleaned(mask, self.cleanup), float(chunk["confidence"][row]), maps)


# --- tiles ---


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentByTiles:
    """Reads, decodes, segments and cleans up each image of a chunk at its own size, a tile at a time.

    It is one stage so that an image of any size never leaves the process. The next image of ordinary size is read and
    decoded meanwhile.
    """

    segmenter: BatchSegmenter
    reader: Reader
    cleanup: Cleanup
    tile: int
    """Pixels of a tile's side."""
    overlap: float
    """Share of a tile's side that it has in common with the next."""
    probabilities: bool

    def __call__(self, chunk: Chunk) -> Iterator[Prediction]:
        with ThreadPoolExecutor(1) as decoding:
            encoded = self.reader.encoded(chunk)
            upcoming = decoding.submit(self._decoded, encoded)
            for _ in chunk["path"]:
                pixels, decode_ms = upcoming.result()
                small = isinstance(pixels, str) or np.prod(pixels.size_hw) <= DECODE_AHEAD_PIXELS
                if small:
                    upcoming = decoding.submit(self._decoded, encoded)
                if isinstance(pixels, str):
                    yield Prediction(None, pixels, {"decode_ms": decode_ms, "model_ms": 0, "postprocess_ms": 0})
                else:
                    prediction = self._prediction(pixels, decode_ms)
                    del pixels
                    yield prediction
                    del prediction
                if not small:
                    upcoming = decoding.submit(self._decoded, encoded)

    def _decoded(self, encoded: Iterator[Source | str]) -> tuple[Pixels | str, float]:
        """Returns the next image, or why there is none, and the milliseconds it took."""
        started = time.perf_counter()
        data = next(encoded, "")
        if data == "":  # beyond the last row
            return "", 0
        try:
            pixels: Pixels | str = self.reader.pixels(data)
        except ImageError as error:
            pixels = str(error)
        return pixels, _milliseconds_since(started)

    def _prediction(self, pixels: Pixels, decode_ms: float) -> Prediction:
        started = time.perf_counter()
        whole = self.segmenter.by_tiles(pixels, self.tile, self.overlap, probabilities=self.probabilities)
        model_ms, started = _milliseconds_since(started), time.perf_counter()
        image = WholeImage(_cleaned(whole.mask, self.cleanup), whole.confidence, whole.probabilities)
        milliseconds = {"decode_ms": decode_ms, "model_ms": model_ms, "postprocess_ms": _milliseconds_since(started)}
        return Prediction(image, "", milliseconds)
