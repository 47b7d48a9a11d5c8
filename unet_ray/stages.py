"""The stages of prediction and evaluation: plain callables, columns in, columns out, that know nothing of Ray.

A *chunk* is a dict of equally long columns, one row an image, that travels through the stages as one block. A row that
fails carries its reason in `error` from then on, and the later stages pass it by.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from unet_ray import imaging, masks, metrics, storage
from unet_ray.checkpoint import ModelCard
from unet_ray.config import IGNORE
from unet_ray.imaging import ImageError
from unet_ray.segmenter import Segmenter

Chunk = dict[str, np.ndarray]
Stage = Callable[[Chunk], Chunk]

MANIFEST_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("status", pa.string()),
        ("error", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("output", pa.string()),
        ("pixels", pa.list_(pa.int64())),
        ("confidence", pa.float32()),
        ("milliseconds", pa.float32()),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
    ]
)
MASKS_SCHEMA = pa.schema([("path", pa.string()), ("height", pa.int32()), ("width", pa.int32()), ("mask", pa.binary())])
PARTS, MIN_ROWS, MAX_ROWS, MAX_BYTES = 1024, 8, 64, 64 * 2**20
"""How prediction is cut into chunks: about `PARTS` of them. `MAX_BYTES` stays below the 128 MiB at which Ray Data
splits a block in two."""

PART = "part-{:06d}.parquet"
PARQUET_MANIFEST, PARQUET_MASKS, PNG_MASKS = "manifest.parquet", "masks.parquet", "masks"


def objects(values: Sequence[Any]) -> np.ndarray:
    """A column of Python objects (NumPy would make a matrix of equally long lists)."""
    column = np.empty(len(values), dtype=object)
    column[:] = values
    return column


@dataclass(frozen=True, slots=True)
class Decode:
    """`path` -> `image` uint8 [N,H,W,C] at the model's size (zeros where it failed), `height`, `width`, `error`."""

    channels: int
    size_hw: tuple[int, int]

    def __call__(self, chunk: Chunk) -> Chunk:
        count = len(chunk["path"])
        image = np.zeros((count, *self.size_hw, self.channels), np.uint8)
        own_size = np.zeros((count, 2), np.int32)
        errors, milliseconds = [], np.zeros(count, np.float32)
        for row, path in enumerate(chunk["path"]):
            started = time.perf_counter()
            try:
                image[row], own_size[row] = imaging.decode_image(
                    storage.read_bytes(str(path)), self.channels, self.size_hw
                )
                errors.append("")
            except ImageError as error:
                errors.append(str(error))
            except OSError as error:
                errors.append(f"cannot be read: {error.strerror or error}")
            milliseconds[row] = 1e3 * (time.perf_counter() - started)
        return {
            **chunk,
            "image": image,
            "height": own_size[:, 0],
            "width": own_size[:, 1],
            "error": objects(errors),
            "milliseconds": milliseconds,
        }


class Segment:
    """`image` -> `logits` float16 [N,K,H,W], `confidence` float32 [N]. Loads the model when it is built."""

    def __init__(self, model: str, precision: str, *, device: str, threads: int | None = None) -> None:
        self.segmenter = Segmenter(model, device=device, precision=precision, threads=threads)

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
        milliseconds = chunk["milliseconds"] + np.where(chunk["error"] == "", each, 0).astype(np.float32)
        return {**chunk, "logits": logits, "confidence": confidence, "milliseconds": milliseconds}


@dataclass(frozen=True, slots=True)
class Write:
    """`logits` -> mask files at each image's own size; returns the rows of the manifest and writes them last.

    A part of the manifest holds whole chunks only and appears after their masks: what it names is done.
    """

    out: str
    formats: tuple[str, ...]
    card: ModelCard

    def __call__(self, chunk: Chunk) -> Chunk:
        count = len(chunk["path"])
        status, outputs, pixels, encoded = [], [], [], []
        errors, milliseconds = list(chunk["error"]), chunk["milliseconds"].copy()
        for row in range(count):
            started = time.perf_counter()
            output, counted, png = "", None, None
            if not errors[row]:
                size = (int(chunk["height"][row]), int(chunk["width"][row]))
                mask = imaging.to_own_size(chunk["logits"][row], size, self.card.threshold)
                counted = np.bincount(mask.ravel(), minlength=max(2, self.card.model.num_classes)).tolist()
                png = masks.encode_png(mask, self.card.model.num_classes)
                if "png" in self.formats:
                    output = str(chunk["output"][row])
                    storage.write_bytes(storage.join(self.out, *output.split("/")), png)
            status.append("failed" if errors[row] else "ok")
            outputs.append(output)
            pixels.append(counted)
            encoded.append(png)
            milliseconds[row] += 1e3 * (time.perf_counter() - started)
        good = [row for row in range(count) if not errors[row]]
        assert count == chunk["rows"][0], "Ray split a chunk: a part would lose rows"
        part = PART.format(int(chunk["chunk"][0]))
        if "parquet" in self.formats:
            table = pa.table(
                {
                    "path": [str(chunk["path"][row]) for row in good],
                    "height": chunk["height"][good],
                    "width": chunk["width"][good],
                    "mask": [encoded[row] for row in good],
                },
                MASKS_SCHEMA,
            )
            # Masks are PNG already: compressing them again costs time and saves nothing.
            storage.write_bytes(storage.join(self.out, PARQUET_MASKS, part), to_parquet(table, compression="none"))
        manifest = pa.table(
            {
                "path": [str(path) for path in chunk["path"]],
                "status": status,
                "error": errors,
                "height": chunk["height"],
                "width": chunk["width"],
                "output": outputs,
                "pixels": pixels,
                "confidence": chunk["confidence"],
                "milliseconds": milliseconds,
                "size": chunk["size"],
                "mtime_ns": chunk["mtime_ns"],
            },
            MANIFEST_SCHEMA,
        )
        storage.write_bytes(storage.join(self.out, PARQUET_MANIFEST, part), to_parquet(manifest))
        return {"path": chunk["path"], "status": objects(status), "error": objects(errors)}


