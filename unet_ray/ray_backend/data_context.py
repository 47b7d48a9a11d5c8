"""Sets Ray Data's options."""

from __future__ import annotations

import logging

from ray.data import DataContext

from unet_ray.ray_backend import internals

MOST_INIT_DEATHS = 100
"""Deaths in a row of replicas that load, on all nodes together, after which Ray ends the run: in case that the roll is
lost."""


def configure(verbose: bool = False) -> None:
    """Sets Ray Data's options in this process. A Dataset keeps the options that it was created with, so call this
    first. `verbose`: show Ray's messages and progress bars."""
    internals.look_for_finished_tasks_often()
    context = DataContext.get_current()
    context.enable_progress_bars = verbose
    # Ray ends a run after 30 minutes without progress. A cluster may wait for spot machines for hours.
    context.execution_no_progress_timeout_s = -1
    # Ray ends a run with the first replica that dies while it loads. `replicas.Roll` decides that, by node.
    context.max_consecutive_actor_init_deaths = MOST_INIT_DEATHS
    # As Ray's defaults, named because a user's environment or notebook may have changed them. A block with an error
    # must not be dropped: its images would have no row. Nor is it tried again: an error of ours comes again.
    context.max_errored_blocks = 0
    context.max_map_retries, context.retried_map_errors = 0, False
    context.actor_task_retry_on_errors, context.actor_init_retry_on_errors = False, False
    # A replica that waits for room must not end the run.
    context.wait_for_min_actors_s = -1
    if not verbose:
        for name in ("ray.data", "ray.train"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
