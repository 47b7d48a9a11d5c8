"""Training through Ray Train."""

from __future__ import annotations

import dataclasses
import json
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from unet_ray.config import TrainConfig, UserError
from unet_ray.data import storage
from unet_ray.models import checkpoint
from unet_ray.models.device import check_precision
from unet_ray.training.loop import EpochProgress, fit
from unet_ray.training.results import read_metrics
from unet_ray.training.setup import (
    MARK,
    OnEpoch,
    OnStep,
    Split,
    explain_shortages,
    first_weights,
    row_decoder,
    write_start,
)

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

    from unet_ray.ray_backend.rows import MaterialisedRows, RayStreamedRows


POLL_SECONDS = 1.0
PROGRESS = "progress.json"
"""In `RAY_FOLDER`: where the epoch stands, written by the first worker."""
RAY_FOLDER = ".ray"
"""Ray Train's own bookkeeping inside the run directory, while it trains."""


def train_on_ray(
    config: TrainConfig, parts: Split, out: str, follower: Follower, on_retry: Callable[[str, int], None]
) -> None:
    """Fits, and starts again from the last finished epoch where workers or nodes are lost.

    Ours rather than Ray's max_failures: that would also repeat what fails every time, and would not decode again the
    rows that were lost with a node.
    """
    import ray.exceptions
    import ray.train

    from unet_ray.ray_backend import nodes
    from unet_ray.ray_backend.data_context import configure

    configure()
    device = nodes.pick_device(config.compute.device)
    check_precision(config.train.precision, device)
    failures = 0
    while True:
        before = _epochs_done(out)
        try:
            _fit_once(config, parts, out, device, follower)
            break
        except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
            _raise_what_repeats(error)
            done = _epochs_done(out)
            failures = 1 if done > before else failures + 1
            if failures > config.compute.retries:
                raise
            on_retry(_first_line(error), done)
    storage.delete_folder(storage.join(out, RAY_FOLDER))


def _epochs_done(out: str) -> int:
    state = checkpoint.read_state(storage.join(out, checkpoint.LAST))
    return state.epoch if state else 0


class Follower:
    """Tells the driver of each epoch once, and of the steps between, by reading what a worker, on whatever machine,
    writes into the run directory."""

    def __init__(self, out: str, on_epoch: OnEpoch, on_step: OnStep) -> None:
        self.out, self.on_epoch, self.on_step, self.told = out, on_epoch, on_step, _epochs_done(out)
        self.progress: EpochProgress | None = None

    def look(self) -> None:
        try:
            progress = EpochProgress(**json.loads(storage.read_bytes(_progress_file(self.out))))
        except OSError:
            progress = None
        if progress is not None and progress != self.progress and progress.epoch > self.told:
            self.progress = progress
            self.on_step(progress)
        for line in read_metrics(self.out):
            if line["epoch"] > self.told:
                self.told = line["epoch"]
                self.on_epoch(line)


def _progress_file(out: str) -> str:
    return storage.join(out, RAY_FOLDER, PROGRESS)


