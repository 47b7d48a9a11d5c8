"""Measures how many images a second one command can hand out: the real ledger, driver and Ray Data, with replicas that
sleep for as long as a network would take."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import psutil

from measures.common import Job, Line
from unet_ray.config import MaskOptions
from unet_ray.data.chunks import Chunk, Stage, objects
from unet_ray.data.inputs import ImageFile
from unet_ray.inference.formats.base import OutputFormat
from unet_ray.inference.ledger import Ledger
from unet_ray.inference.predict import _Run
from unet_ray.inference.resolve import pipeline_of
from unet_ray.inference.stages import TIMES, Load
from unet_ray.inference.survey import survey
from unet_ray.ray_backend.data_context import configure
from unet_ray.ray_backend.inference import Pool, run_on_cluster
from unet_ray.ray_backend.session import ray_session

RATE = 140.0
"""Images per second of a replica: what cluster/README.md says of an L4."""
REPLICAS = (1, 8, 64, 1000)
PROCESSES = 12
"""The most processes. Each is as fast as several replicas, since a thousand would not fit into one machine's memory."""
TASK_CPUS = 0.1
"""So many tasks run at once here as do on a cluster whose nodes have CPUs for them."""
SECONDS = 20
MOST = 60_000
"""Images of the longest run."""


def scale_section(job: Job) -> Iterator[Line]:
    with ray_session():
        configure()
        for replicas in REPLICAS:
            yield _handed_out(job, replicas)


def _handed_out(job: Job, replicas: int) -> Line:
    out = job.folder / f"scale{replicas}"
    out.mkdir()
    ledger = Ledger(str(out), ())
    images = min(MOST, int(replicas * RATE * SECONDS))
    started = time.perf_counter()
    cost = pipeline_of(job.model, MaskOptions()).row_cost()
    survey(ledger, _names(images), lambda image: iter([f"{image.key}.png"]), cost, lambda _count: None, None)
    listing = time.perf_counter() - started
    seen: list[tuple[float, int]] = []
    run = _Run(ledger, lambda done, _failed, _all: seen.append((time.perf_counter(), done)), allow_mixed=False)
    process = psutil.Process()
    before, memory = process.cpu_times(), process.memory_info().rss
    run.segment(_Sleeping(replicas), _Recorded(ledger), None, _NoLock())  # type: ignore[arg-type]
    after = process.cpu_times()
    times = [(at, done) for at, done in seen if done]
    (begun, first), (ended, last) = times[len(times) // 4], times[-len(times) // 8 - 1]
    rate = (last - first) / (ended - begun)
    cpu = (after.user + after.system - before.user - before.system) / images * 1000
    note = (
        f"{rate:,.0f} images/s of {replicas * RATE:,.0f} that the replicas could take; driver {cpu:.2f} s of CPU a "
        f"thousand images and {(process.memory_info().rss - memory) / 2**20:.0f} MB; listing {images / listing:,.0f}/s"
    )
    return Line("scale", f"{replicas} replicas", 1 / rate, rate / (replicas * RATE), note)


def _names(images: int) -> Iterator[ImageFile]:
    for number in range(images):
        name = f"{number:09d}"
        yield ImageFile(name, f"/photos/{name}.jpg", f"{name}.jpg", 1, 1)


@dataclass(frozen=True, slots=True)
class _Sleeping:
    """Takes the place of a pipeline: images are not read, and the network sleeps."""

    replicas: int

    def run(self, numbers: Sequence[int], load: Load, sink: Any, **_more: Any) -> Generator[Chunk, None, None]:
        processes = min(PROCESSES, self.replicas)
        pool = Pool(processes, "cpu", 1, {"CPU": 0.0}, {"num_cpus": 0.0}, TASK_CPUS, grows=False)
        network = partial(_network, RATE * self.replicas / processes)
        yield from run_on_cluster(numbers, load, network, sink, pool=pool)


def _network(rate: float, _threads: int | None) -> Stage:
    def sleep(chunk: Chunk) -> Chunk:
        time.sleep(len(chunk["path"]) / rate)
        return chunk

    return sleep


@dataclass(frozen=True, slots=True)
class _Recorded:
    """Takes the place of `write.Write`: records rows as done, without files."""

    ledger: Ledger
    formats: tuple[OutputFormat, ...] = ()

    def __call__(self, chunk: Chunk) -> Chunk:
        rows = len(chunk["path"])
        nothing: dict[str, Any] = {name: [None] * rows for name in self.ledger.result_columns()}
        sizes = {name: chunk[name] for name in ("size", "mtime_ns")}
        results = {**nothing, **sizes, "path": [path.decode() for path in chunk["path"]], "status": ["ok"] * rows}
        self.ledger.record(int(chunk["number"][0]), chunk["row"], results)
        times = {name: np.zeros(rows, np.float32) for name in TIMES}
        return {"number": chunk["number"], "status": objects(results["status"]), "error": objects([""] * rows), **times}


class _NoLock:
    def check(self) -> None:
        pass
