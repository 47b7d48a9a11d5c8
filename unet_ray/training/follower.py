"""Follows a training on other machines: the driver reads the run directory."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from unet_ray.config import UserError, first_line
from unet_ray.training.progress import EpochProgress, OnStep, read_progress
from unet_ray.training.results import epochs_done, read_metrics

log = logging.getLogger("unet_ray")

OnEpoch = Callable[[dict[str, Any]], None]
"""Gets a line of metrics.jsonl."""
SILENT_SECONDS = 30.0
"""A run directory that can't be read for so long is worth a line."""


class Follower:
    """Calls `on_epoch` once for each epoch that is finished from now on, and `on_step` for the steps between.

    `check` is called at each look, and may raise an error that ends the training.
    """

    def __init__(self, out: str, on_epoch: OnEpoch, on_step: OnStep, check: Callable[[], None] = lambda: None) -> None:
        self.out, self.on_epoch, self.on_step, self.check = out, on_epoch, on_step, check
        self.last_epoch = epochs_done(out)
        self.progress: EpochProgress | None = None
        self.unread_since: float | None = None
        """When the run directory could not be read for the first time since it was; infinity once that is said."""

    def look(self) -> None:
        """Reads the run directory and reports what is new. If it can't be read, the next look does that: the workers
        train on, and only their end ends the training."""
        self.check()
        try:
            progress, lines = read_progress(self.out), read_metrics(self.out)
        except (OSError, UserError, ValueError) as error:
            self._not_read(error)
            return
        self.unread_since = None
        if progress is not None and progress != self.progress and progress.epoch > self.last_epoch:
            self.progress = progress
            self.on_step(progress)
        for line in lines:
            if line["epoch"] > self.last_epoch:
                self.last_epoch = line["epoch"]
                self.on_epoch(line)

    def _not_read(self, error: Exception) -> None:
        now = time.monotonic()
        if self.unread_since is None:
            self.unread_since = now
        if now - self.unread_since > SILENT_SECONDS:
            self.unread_since = float("inf")
            log.warning("%s can't be read (%s): the workers train on, their epochs follow", self.out, first_line(error))
