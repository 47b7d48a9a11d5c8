"""Reports the progress of an epoch every few seconds: in this process, or through a file in the run directory."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from unet_ray.data import storage

SECONDS_BETWEEN = 2.0
RAY_FOLDER = ".ray"
"""Folder in a run directory during a training on Ray: Ray Train's bookkeeping, the workers' errors and progress."""
PROGRESS = "progress.json"


@dataclass(frozen=True, slots=True)
class EpochProgress:
    """The progress of an epoch."""

    epoch: int
    step: int
    """Steps done."""
    steps: int
    loss: float
    """Mean loss of the epoch's steps so far, over this rank's images."""
    images_per_second: float
    """Speed of all ranks together."""


OnStep = Callable[[EpochProgress], None]


class ProgressTimer:
    """Reports the progress of an epoch only every `SECONDS_BETWEEN`: a GPU must wait while the loss is read."""

    def __init__(self, on_step: OnStep | None, epoch: int, *, steps: int, images: int) -> None:
        self.on_step, self.epoch, self.steps, self.images = on_step, epoch, steps, images
        self.started = self.last = time.perf_counter()

    def __call__(self, step: int, total_loss: Tensor) -> None:
        """`step`: steps done; `total_loss`: the sum of their losses."""
        now = time.perf_counter()
        if self.on_step is not None and now - self.last >= SECONDS_BETWEEN:
            self.last = now
            speed = self.images * step / self.steps / (now - self.started)
            self.on_step(EpochProgress(self.epoch, step, self.steps, float(total_loss) / step, speed))


def _file(out: str) -> str:
    return storage.join(out, RAY_FOLDER, PROGRESS)


def read_progress(out: str) -> EpochProgress | None:
    """Returns the progress that a worker wrote last into the run directory; None if it has written nothing."""
    try:
        return EpochProgress(**json.loads(storage.read_bytes(_file(out))))
    except OSError:
        return None


@contextmanager
def progress_writer(out: str) -> Iterator[OnStep]:
    """Yields a callback that writes progress into the run directory, for `read_progress` on another machine."""
    writing: Future[None] | None = None

    def write(progress: EpochProgress) -> None:
        nonlocal writing
        # A thread writes, so that training never waits for a bucket. While it still writes, new progress is skipped.
        if writing is None or writing.done():
            text = json.dumps(dataclasses.asdict(progress))
            writing = thread.submit(storage.write_bytes, _file(out), text.encode())

    with ThreadPoolExecutor(1) as thread:
        yield write
