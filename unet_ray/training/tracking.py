"""Writes metrics for other programs: TensorBoard files in the run directory, and MLflow if it is asked for.

They get each line of `metrics.jsonl`. Neither needs an account.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from unet_ray.config import TrainConfig, UserError
from unet_ray.data import storage

Track = Callable[[dict[str, Any]], None]
TENSORBOARD = "tensorboard"


@contextmanager
def trackers(config: TrainConfig, out: str, name: str) -> Iterator[Track]:
    """Yields a function that takes each line of metrics.jsonl. `name`: the name of the run."""
    with ExitStack() as stack:
        tracks: list[Track] = []
        if not storage.is_uri(out):  # TensorBoard's writer appends, which is not possible in a bucket
            tracks.append(stack.enter_context(_tensorboard(storage.join(out, TENSORBOARD))))
        if config.compute.mlflow:
            tracks.append(stack.enter_context(_mlflow(config, name)))

        def track(line: dict[str, Any]) -> None:
            for each in tracks:
                each(line)

        yield track


def scalars(line: dict[str, Any]) -> dict[str, float]:
    """Returns the numbers of a line that can be plotted over epochs."""
    return {key: float(value) for key, value in line.items() if key != "epoch" and isinstance(value, (int, float))}


@contextmanager
def _tensorboard(folder: str) -> Iterator[Track]:
    mode = "CRC32C_SW_MODE"
    known = mode in os.environ
    from tensorboardX import SummaryWriter

    if not known:
        os.environ.pop(mode, None)  # tensorboardX sets it for a library that it imports
    writers: list[SummaryWriter] = []

    def track(line: dict[str, Any]) -> None:
        if not writers:
            # Only now, since `purge_step` needs the first epoch: it voids that and later epochs of an earlier run.
            method = multiprocessing.get_start_method(allow_none=True)
            writers.append(SummaryWriter(folder, purge_step=line["epoch"]))
            if method is None:  # the queue of tensorboardX has settled it, and the host could no longer choose
                multiprocessing.set_start_method(None, force=True)
        for key, value in scalars(line).items():
            subset, _, rest = key.partition("_")
            writers[0].add_scalar(f"{subset}/{rest}" if subset in ("train", "val") else key, value, line["epoch"])
        writers[0].flush()

    try:
        yield track
    finally:
        for writer in writers:
            writer.close()


@contextmanager
def _mlflow(config: TrainConfig, name: str) -> Iterator[Track]:
    try:
        import mlflow
    except ImportError:
        raise UserError("compute.mlflow needs MLflow: pip install 'unet_ray[mlflow]'") from None
    mlflow.set_tracking_uri(config.compute.mlflow)
    mlflow.set_experiment("unet_ray")
    with mlflow.start_run(run_name=name):
        settings = config.to_dict()
        mlflow.log_params(
            {f"{section}.{key}": value for section in settings for key, value in settings[section].items()}
        )
        yield lambda line: mlflow.log_metrics(scalars(line), step=line["epoch"])
