"""Measures reading, decoding and writing without a network, beside one bare process per core."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from measures.common import Apart, Job, Line, table
from unet_ray.config import Cleanup
from unet_ray.data.chunks import Chunk, Stage
from unet_ray.inference.formats import formats_of
from unet_ray.inference.ledger import Ledger
from unet_ray.inference.local import run_here
from unet_ray.inference.reader import Reader
from unet_ray.inference.segmenter import Segmentation
from unet_ray.inference.stages import Chunks, DecodeImages, MasksToSink, Preprocess, Segment, ToOwnSize
from unet_ray.inference.write import Write
from unet_ray.models.checkpoint import ModelCard
from unet_ray.models.device import keep_freed_memory
from unet_ray.own_process import claim
from unet_ray.ray_backend.data_context import configure
from unet_ray.ray_backend.inference import Pool, on_each_core, pool_of_replicas, run_on_cluster
from unet_ray.ray_backend.session import ray_session

LOCAL, APART, RAY = "--local", "through Ray, stages apart", "through Ray"
COUNT, CHUNK = 80, 64
"""Chunks, and images of each, as in a folder of 4,096 images or more."""


class NoNetwork:
    """Replaces a BatchSegmenter: it returns a disc for any image, which costs next to nothing."""

    def __init__(self, card: ModelCard) -> None:
        self.card = card
        y, x = (np.linspace(-1, 1, side, dtype=np.float16) for side in card.image_size)
        self.disc = (np.float16(0.5) - y[:, None] ** 2 - x**2)[None]

    def __call__(self, image_NHWC: np.ndarray) -> Segmentation:
        count = len(image_NHWC)
        sure, unsure = np.ones(count, np.float32), np.zeros(count, np.float32)
        return Segmentation(np.repeat(self.disc[None], count, axis=0), sure, unsure)


@dataclass(frozen=True, slots=True)
class _NoModel:
    card: ModelCard

    def __call__(self, _threads: int | None = None) -> Stage:
        return Segment(NoNetwork(self.card))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Way:
    """Builds the stages that read, decode and write, as `predict` does, over a folder that repeats."""

    card: ModelCard
    out: str
    images: list[str]

    def load(self, number: int) -> Chunk:
        rows_here = range(number * CHUNK, (number + 1) * CHUNK)
        paths = [self.images[row % len(self.images)] for row in rows_here]
        names = [f"{row:07d}" for row in rows_here]
        columns: dict[str, Any] = {
            "path": [os.fsencode(path) for path in paths],
            "name": [name.encode() for name in names],
            "output": [f"{name}.png".encode() for name in names],
            "number": [number] * CHUNK,
            "row": list(rows_here),
            "size": [0] * CHUNK,
            "mtime_ns": [0] * CHUNK,
        }
        return Chunks(columns, CHUNK)(0)

    def stages(self) -> tuple[Preprocess, _NoModel, Stage]:
        reader = Reader.of(self.card, 10**9)
        write = Write(Ledger(self.out, (), False), formats_of(("png",), self.card), self.card, reader)
        postprocess = MasksToSink(ToOwnSize(self.card, Cleanup(), False), write)
        return Preprocess(self.load, DecodeImages(reader, self.card.image_size)), _NoModel(self.card), postprocess

    def bare(self, numbers: Sequence[int]) -> None:
        """Runs all stages one after the other, in this process."""
        claim()
        keep_freed_memory()
        torch.set_num_threads(1)
        preprocess, model, postprocess = self.stages()
        segment = model()
        for number in numbers:
            postprocess(segment(preprocess(number)))


def overhead_section(job: Job) -> Iterator[Line]:
    """Runs them in turns, each alone: `--local` in a process of its own that has no Ray, as the command's."""
    cores = os.cpu_count() or 1
    bare = f"{cores} bare processes"
    seconds: dict[str, list[float]] = {}
    context = multiprocessing.get_context("spawn")
    with context.Pool(cores) as pool, Apart(_local) as local:
        pool.map(_imported, range(cores))
        for turn in range(job.rounds):
            names = (bare, LOCAL, APART, RAY)
            ways = {name: Way(job.card, str(job.folder / f"{name}{turn}"), job.images) for name in names}
            started = time.perf_counter()
            pool.map(ways[bare].bare, [range(start, COUNT, cores) for start in range(cores)], chunksize=1)
            seconds.setdefault(bare, []).append((time.perf_counter() - started) / (COUNT * CHUNK))
            seconds.setdefault(LOCAL, []).append(local(ways[LOCAL]))
            with ray_session():
                configure()
                apart = pool_of_replicas(0, "cpu")
                for name, replicas in ((APART, apart), (RAY, on_each_core(apart, COUNT))):
                    seconds.setdefault(name, []).append(_through_ray(ways[name], replicas))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    note = f"{COUNT * CHUNK} images of {_size_of(job.images[0])}, one PNG mask each"
    yield from table("overhead", medians, {RAY: note})


def _local() -> Callable[[Way], float]:
    claim()
    keep_freed_memory()
    return lambda way: _seconds_an_image(run_here(range(COUNT), *way.stages()))


def _through_ray(way: Way, pool: Pool) -> float:
    return _seconds_an_image(run_on_cluster(range(COUNT), *way.stages(), pool=pool))


def _seconds_an_image(chunks: Iterator[Chunk]) -> float:
    """Takes the middle half: processes have started, and the last chunks don't have the machine alone."""
    times = [time.perf_counter() for _ in chunks]
    begun, ended = COUNT // 4, 3 * COUNT // 4
    return (times[ended] - times[begun]) / ((ended - begun) * CHUNK)


def _imported(_number: int) -> None:
    time.sleep(0.5)  # long enough that every process of the pool gets one


def _size_of(path: str) -> str:
    with Image.open(path) as image:
        return f"{image.width}x{image.height}"
