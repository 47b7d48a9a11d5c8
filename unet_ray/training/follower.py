"""Follows a training on other machines: the driver reads the run directory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from unet_ray.training.progress import EpochProgress, OnStep, read_progress
from unet_ray.training.results import epochs_done, read_metrics

OnEpoch = Callable[[dict[str, Any]], None]
"""Gets a line of metrics.jsonl."""


class Follower:
    """Calls `on_epoch` once for each epoch that is finished from now on, and `on_step` for the steps between.

    `check` is called at each look, and may raise an error that ends the training.
    """

    def __init__(self, out: str, on_epoch: OnEpoch, on_step: OnStep, check: Callable[[], None] = lambda: None) -> None:
        self.out, self.on_epoch, self.on_step, self.check = out, on_epoch, on_step, check
        self.last_epoch = epochs_done(out)
        self.progress: EpochProgress | None = None

    def look(self) -> None:
        """Reads the run directory and reports what is new."""
        self.check()
        progress = read_progress(self.out)
        if progress is not None and progress != self.progress and progress.epoch > self.last_epoch:
            self.progress = progress
            self.on_step(progress)
        for line in read_metrics(self.out):
            if line["epoch"] > self.last_epoch:
                self.last_epoch = line["epoch"]
                self.on_epoch(line)
