"""Trains on a Ray cluster: prepares each attempt, and decides whether another follows. `ray_backend` talks to Ray."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from unet_ray.config import TrainConfig, UserError
from unet_ray.data import mask_files, pages, storage
from unet_ray.data.output_lock import Holder
from unet_ray.data.rows import Subset
from unet_ray.keys import Keys
from unet_ray.models import checkpoint
from unet_ray.models.device import check_precision
from unet_ray.own_process import claim
from unet_ray.training.follower import Follower
from unet_ray.training.loop import fit
from unet_ray.training.progress import RAY_FOLDER, progress_writer
from unet_ray.training.results import epochs_done
from unet_ray.training.setup import (
    MARK,
    Split,
    decoder_with_filled_cache,
    explained_errors,
    has_weights,
    write_start,
)

if TYPE_CHECKING:
    import torch


def train_on_cluster(
    config: TrainConfig,
    split: Split,
    holder: Holder,
    follower: Follower,
    on_retry: Callable[[str, int], None],
    *,
    verbose: bool = False,
) -> None:
    """Trains, and restarts from the last finished epoch after workers or nodes were lost: up to `compute.retries` times
    in a row without a finished epoch between them.

    Ray's own retries (`max_failures`) are off: they also repeat failures that come every time, and do not decode the
    rows again that were lost with a node. Raises UserError for what the user must fix.
    """
    from unet_ray.ray_backend import autoscaling
    from unet_ray.ray_backend.data_context import configure
    from unet_ray.ray_backend.training import WorkersLostError, raising_workers_lost

    configure(verbose)
    out = holder.out
    device = autoscaling.pick_device(config.compute.device)
    check_precision(config.train.precision, device)
    failures = 0
    while True:
        epochs_before = epochs_done(out)
        try:
            with raising_workers_lost():
                _attempt(config, split, holder, device, follower)
            break
        except WorkersLostError as error:
            epochs_now = storage.patiently(lambda: epochs_done(out), out)
            failures = 1 if epochs_now > epochs_before else failures + 1
            if failures > config.compute.retries:
                raise
            on_retry(str(error), epochs_now)
    storage.delete_folder(storage.join(out, RAY_FOLDER))


def _attempt(config: TrainConfig, split: Split, holder: Holder, device: str, follower: Follower) -> None:
    """Trains until the end or the first failure, with the nodes that the cluster has now."""
    from unet_ray.ray_backend.training import run_workers

    compute, out = config.compute, holder.out
    _check_nodes(config, split, out, device)
    threads, train_rows, val_rows = _rows_and_threads(config, split, device)
    holder.check()
    write_start(config, split, out)
    run_workers(
        Worker(config, train_rows, val_rows, split.unlabeled, holder, threads if device == "cpu" else None),
        out,
        RAY_FOLDER,
        workers=compute.workers,
        device=device,
        cpus_per_worker=threads,
        while_running=follower.look,
    )


def _check_nodes(config: TrainConfig, split: Split, out: str, device: str) -> None:
    """Raises UserError unless there is room for the workers, and every node sees the data and the run directory."""
    from unet_ray.ray_backend import autoscaling, nodes
    from unet_ray.ray_backend.shared_files import check_shared

    compute, first = config.compute, split.pairs[0]
    with _marked(out) as mark:
        one_mask = mask_files.first_file(first.mask)
        places = {f"--out {out}": mark, "--images": pages.file_of(first.image), "--masks": pages.file_of(one_mask)}
        if split.unlabeled:
            places["--unlabeled"] = pages.file_of(split.pairs[-1].image)
        models = {"--init": None if has_weights(out) else config.train.init, "train.teacher": config.train.teacher}
        for name, model in models.items():
            if model is not None:
                places[name] = storage.join(checkpoint.model_directory(model), checkpoint.CARD)
        if (weights := config.train.encoder_weights) is not None and not has_weights(out):
            places["train.encoder_weights"] = weights
        # Also before the room for workers is counted: this asks every node, and waits for a node that has just died
        # until Ray knows of it.
        check_shared(places)
        nodes.look()
        if autoscaling.make_room_for_workers(
            compute.fewest_workers, device, compute.cpus_per_worker, compute.most_workers
        ):
            check_shared(places)


def _rows_and_threads(config: TrainConfig, split: Split, device: str) -> tuple[int, Subset, Subset]:
    """Returns the CPUs of each worker, the rows to train on and the rows to validate on. Raises UserError."""
    from unet_ray.ray_backend import nodes
    from unet_ray.ray_backend.rows import MaterialisedRows, RayStreamedRows, run_in_tasks

    compute = config.compute
    decoder = decoder_with_filled_cache(config, split.pairs, run_in_tasks)
    # Every node may come to hold every row, so the smallest object store decides.
    fits = len(split.pairs) * decoder.row_bytes() <= compute.memory_fraction * nodes.object_store_of_smallest()
    cpus = int(nodes.total("CPU"))
    per_worker = max(1, compute.cpus_per_worker) if device == "cpu" else 1  # a GPU's worker takes a CPU too
    if not fits and compute.fewest_workers * per_worker >= cpus:
        raise UserError(
            f"--workers {compute.fewest_workers} leaves none of {cpus} CPUs to stream the images, which don't fit in "
            f"memory: use --workers {max(1, cpus - 1)}, or --local"
        )
    threads = compute.cpus_per_worker or nodes.cpus_for_each(compute.most_workers, spare=0 if fits else 1)
    decoded = MaterialisedRows(split.pairs, decoder) if fits else RayStreamedRows(split.pairs, decoder)
    return threads, *split.rows(decoded)


@contextmanager
def _marked(out: str) -> Iterator[str]:
    """Puts a file into the run directory, for other nodes to look for, and removes it at the end."""
    mark = storage.join(out, f"{uuid.uuid4().hex}{MARK}")
    storage.write_bytes(mark, b"")
    try:
        yield mark
    finally:
        storage.delete_file(mark)


@dataclass(frozen=True, slots=True)
class Worker:
    """Trains in one process of a training on a cluster. It is called with its device, inside the process group."""

    config: TrainConfig
    train_rows: Subset
    val_rows: Subset
    unlabeled: int
    """The last of `train_rows`, so many, have no masks."""
    holder: Holder
    threads: int | None
    """Threads of torch; None leaves the number to torch."""
    keys: Keys = field(default_factory=Keys)

    def __call__(self, device: torch.device) -> None:
        import torch

        claim()
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        # The driver reads the run directory. Nothing is reported to Ray, which takes two seconds for each report.
        out = self.holder.out
        with explained_errors(out, self.config), progress_writer(out) as on_step:
            fit(
                self.config,
                self.train_rows,
                self.val_rows,
                self.holder,
                device=device,
                unlabeled=self.unlabeled,
                on_step=on_step,
            )
