"""Writes metrics for other programs: TensorBoard files in the run directory, and MLflow if it is asked for.

They get each line of `metrics.jsonl`. Neither needs an account.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from unet_ray.config import TrainConfig, UserError, first_line
from unet_ray.data import storage

Track = Callable[[dict[str, Any]], None]
TENSORBOARD = "tensorboard"
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
"""Of MLflow's client with a server that does not answer. Its own seven retries would hold each epoch for minutes."""

log = logging.getLogger("unet_ray")


class _Delivery:
    """Hands lines to a tracker. A tracker that fails never ends the training: what it has missed is handed over with
    the next line, and at the end."""

    def __init__(self, name: str, track: Track) -> None:
        self.name, self.track = name, track
        self.missed: list[dict[str, Any]] = []
        self.warned = False

    def __call__(self, line: dict[str, Any]) -> None:
        self.missed.append(line)
        self.catch_up()

    def catch_up(self) -> None:
        try:
            while self.missed:
                self.track(self.missed[0])
                self.missed.pop(0)
        except Exception as error:  # of many kinds: a server that is down, a store that is full or gone
            if not self.warned:
                self.warned = True
                log.warning("%s: %s: the training goes on without it", self.name, first_line(error)[:200])

    def end(self) -> None:
        """Hands over what is missing, or says how much is."""
        self.catch_up()
        if self.missed:
            log.warning("%s has not got %d epochs: metrics.jsonl has all", self.name, len(self.missed))


@contextmanager
def trackers(config: TrainConfig, out: str, name: str) -> Iterator[Track]:
    """Yields a function that takes each line of metrics.jsonl. `name`: the name of the run."""
    with ExitStack() as stack:
        deliveries: list[_Delivery] = []
        if not storage.is_uri(out):  # TensorBoard's writer appends, which is not possible in a bucket
            track = stack.enter_context(_tensorboard(storage.join(out, TENSORBOARD)))
            deliveries.append(_Delivery("TensorBoard", track))
        if config.compute.mlflow:
            track = stack.enter_context(_mlflow(config, name))
            deliveries.append(_Delivery(f"MLflow ({storage.without_secrets(config.compute.mlflow)})", track))
        for delivery in deliveries:
            stack.callback(delivery.end)

        def track_all(line: dict[str, Any]) -> None:
            for delivery in deliveries:
                delivery(line)

        yield track_all


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
    """Begins the run with the first line that the server takes."""
    try:
        import mlflow
    except ImportError:
        raise UserError("compute.mlflow needs MLflow: pip install 'unet_ray[mlflow]'") from None

    def begin() -> None:
        mlflow.set_tracking_uri(config.compute.mlflow)
        mlflow.set_experiment("unet_ray")
        mlflow.start_run(run_name=name)

    def describe() -> None:
        settings = config.to_dict()
        mlflow.log_params(
            {f"{section}.{key}": value for section in settings for key, value in settings[section].items()}
        )

    first = [begin, describe]  # each is done once, although a server may fail between them

    def track(line: dict[str, Any]) -> None:
        while first:
            first[0]()
            first.pop(0)
        mlflow.log_metrics(scalars(line), step=line["epoch"])

    def end(status: str) -> None:
        if begin not in first:
            with suppress(Exception):  # the server may be down now
                mlflow.end_run(status)

    with _patient():
        try:
            yield track
        except BaseException:
            end("FAILED")
            raise
        else:
            end("FINISHED")


@contextmanager
def _patient() -> Iterator[None]:
    """Sets the variables of `PATIENCE` that are not set, and takes them away at the end: the process is the host's."""
    ours = {variable: value for variable, value in PATIENCE.items() if variable not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for variable in ours:
            os.environ.pop(variable, None)
