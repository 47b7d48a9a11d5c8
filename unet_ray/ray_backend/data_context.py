"""Sets Ray Data's options."""

from __future__ import annotations

import logging

from ray.data import DataContext

from unet_ray.ray_backend import internals


def configure(verbose: bool = False) -> None:
    """Sets Ray Data's options in this process. A Dataset keeps the options that it was created with, so call this
    first."""
    internals.look_for_finished_tasks_often()
    DataContext.get_current().enable_progress_bars = verbose
    if not verbose:
        for name in ("ray.data", "ray.train"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
