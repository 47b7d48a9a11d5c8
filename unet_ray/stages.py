"""The stages of prediction and evaluation: plain callables, columns in, columns out, that know nothing of Ray.

A *chunk* is a dict of equally long columns, one row an image, that travels through the stages as one block. A row that
fails carries its reason in `error` from then on, and the later stages pass it by.

    number ─► before: read, decode ─► model ─► after: own size, clean-up ─► write, or compare
    number ─► before: rows only ─► model: read, decode, tiles, clean-up ─► write, or compare       (with tiles)
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unet_ray import imaging, masks, metrics, records, storage
from unet_ray.checkpoint import ModelCard
from unet_ray.config import IGNORE, Cleanup
from unet_ray.imaging import ImageError, Pixels, Source
from unet_ray.ledger import Ledger, objects, readable
from unet_ray.segmenter import BatchSegmenter, WholeImage

Chunk = dict[str, np.ndarray]
Load = Callable[[int], Chunk]
"""The rows of the chunk of that number: at least `path` (bytes) of each."""
Stage = Callable[[Chunk], Chunk]
Prediction = WholeImage | str
"""Of one image; or why there is none."""
Finish = Callable[[Chunk, Iterator[Prediction]], Chunk]
"""What is done with the masks of a chunk, which are made one at a time."""

MASKS, PROBABILITIES, OVERLAYS = "masks", "probabilities", "overlays"
OVERLAY_SIDE = 1024
"""Pixels of an overlay's longer side at most."""
DECODE_AHEAD_PIXELS = 50_000_000
"""With tiles, the next image is decoded meanwhile if neither has more pixels."""
TIMES = ("decode_ms", "model_ms", "write_ms")


@dataclass(frozen=True, slots=True)
class Reader:
    """Where an image's bytes come from and how they are decoded."""

    channels: int
    value_range: Any
    max_pixels: int

    @classmethod
    def of(cls, card: ModelCard, max_pixels: int) -> Reader:
        return cls(card.model.in_channels, card.value_range, max_pixels)

    def encoded(self, chunk: Chunk) -> Iterator[Source | str]:
        """The file of each row, or why there is none."""
        inside = "source" in chunk and any(chunk["source"])
        stored = _from_parquet(chunk) if inside else {}
        for row, path in enumerate(chunk["path"]):
            try:
                if row in stored:
                    yield stored[row]
                else:
                    yield self._file(os.fsdecode(path))
            except (ImageError, OSError, ValueError) as error:
                yield _reason(error)

    def _file(self, path: str) -> bytes:
        if not storage.is_uri(path):
            status = Path(path).stat()
            if stat.S_ISDIR(status.st_mode):
                raise ImageError("a folder that cannot be listed")
            if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
                raise ImageError("not a regular file")
            if status.st_size > 16 * self.max_pixels:
                raise ImageError(f"{status.st_size} bytes, more than --max-pixels {self.max_pixels} can be")
        return storage.read_bytes(path)

    def resized(self, data: Source | str, size_hw: tuple[int, int] | None) -> tuple[np.ndarray, tuple[int, int]]:
        """See `imaging.decode_image`. Raises ImageError."""
        if isinstance(data, str):
            raise ImageError(data)
        return imaging.decode_image(
            data, self.channels, size_hw, value_range=self.value_range, max_pixels=self.max_pixels
        )

    def pixels(self, data: Source | str) -> Pixels:
        """The image at its own size. Raises ImageError."""
        if isinstance(data, str):
            raise ImageError(data)
        return Pixels(data, self.channels, self.value_range, self.max_pixels)

    def picture(self, data: Source | str, size_hw: tuple[int, int], side: int) -> np.ndarray:
        """An image of this size to look at: uint8 [h,w,3], its longer side at most `side`. Raises ImageError."""
        picture, _ = self.resized(data, imaging.fitted(size_hw, side))
        return np.ascontiguousarray(picture[..., [0, 1, 2] if picture.shape[-1] in (3, 4) else [0, 0, 0]])

    def overlay(self, data: Source | str, mask: np.ndarray, num_classes: int) -> bytes:
        """A small picture, JPEG, with the class ids, uint8 [H,W], drawn in. Raises ImageError."""
        return masks.overlay(self.picture(data, mask.shape, OVERLAY_SIDE), mask, num_classes)


