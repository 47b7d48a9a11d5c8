"""Measures how many images a second one command can hand out: the real ledger, driver and Ray Data, with replicas that
sleep for as long as a network would take."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import psutil

from measures import plots
from measures.common import Job, Line
from measures.predict import Reports, steady
from unet_ray.config import MaskOptions
from unet_ray.data.chunks import Chunk, Stage, objects
from unet_ray.data.inputs import ImageFile
from unet_ray.data.progress import OnProgress
from unet_ray.inference.chunk_size import RowCost, chunks_per_block
from unet_ray.inference.formats.base import OutputFormat
from unet_ray.inference.ledger import Ledger
from unet_ray.inference.predict import _Run
from unet_ray.inference.resolve import pipeline_of
from unet_ray.inference.rounds import rounds
from unet_ray.inference.stages import TIMES, Load
from unet_ray.inference.survey import Survey
from unet_ray.ray_backend.data_context import configure
from unet_ray.ray_backend.inference import Pool, run_on_cluster
from unet_ray.ray_backend.session import Runtime, ray_session

RATE = 140.0
"""Images per second of a replica: what cluster/README.md says of an L4."""
REPLICAS = (1, 8, 64, 1000)
PROCESSES = 8
"""The most processes. Each is as fast as several replicas, since a thousand would not fit into one machine's memory."""
TASK_CPUS = 0.25
"""Four tasks run at once for each CPU: they wait for the disk more than they compute."""
SECONDS = 40
MOST = 500_000
"""Images of the longest run."""
LONG = 10**9
"""Chunks of a prediction that is long enough for so many replicas: blocks are as large as in one."""
BEGIN = 0.5
"""The rate is that after this share of the images, when all processes have started."""


def scale_section(job: Job) -> Iterator[Line]:
    rates, driver = [], []
    with ray_session():
        configure()
        for replicas in REPLICAS:
            line, cpu = _handed_out(job, replicas)
            rates.append(1 / (line.seconds or np.inf))
            driver.append(cpu)
            yield line
    if job.plots:
        plots.scale(job.plots / "scale.png", REPLICAS, rates, driver, RATE)


def _handed_out(job: Job, replicas: int) -> tuple[Line, float]:
    """Returns a line, and the driver's seconds of CPU for a thousand images, without the listing."""
    images = min(MOST, int(replicas * RATE * SECONDS))
    process = psutil.Process()
    reports: Reports = []
    used: list[float] = []
    memory: list[int] = []

    def tell(done: int, _failed: int, total: int) -> None:
        if total:
            reports.append((time.perf_counter(), done))
            used.append(sum(process.cpu_times()[:2]))
            memory.append(process.memory_info().rss)

    started = time.perf_counter()
    hand_out(str(job.folder / f"scale{replicas}"), job.model, images, replicas, tell)
    listing = reports[0][0] - started
    reports = [report for report in reports if report[1]]
    seconds = steady(reports, BEGIN)
    cpu = (used[-1] - used[0]) / images * 1000
    note = (
        f"{1 / seconds:,.0f} images/s of {replicas * RATE:,.0f} that the replicas could take; driver {cpu:.3f} s of "
        f"CPU a thousand images and {(memory[-1] - memory[0]) / 2**20:.0f} MB; listing {images / listing:,.0f}/s"
    )
    return Line("scale", f"{replicas} replicas", seconds, 1 / seconds / (replicas * RATE), note), cpu


def hand_out(
    out: str, model: str, images: int, replicas: int, on_progress: OnProgress, *, while_listing: bool = False
) -> None:
    """Lists so many names, hands them out to replicas that sleep, and records them as done; goes on if it was stopped.
    Ray must be started. `on_progress` gets 0 as the number of all images until it hands out the first.
    `while_listing`: as `predict` does; else the listing ends first."""
    ledger = Ledger(out, ())
    cost = pipeline_of(model, MaskOptions()).row_cost()
    survey = Survey(ledger, cost)
    run = _Run(ledger, survey, on_progress, allow_mixed=False)
    proposals = lambda image: iter([f"{image.key}.png"])  # noqa: E731
    listing = rounds(survey, _names(images), proposals, at_once=while_listing, on_listed=run.tell)
    with closing(listing):
        for shards in listing:
            run.take(shards)
            run.segment(_Sleeping(replicas, cost), _Recorded(ledger), Runtime(), _NoLock())  # type: ignore[arg-type]


def _names(images: int) -> Iterator[ImageFile]:
    for number in range(images):
        name = f"{number:09d}"
        yield ImageFile(name, f"/photos/{name}.jpg", f"{name}.jpg", 1, 1)


@dataclass(frozen=True, slots=True)
class _Sleeping:
    """Takes the place of a pipeline: images are not read, and the network sleeps."""

    replicas: int
    cost: RowCost

    def run(self, numbers: Sequence[int], load: Load, sink: Any, **_more: Any) -> Generator[Chunk, None, None]:
        if not numbers:
            return
        processes = min(PROCESSES, self.replicas)
        pool = Pool(processes, "cpu", 1, {"CPU": 0.0}, {"num_cpus": 0.0}, TASK_CPUS, grows=False)
        network = partial(_network, RATE * self.replicas / processes)
        each = chunks_per_block(LONG, self.cost, self.replicas, "cuda")
        yield from run_on_cluster(numbers, load, network, sink, pool=pool, each=each)


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