@dataclass(frozen=True, slots=True)
class Compare:
    """`logits` and the true mask at `mask_path` -> `counts` int64 [N,K*3], `valid` pixels int64 [N] and `surface`
    float64 [N,K*3] (`metrics.surface_scores`), at the mask's own size."""

    card: ModelCard
    tolerance: float
    """Of the surface Dice, pixels."""

    def __call__(self, chunk: Chunk) -> Chunk:
        count, classes = len(chunk["path"]), self.card.model.num_classes
        counts, valid = np.zeros((count, classes * 3), np.int64), np.zeros(count, np.int64)
        surface = np.zeros((count, classes * len(metrics.SURFACE)))
        errors = list(chunk["error"])
        for row, path in enumerate(chunk["mask_path"]):
            if errors[row]:
                continue
            size = (int(chunk["height"][row]), int(chunk["width"][row]))
            try:
                truth, own_size = imaging.decode_mask(storage.read_bytes(str(path)), self.card.data, None)
            except (ImageError, OSError) as error:
                errors[row] = f"mask {path}: {error}"
                continue
            if own_size != size:
                errors[row] = f"mask {path}: {own_size[1]}x{own_size[0]} pixels, the image {size[1]}x{size[0]}"
                continue
            predicted = imaging.to_own_size(chunk["logits"][row], size, self.card.threshold)
            pair = torch.from_numpy(predicted)[None], torch.from_numpy(truth)[None]
            counts[row] = metrics.count(*pair, classes).numpy().reshape(-1)
            valid[row] = (truth != IGNORE).sum()
            surface[row] = metrics.surface_scores(predicted, truth, classes, self.tolerance).reshape(-1)
        return {
            "path": chunk["path"],
            "error": objects(errors),
            "counts": counts,
            "valid": valid,
            "surface": surface,
        }


def chunked(columns: dict[str, Sequence[Any]], row_bytes: int) -> list[Chunk]:
    """Cuts columns into chunks, numbered by the columns `chunk` and `rows` (how many rows the chunk has).

    The cut depends on the number of rows and on `row_bytes`, the largest a row gets on its way, and on nothing else:
    every machine and every repetition makes the same parts.
    """
    count = len(next(iter(columns.values())))
    size = min(max(count // PARTS, MIN_ROWS), MAX_ROWS, max(1, MAX_BYTES // row_bytes))
    chunks = []
    for number, start in enumerate(range(0, count, size)):
        chunk = {name: np.asarray(values[start : start + size]) for name, values in columns.items()}
        rows = min(size, count - start)
        chunks.append({**chunk, "chunk": np.full(rows, number), "rows": np.full(rows, rows)})
    return chunks


def to_parquet(table: pa.Table, compression: str = "zstd") -> bytes:
    stream = io.BytesIO()
    pq.write_table(table, stream, compression=compression)
    return stream.getvalue()


def run_here(chunks: Sequence[Chunk], before: Stage, model: Callable[[], Stage], after: Stage) -> Iterator[Chunk]:
    """The stages in this process: the model on this thread, decoding one chunk ahead and writing one behind on others.

    Yields what `after` returns, in the order of `chunks`.
    """
    segment = model()
    with ThreadPoolExecutor(1) as decoding, ThreadPoolExecutor(1) as writing:
        upcoming = [decoding.submit(before, chunk) for chunk in chunks[:1]]
        written = None
        try:
            for number in range(len(chunks)):
                decoded = upcoming.pop().result()
                upcoming = [decoding.submit(before, chunk) for chunk in chunks[number + 1 : number + 2]]
                segmented = segment(decoded)
                if written is not None:
                    yield written.result()
                written = writing.submit(after, segmented)
            if written is not None:
                yield written.result()
        finally:
            decoding.shutdown(wait=False, cancel_futures=True)