@dataclass(frozen=True, slots=True)
class GivenReader(Reader):
    """Reads the one image that it was given."""

    image: Source

    def encoded(self, chunk: Chunk) -> Iterator[Source | str]:
        yield from [self.image] * len(chunk["path"])


def _from_parquet(chunk: Chunk) -> dict[int, bytes | str]:
    """Row of the chunk -> encoded image, for rows that lie in Parquet files."""
    found: dict[int, bytes | str] = {}
    for source in sorted(set(chunk["source"]) - {b""}):
        mine = np.flatnonzero(chunk["source"] == source)
        wanted = {int(chunk["source_row"][row]): int(row) for row in mine}
        try:
            data = records.encoded_images(os.fsdecode(source), sorted(wanted))
            found |= {wanted[number]: image for number, image in data.items()}
        except (OSError, ValueError) as error:
            found |= dict.fromkeys(wanted.values(), _reason(error))
    return found


def _reason(error: Exception) -> str:
    if isinstance(error, ImageError):
        return str(error)
    return f"cannot be read: {getattr(error, 'strerror', None) or error}"


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
class Write:
    """Writes the masks in each format, then what was found of each row into the ledger.

    Returns `status` and `error` of each row, and its times. A row of the ledger is written after the row's files: what
    it names is done.
    """

    ledger: Ledger
    formats: tuple[str, ...]
    card: ModelCard
    reader: Reader

    def __call__(self, chunk: Chunk, predictions: Iterator[Prediction]) -> Chunk:
        count = len(chunk["path"])
        if not count:
            return {}
        rows: list[dict[str, Any]] = []
        milliseconds = np.zeros(count, np.float32)
        for row, prediction in enumerate(predictions):
            started = time.perf_counter()
            result = self._failed(chunk, row, prediction) if isinstance(prediction, str) else {}
            if isinstance(prediction, WholeImage):
                try:
                    result = self._written(chunk, row, prediction)
                except OSError as error:
                    # Of this name alone; a full disk, say, is everybody's trouble.
                    if error.errno not in (errno.ENAMETOOLONG, errno.EILSEQ, errno.EISDIR, errno.ENOTDIR):
                        raise
                    result = self._failed(chunk, row, f"its mask cannot be written: {error.strerror}")
            rows.append(result)
            milliseconds[row] = 1e3 * (time.perf_counter() - started)
        times = {"decode_ms": chunk["decode_ms"], "model_ms": chunk["model_ms"], "write_ms": milliseconds}
        told = ("status", "error", "height", "width", "output", "pixels", "confidence", "mask", "rle", "runs")
        results: dict[str, Any] = {name: [row.get(name) for row in rows] for name in told}
        results |= {
            "path": [storage.without_secrets(readable(path)) for path in chunk["path"]],
            "name": [readable(name) for name in chunk["name"]],
            "size": chunk["size"],
            "mtime_ns": chunk["mtime_ns"],
            "milliseconds": sum(times.values()),
        }
        self.ledger.record(int(chunk["number"][0]), chunk["row"], results)
        return {
            "number": chunk["number"],
            "status": objects(results["status"]),
            "error": objects(results["error"]),
            **times,
        }

    def _failed(self, chunk: Chunk, row: int, error: str) -> dict[str, Any]:
        if chunk["redone"][row]:  # what an earlier version of the image has left
            for location in self._files(os.fsdecode(chunk["output"][row])):
                storage.delete_file(location)
        nothing = {"height": 0, "width": 0, "output": "", "pixels": None, "confidence": 0}
        return {"status": "failed", "error": error, **nothing}

    def _files(self, output: str) -> list[str]:
        """All files that an image can have."""
        stem = output.rpartition(".")[0]
        found = [self._at(MASKS, output), self._at(OVERLAYS, f"{stem}.jpg")]
        return found + [self._at(PROBABILITIES, name) for name in self._map_names(output)]

    def _at(self, folder: str, name: str) -> str:
        return storage.join(self.ledger.out, folder, *name.split("/"))

    def _map_names(self, output: str) -> list[str]:
        classes = self.card.model.num_classes
        stem = output.rpartition(".")[0]
        return [output] if classes == 1 else [f"{stem}.{class_id}.png" for class_id in range(classes)]

    def _written(self, chunk: Chunk, row: int, whole: WholeImage) -> dict[str, Any]:
        mask, classes = whole.mask, self.card.model.num_classes
        output = os.fsdecode(chunk["output"][row])
        counted = masks.pixel_counts(mask, max(2, classes))
        result = {
            "status": "ok",
            "error": "",
            "height": mask.shape[0],
            "width": mask.shape[1],
            "output": f"{MASKS}/{readable(chunk['output'][row])}" if "png" in self.formats else "",
            "pixels": counted,
            "confidence": whole.confidence,
        }
        if {"png", "parquet"} & set(self.formats):
            result["mask"] = masks.encode_png(mask, classes)
        if "png" in self.formats:
            storage.write_bytes(self._at(MASKS, output), result["mask"])
        if {"rle", "coco"} & set(self.formats):
            # One class is the foreground alone; of several, each that occurs.
            result["rle"] = [
                {"class_id": class_id, "area": counted[class_id], **masks.coco_region(mask == class_id)}
                for class_id in range(int(classes == 1), len(counted))
                if counted[class_id]
            ]
        if "kaggle" in self.formats:
            result["runs"] = masks.row_runs(mask)
        if whole.probabilities is not None:
            for name, values in zip(self._map_names(output), whole.probabilities, strict=True):
                storage.write_bytes(self._at(PROBABILITIES, name), masks.encode_gray(values))
        if "overlay" in self.formats:
            self._write_overlay(chunk, row, mask, f"{output.rpartition('.')[0]}.jpg")
        return result

    def _write_overlay(self, chunk: Chunk, row: int, mask: np.ndarray, name: str) -> None:
        # Read again, small: at its own size the picture is nowhere else on the way.
        one = {key: values[row : row + 1] for key, values in chunk.items()}
        try:
            drawn = self.reader.overlay(next(self.reader.encoded(one)), mask, self.card.model.num_classes)
        except ImageError:  # gone or changed meanwhile: the mask is what counts
            return
        storage.write_bytes(self._at(OVERLAYS, name), drawn)


