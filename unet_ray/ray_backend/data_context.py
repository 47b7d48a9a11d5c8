"""Ray Data's settings for this process."""

from __future__ import annotations

import logging

from ray.data import DataContext
from ray.data._internal.execution import streaming_executor_state

LOOK_SECONDS = 0.02
"""How long Ray Data waits at most before it looks which tasks have finished."""


def configure(verbose: bool = False) -> None:
    """Ray Data's settings for this process, before any Dataset is made (later changes have no effect)."""
    # Ray Data looks for finished tasks ten times a second only (a constant, no setting), and until then its few places
    # stand empty: with chunks of half a second that was a third of the time.
    streaming_executor_state.WAIT_FOR_TASK_COMPLETION_TIMEOUT_S = LOOK_SECONDS
    context = DataContext.get_current()
    context.enable_progress_bars = verbose
    if not verbose:
        for name in ("ray.data", "ray.data._internal", "ray.train"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
