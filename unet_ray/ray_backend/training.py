"""Runs a plain function in a group of processes with Ray Train, and decides whether a failure may be retried."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray.exceptions
import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device

from unet_ray.config import UserError, first_line
from unet_ray.data import storage
from unet_ray.ray_backend import nodes
from unet_ray.ray_backend.process_group import OnRaysNetwork
from unet_ray.ray_backend.worker_errors import WorkerError, causes_of, read_errors, writing_errors

POLL_SECONDS = 1.0


class WorkersLostError(Exception):
    """Reports lost processes, nodes or connections; another attempt may succeed. The text is the reason in one line."""


def run_workers(
    worker: Callable[[torch.device], None],
    out: str,
    name: str,
    *,
    workers: int | tuple[int, int],
    device: str,
    cpus_per_worker: int,
    while_running: Callable[[], None],
) -> None:
    """Calls `worker` with its device in each process of a torch.distributed group.

    `out`/`name` is a folder that all machines see, for Ray's bookkeeping and the workers' errors; it is emptied first.
    `workers`: their number, or (fewest, most). `device`: `cpu` or `cuda`; with `cuda` each worker has one GPU.
    `cpus_per_worker` applies to `cpu`. `while_running` is called every second, and once at the end.

    Raises UserError for what the user must fix, and WorkersLostError if another attempt may succeed. Re-raises Ray's
    exception for other errors.
    """
    # Each attempt has its own folder: a worker of the last one may still be writing into that one's.
    errors = storage.join(out, name, f"errors-{uuid.uuid4().hex}")
    on_gpu = device == "cuda"
    trainer = TorchTrainer(
        _run_worker,
        train_loop_config={"worker": worker, "errors": errors},
        torch_config=OnRaysNetwork(),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=on_gpu,
            resources_per_worker={"GPU": 1, "CPU": 1} if on_gpu else {"CPU": cpus_per_worker},
        ),
        run_config=RunConfig(
            name=name,
            storage_path=out,
            # Controller errors (a placement that can never be met) are retried for ever by default.
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=1),
            worker_runtime_env=nodes.runtime_env(device),
        ),
    )
    # Files of an interrupted run would make Ray take this run for finished and train nothing.
    storage.delete_folder(storage.join(out, name))
    try:
        _fit(trainer, while_running)
    except ray.train.TrainingFailedError as error:
        raise_failure(error, read_errors(errors))


@contextmanager
def raising_workers_lost() -> Iterator[None]:
    """Raises WorkersLostError for Ray's errors about lost nodes, processes and objects."""
    try:
        yield
    except ray.exceptions.RayError as error:
        raise WorkersLostError(first_line(error)) from error


def _run_worker(arguments: dict[str, Any]) -> None:
    """Runs in each of Ray Train's workers."""
    with writing_errors(arguments["errors"], ray.train.get_context().get_world_rank()):
        arguments["worker"](get_device())


def _fit(trainer: TorchTrainer, while_running: Callable[[], None]) -> None:
    """Fits in a thread: in the main thread Ray Train would handle Ctrl-C itself and end with exit code 0."""
    failures: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    ended = False
    while not ended:
        thread.join(POLL_SECONDS)
        ended = not thread.is_alive()  # before the last call, so that it misses nothing
        while_running()
    for failure in failures:
        raise failure


def raise_failure(error: ray.train.TrainingFailedError, reported: dict[int, WorkerError]) -> None:
    """Raises the error that describes a failed fit; `reported`: rank -> error that this worker has written."""
    if isinstance(error, ray.train.ControllerError):
        _raise_not_started(error)
    failures = error.worker_failures if isinstance(error, ray.train.WorkerGroupError) else {}
    silent = {rank: failure for rank, failure in failures.items() if rank not in reported}
    messages = [report.message for report in reported.values() if report.kind == "user"]
    for message in [*messages, *filter(None, map(_user_error_in, silent.values()))]:
        raise UserError(message) from None
    # Check this before lost connections: one rank's own exception also ends the others' connections.
    if any(report.kind == "program" for report in reported.values()):
        raise error
    reasons = [" ".join(str(failure).split("\n")[:2]) for failure in silent.values()]
    reasons += [report.message for report in reported.values()]
    raise WorkersLostError((reasons or [first_line(error)])[0]) from error


def _raise_not_started(error: ray.train.ControllerError) -> None:
    """Raises the UserError of a worker that could not be prepared, or else one about workers that did not start."""
    causes = causes_of(error.controller_failure)
    for cause in reversed(causes):
        if isinstance(cause, UserError):
            raise UserError(str(cause)) from None
    raise UserError(
        f"the cluster did not start the workers ({first_line(causes[-1])[:300]}): use fewer --workers, or lower "
        "compute.cpus_per_worker; --resume goes on from the last finished epoch"
    ) from error


def _user_error_in(failure: BaseException) -> str | None:
    """Returns the text of a UserError that the worker could not write, as on a full disk; None if it raised none.

    The text is the last line of the worker's traceback, which is the text of Ray's exception.
    """
    lines = str(failure).strip().splitlines()
    _, found, message = lines[-1].partition(f"{UserError.__name__}: ") if lines else ("", "", "")
    return message if found else None