@dataclass(frozen=True, slots=True)
class Compare:
    """Masks and the true ones at `mask_path` -> `counts` int64 [N,V,K*3], `valid` pixels int64 [N] and `surface`
    float64 [N,K*3] (`metrics.surface_scores`), at the mask's own size. V: as it is, then each of `cleanups`."""

    card: ModelCard
    tolerance: float
    """Of the surface Dice, pixels."""
    cleanups: tuple[Cleanup, ...] = ()

    def __call__(self, chunk: Chunk, predictions: Iterator[Prediction]) -> Chunk:
        count, classes = len(chunk["path"]), self.card.model.num_classes
        counts = np.zeros((count, 1 + len(self.cleanups), classes * 3), np.int64)
        valid = np.zeros(count, np.int64)
        surface = np.zeros((count, classes * len(metrics.SURFACE)))
        errors = [""] * count
        for row, prediction in enumerate(predictions):
            if isinstance(prediction, str):
                errors[row] = prediction
                continue
            path = os.fsdecode(chunk["mask_path"][row])
            size = prediction.mask.shape
            try:
                truth, own_size = imaging.decode_mask(storage.read_bytes(path), self.card.data, None)
            except (ImageError, OSError) as error:
                errors[row] = f"mask {path}: {error}"
                continue
            if own_size != size:
                errors[row] = f"mask {path}: {own_size[1]}x{own_size[0]} pixels, the image {size[1]}x{size[0]}"
                continue
            versions = [prediction.mask, *(masks.clean(prediction.mask, cleanup) for cleanup in self.cleanups)]
            for number, predicted in enumerate(versions):
                pair = torch.from_numpy(predicted)[None], torch.from_numpy(truth)[None]
                counts[row, number] = metrics.count(*pair, classes).numpy().reshape(-1)
            valid[row] = (truth != IGNORE).sum()
            surface[row] = metrics.surface_scores(prediction.mask, truth, classes, self.tolerance).reshape(-1)
        return {
            "path": chunk["path"],
            "error": objects(errors),
            "counts": counts,
            "valid": valid,
            "surface": surface,
        }


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
class Before:
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
