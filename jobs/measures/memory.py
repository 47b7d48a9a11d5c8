"""Measures peak resident memory, and images per second, of a short and a long folder."""

from __future__ import annotations

import dataclasses
import os
import statistics
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
from PIL import Image

from measures.common import Job, Line, random_model
from measures.predict import reports_of, steady
from unet_ray.config import PredictConfig
from unet_ray.inference.predict import predict
from unet_ray.ray_backend.session import ray_session

MANY = 10_000


class PeakMemory:
    """Measures the peak resident memory, without shared memory, of this process and of its descendants, ten times per
    second."""

    def __init__(self) -> None:
        self.before = _own(psutil.Process())
        self.mine = self.theirs = 0
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self.thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.done.set()
        self.thread.join()

    def _watch(self) -> None:
        this = psutil.Process()
        while not self.done.wait(0.1):
            self.mine = max(self.mine, _own(this))
            self.theirs = max(self.theirs, sum(map(_own, this.children(recursive=True))))


def _own(process: psutil.Process) -> int:
    try:
        memory = process.memory_info()
    except psutil.Error:  # the process has ended meanwhile
        return 0
    return memory.rss - getattr(memory, "shared", 0)


def _many_images(job: Job) -> Job:
    """Returns the job with `MANY` images of 512x512 pixels: copies of the first 64, as hard links."""
    folder = job.folder / "many"
    folder.mkdir()
    sources = []
    for path in job.images[:64]:
        with Image.open(path) as image:
            target = job.folder / f"{Path(path).stem}.jpg"
            image.convert("RGB").resize((512, 512)).save(target)
            sources.append(target)
    names = [folder / f"{number:05d}.jpg" for number in range(MANY)]
    for number, name in enumerate(names):
        os.link(sources[number % len(sources)], name)
    return dataclasses.replace(job, images=[str(name) for name in names])


def memory_section(job: Job) -> Iterator[Line]:
    """Predicts few images before and after many, because machines slow down and recover.

    With this network ten thousand images take minutes. A smaller one would not do: most of the few images would be
    decoded while the model loads, which is not measured.
    """
    model = random_model(job.folder / "half", ("model.base_channels", 32), ("data.image_size", 192))
    many = _many_images(job)
    seconds: dict[int, list[float]] = {500: [], MANY: []}
    halves: list[float] = []
    notes: dict[int, str] = {}
    lists = {count: many.listed(count) for count in seconds}
    for turn in range(job.rounds):
        for number, (count, times) in enumerate(((500, 2), (MANY, 1), (500, 2))):
            with ray_session(), PeakMemory() as peak:
                for run in range(times):
                    out = str(job.folder / f"predicted-{turn}-{number}-{run}")
                    todo = PredictConfig(model=model, inputs=(lists[count],), out=out, device=job.device)
                    reports = reports_of(lambda tell, todo=todo: predict(todo, on_progress=tell))  # type: ignore[misc]
                    seconds[count].append(steady(reports))
            if count == MANY:
                halves.append(steady(reports, 0, 0.5) / steady(reports, 0.5, 1))
            more = (peak.mine - peak.before) / 2**20
            others = f"all other processes {peak.theirs / 2**20:.0f} MB"
            notes.setdefault(count, f"driver {more:.0f} MB more than before, {others}")
    notes[MANY] += f", the second half at {statistics.median(halves):.2f} times the speed of the first"
    rates = {count: statistics.median(of_each) for count, of_each in seconds.items()}
    for count, rate in rates.items():
        yield Line("memory", f"{count} images", rate, rates[500] / rate, notes[count])
