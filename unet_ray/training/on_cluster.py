"""Training on a Ray cluster: what each attempt is given, and when another follows. `ray_backend` talks to Ray."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from unet_ray.config import TrainConfig, UserError
from unet_ray.data import storage
from unet_ray.data.rows import Subset
from unet_ray.models import checkpoint
from unet_ray.models.device import check_precision
from unet_ray.training.follower import Follower
from unet_ray.training.loop import fit
from unet_ray.training.progress import RAY_FOLDER, progress_writer
from unet_ray.training.results import epochs_done
from unet_ray.training.setup import MARK, Split, explain_shortages, first_weights, row_decoder, write_start

if TYPE_CHECKING:
    import torch


def train_on_cluster(
    config: TrainConfig, split: Split, out: str, follower: Follower, on_retry: Callable[[str, int], None]
) -> None:
    """Trains, and starts again from the last finished epoch where workers or nodes are lost, up to `compute.retries`
    times in a row without a finished epoch between them.

    Ours rather than Ray's max_failures, which also repeats what fails every time, and does not decode again the rows
    that were lost with a node. Raises UserError for what the user must fix.
    """
    from unet_ray.ray_backend import autoscaling
    from unet_ray.ray_backend.data_context import configure
    from unet_ray.ray_backend.training import WorkersLostError, losses_may_be_retried

    configure()
    device = autoscaling.pick_device(config.compute.device)
    check_precision(config.train.precision, device)
    failures = 0
    while True:
        epochs_before = epochs_done(out)
        try:
            with losses_may_be_retried():
                _attempt(config, split, out, device, follower)
            break
        except WorkersLostError as error:
            epochs_now = epochs_done(out)
            failures = 1 if epochs_now > epochs_before else failures + 1
            if failures > config.compute.retries:
                raise
            on_retry(str(error), epochs_now)
    storage.delete_folder(storage.join(out, RAY_FOLDER))


def _attempt(config: TrainConfig, split: Split, out: str, device: str, follower: Follower) -> None:
    """Trains until the end or the first failure, with the nodes that the cluster has now."""
    from unet_ray.ray_backend.training import run_workers

    compute = config.compute
    _check_nodes(config, split, out, device)
    threads, train_rows, val_rows = _rows_and_threads(config, split, device)
    write_start(config, split, out)
    run_workers(
        Worker(config, train_rows, val_rows, out, threads if device == "cpu" else None),
        out,
        RAY_FOLDER,
        workers=compute.workers,
        device=device,
        cpus_per_worker=threads,
        while_running=follower.look,
    )


def _check_nodes(config: TrainConfig, split: Split, out: str, device: str) -> None:
    """Raises UserError unless there is room for the workers, and every node sees the data and the run directory."""
    from unet_ray.ray_backend import autoscaling
    from unet_ray.ray_backend.shared_files import check_shared

    compute, first = config.compute, split.pairs[0]
    with _marked(out) as mark:
        places = {f"--out {out}": mark, "--images": first.image, "--masks": first.mask}
        if (init := first_weights(config, out)) is not None:
            places["--init"] = storage.join(checkpoint.model_directory(init), checkpoint.CARD)
        # Before there are workers, too: a node that has just died is asked for its answer until Ray knows.
        check_shared(places)
        if autoscaling.check_workers(compute.fewest_workers, device, compute.cpus_per_worker, compute.most_workers):
            check_shared(places)


def _rows_and_threads(config: TrainConfig, split: Split, device: str) -> tuple[int, Subset, Subset]:
    """CPUs of each worker, rows to train on and rows to validate on. Raises UserError."""
    from unet_ray.ray_backend import nodes
    from unet_ray.ray_backend.rows import MaterialisedRows, RayStreamedRows, fill_cache

    compute = config.compute
    decoder = row_decoder(config, split.pairs, fill_cache)
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
    """A file in the run directory, for other nodes to look for."""
    mark = storage.join(out, f"{uuid.uuid4().hex}{MARK}")
    storage.write_bytes(mark, b"")
    try:
        yield mark
    finally:
        storage.delete_file(mark)


@dataclass(frozen=True, slots=True)
class Worker:
    """What each process of a training on a cluster runs: called with its device, inside the process group."""

    config: TrainConfig
    train_rows: Subset
    val_rows: Subset
    out: str
    threads: int | None
    """Of torch; None leaves it to torch."""

    def __call__(self, device: torch.device) -> None:
        import torch

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        # Nothing is reported to Ray, which takes two seconds for a report, however short the epochs: the driver reads
        # the run directory.
        with explain_shortages(self.out), progress_writer(self.out) as on_step:
            fit(self.config, self.train_rows, self.val_rows, self.out, device=device, on_step=on_step)