def _fit_once(config: TrainConfig, parts: Split, out: str, device: str, follower: Follower) -> None:
    """One TorchTrainer fit, with what the cluster has now."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from unet_ray.ray_backend import nodes
    from unet_ray.ray_backend.process_group import OnRaysNetwork
    from unet_ray.ray_backend.rows import MaterialisedRows, RayStreamedRows, fill_cache

    compute = config.compute
    first = parts.pairs[0]
    with _marked(out) as mark:
        places = {f"--out {out}": mark, "--images": first.image, "--masks": first.mask}
        if (init := first_weights(config, out)) is not None:
            places["--init"] = storage.join(checkpoint.model_directory(init), checkpoint.CARD)
        # Before there are workers, too: a node that has just died is asked for its answer until Ray knows.
        nodes.check_shared(places)
        if nodes.check_workers(compute.fewest_workers, device, compute.cpus_per_worker, compute.most_workers):
            nodes.check_shared(places)
    decoder = row_decoder(config, parts.pairs, fill_cache)
    # Every node may come to hold every row, so the smallest one's store decides.
    fits = len(parts.pairs) * decoder.row_bytes() <= compute.memory_fraction * nodes.object_store_of_smallest()
    cpus = int(nodes.total("CPU"))
    each = max(1, compute.cpus_per_worker) if device == "cpu" else 1  # a GPU's worker holds a CPU too
    if not fits and compute.fewest_workers * each >= cpus:
        raise UserError(
            f"--workers {compute.fewest_workers} leaves none of {cpus} CPUs to stream the images, which don't fit in "
            f"memory: use --workers {max(1, cpus - 1)}, or --local"
        )
    threads = compute.cpus_per_worker or nodes.cpus_for_each(compute.most_workers, spare=0 if fits else 1)
    kind: type[MaterialisedRows] | type[RayStreamedRows]
    kind = MaterialisedRows if fits else RayStreamedRows
    train_rows, val_rows = parts.rows(kind(parts.pairs, decoder))
    write_start(config, parts, out)

    on_gpu = device == "cuda"
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={
            "config": config,
            "rows": (train_rows, val_rows),
            "out": out,
            "threads": None if on_gpu else threads,
        },
        torch_config=OnRaysNetwork(),
        scaling_config=ScalingConfig(
            num_workers=compute.workers,
            use_gpu=on_gpu,
            resources_per_worker={"GPU": 1, "CPU": 1} if on_gpu else {"CPU": threads},
        ),
        run_config=RunConfig(
            name=RAY_FOLDER,
            storage_path=out,
            # Controller errors (a placement that can never be met) are retried for ever by default.
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=1),
            worker_runtime_env=nodes.runtime_env(device),
        ),
    )
    # What an interrupted run left would make Ray take this one for finished and train nothing.
    storage.delete_folder(storage.join(out, RAY_FOLDER))
    _fit_and_follow(trainer, follower)


@contextmanager
def _marked(out: str) -> Iterator[str]:
    """A file in the run directory, for other nodes to look for."""
    mark = storage.join(out, f"{uuid.uuid4().hex}{MARK}")
    storage.write_bytes(mark, b"")
    try:
        yield mark
    finally:
        storage.delete_file(mark)


def _fit_and_follow(trainer: TorchTrainer, follower: Follower) -> None:
    """Fits on a thread: on the main one Ray Train takes Ctrl-C for itself and ends with exit code 0."""
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
        ended = not thread.is_alive()  # before the last look, so that nothing is missed
        follower.look()
    for failure in failures:
        raise failure


def _train_worker(loop: dict[str, Any]) -> None:
    """What each of Ray Train's workers runs."""
    import ray.train.torch
    import torch

    if loop["threads"] is not None:
        torch.set_num_threads(loop["threads"])
    train_rows, val_rows = loop["rows"]

    written: Future[None] | None = None

    def on_step(progress: EpochProgress) -> None:
        nonlocal written
        # Beside the training, which waits for no bucket; while one is being written, the next is left out.
        if written is None or written.done():
            text = json.dumps(dataclasses.asdict(progress))
            written = aside.submit(storage.write_bytes, _progress_file(loop["out"]), text.encode())

    with explain_shortages(loop["out"]), ThreadPoolExecutor(1) as aside:
        # Nothing is reported to Ray, which takes a report in two seconds, however short the epochs: what there is to
        # know stands in the run directory.
        device = ray.train.torch.get_device()
        fit(loop["config"], train_rows, val_rows, loop["out"], device=device, on_step=on_step)


def _raise_what_repeats(error: BaseException) -> None:
    """Raises a failure of the workers that would come again: what the user can mend, as UserError, and exceptions of
    the code's own. Returns for what comes of lost processes and broken connections."""
    import ray.exceptions
    import ray.train

    if isinstance(error, ray.train.ControllerError):
        _raise_said(_chain(error))
        raise UserError(
            f"the cluster did not start the workers ({_first_line(error)[:300]}): use fewer --workers, or lower "
            "compute.cpus_per_worker; --resume goes on from the last finished epoch"
        ) from error
    if not isinstance(error, ray.train.WorkerGroupError):
        return
    chains = [_chain(failure) for failure in error.worker_failures.values()]
    for chain in chains:
        _raise_said(chain)
    # One rank's own exception takes the others' connections with it: those are RuntimeErrors of torch.distributed.
    if any(not isinstance(chain[-1], (ray.exceptions.RayError, RuntimeError, ConnectionError)) for chain in chains):
        raise error


def _raise_said(chain: list[BaseException]) -> None:
    """Raises the UserError of a chain, if there is one: the last, as what Ray makes of one is another, with a traceback
    for its text."""
    said = [failure for failure in chain if isinstance(failure, UserError)]
    if said:
        raise UserError(str(said[-1])) from None


_CAUSES = ("_base_exc", "health_check_failure", "controller_failure", "cause", "__cause__")
"""Where Ray Train's, Ray's and Python's exceptions keep what they came of."""


def _chain(failure: BaseException) -> list[BaseException]:
    """An exception and what caused it, the first cause last."""
    chain = [failure]
    while True:
        causes = (getattr(chain[-1], name, None) for name in _CAUSES)
        cause = next((c for c in causes if isinstance(c, BaseException) and c not in chain), None)
        if cause is None:
            return chain
        chain.append(cause)


def _first_line(error: BaseException) -> str:
    """What happened, in one line."""
    text = str(_chain(error)[-1]) or type(error).__name__
    return next((line.strip() for line in text.splitlines() if line.strip()), text)
