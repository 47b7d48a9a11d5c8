"""Training: from folders to a run directory, through Ray Train or in this process."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

from unet_ray import checkpoint, engine, masks, records, rows, storage
from unet_ray.config import TrainConfig, UserError, load_train_config
from unet_ray.engine import TrainResult
from unet_ray.records import Pair
from unet_ray.rows import Decoder, Rows, Subset

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

    from unet_ray.datasets import MaterialisedRows, RayStreamedRows

OnEpoch = Callable[[dict[str, Any]], None]
POLL_SECONDS = 1.0
RAY_FOLDER = ".ray"
"""Ray Train's own bookkeeping inside the run directory, while it trains."""


def train(
    config: TrainConfig,
    out: str,
    *,
    local: bool = False,
    resume: bool = False,
    cluster: AbstractContextManager[None] = nullcontext(),
    on_start: Callable[[int, int], None] = lambda _train, _val: None,
    on_epoch: OnEpoch = lambda _line: None,
) -> TrainResult:
    """Trains `config` into the run directory `out`: through Ray Train, or with `local` in this process.

    `cluster` is entered once all that needs no Ray has been checked: a context in which `ray.init` has been called
    (nothing, where the caller has called it, or with `local`).

    `on_start` is told the numbers of training and validation pairs; `on_epoch` gets each line of metrics.jsonl as it
    is written. `resume` goes on from the last finished epoch, and starts anew where there is none.
    Raises UserError for what the user can mend.
    """
    for name in ("images", "masks"):
        if not getattr(config.data, name):
            raise UserError(f"--{name} is missing: the folder of the {name}")
    out = storage.absolute(out)
    if config.train.batch_size < config.compute.workers:
        raise UserError(
            f"--batch-size {config.train.batch_size} is for all workers together, and there are "
            f"{config.compute.workers}: use {config.compute.workers} or more"
        )
    images, masks_folder = storage.absolute(config.data.images), storage.absolute(config.data.masks)
    pairs = records.find_pairs(images, masks_folder)
    train_indices, val_indices = records.split([pair.key for pair in pairs], config.data, config.train.seed)
    used = sorted([*train_indices, *val_indices])
    number = {index: row for row, index in enumerate(used)}
    parts = Split([pairs[i] for i in used], [number[i] for i in train_indices], [number[i] for i in val_indices])
    data = dataclasses.replace(config.data, images=images, masks=masks_folder)
    if data.mask_values is None:
        paths = [pair.mask for pair in pairs]
        data = dataclasses.replace(data, mask_values=masks.infer_values(paths, config.model.num_classes, data))
    config = dataclasses.replace(config, data=data)
    _check_out(config, out, resume)
    on_start(len(parts.train), len(parts.val))

    run = _train_here if local else _train_on_ray
    with nullcontext() if local else cluster:
        run(config, parts, out, on_epoch)
    return engine.result_of(out)


class Split(NamedTuple):
    """The pairs a training uses, and which of them it trains and validates on."""

    pairs: list[Pair]
    train: list[int]
    val: list[int]

    def rows(self, decoded: Rows) -> tuple[Subset, Subset]:
        """Rows to train on and rows to validate on, of rows decoded from `pairs`."""
        return Subset(decoded, self.train), Subset(decoded, self.val)


def _check_out(config: TrainConfig, out: str, resume: bool) -> None:
    """Raises UserError if `out` holds something that this training would overwrite, or can't go on from."""
    there = storage.names_in(out)
    if not there:
        return
    if not resume:
        what = "another run" if engine.CONFIG in there else "other files"
        raise UserError(
            f"{out} holds {what}: choose another --out" + (", or --resume" if engine.CONFIG in there else "")
        )
    state = checkpoint.read_state(storage.join(out, engine.LAST))
    if state is None:
        return
    before = load_train_config(config_file=state.settings)
    if _resumable(before) != _resumable(config):
        raise UserError(
            f"{out} was trained with other settings, so --resume can't go on: "
            f"`--config {storage.join(out, engine.CONFIG)}` has the old ones, or choose another --out"
        )
    if state.epoch >= config.train.epochs:
        raise UserError(f"{out} is finished ({state.epoch} epochs): raise --epochs, or choose another --out")


def _resumable(config: TrainConfig) -> TrainConfig:
    """What must be the same for a run to go on: all but where it runs and for how long."""
    return dataclasses.replace(
        config, compute=type(config.compute)(), train=dataclasses.replace(config.train, epochs=1)
    )


def _write_config(config: TrainConfig, out: str) -> None:
    storage.write_bytes(storage.join(out, engine.CONFIG), config.to_yaml().encode())


def _train_here(config: TrainConfig, parts: Split, out: str, on_epoch: OnEpoch) -> None:
    import torch

    device = engine.device_here(config.compute.device, config.compute.workers)
    if config.compute.cpus_per_worker:
        torch.set_num_threads(config.compute.cpus_per_worker)
    decoder = Decoder.of(config.model, config.data)
    fits = rows.fits_in_memory(len(parts.pairs), decoder, config.compute.memory_fraction)
    kind = rows.MemoryRows if fits else rows.StreamedRows
    train_rows, val_rows = parts.rows(kind(parts.pairs, decoder))
    _write_config(config, out)
    engine.fit(config, train_rows, val_rows, out, device=device, report=on_epoch)


def _train_on_ray(config: TrainConfig, parts: Split, out: str, on_epoch: OnEpoch) -> None:
    import ray.train
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from unet_ray import datasets

    datasets.configure()
    compute = config.compute
    device = datasets.pick_device(compute.device)
    datasets.check_workers(compute.workers, device, compute.cpus_per_worker)
    decoder = Decoder.of(config.model, config.data)
    # Every node may come to hold every row, so the smallest one's store decides.
    fits = len(parts.pairs) * decoder.row_bytes() <= compute.memory_fraction * datasets.object_store_of_smallest_node()
    cpus = int(datasets.cluster_total("CPU"))
    if not fits and device == "cpu" and compute.workers >= cpus:
        raise UserError(
            f"--workers {compute.workers} leaves none of {cpus} CPUs to stream the images, which don't fit in memory: "
            f"use --workers {max(1, cpus - 1)}, or --local"
        )
    threads = compute.cpus_per_worker or datasets.cpus_for_each(compute.workers, spare=0 if fits else 1)
    kind: type[MaterialisedRows] | type[RayStreamedRows]
    kind = datasets.MaterialisedRows if fits else datasets.RayStreamedRows
    train_rows, val_rows = parts.rows(kind(parts.pairs, decoder))
    _write_config(config, out)

    on_gpu = device == "cuda"
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={
            "config": config,
            "rows": (train_rows, val_rows),
            "out": out,
            "threads": None if on_gpu else threads,
        },
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
        ),
    )
    # What an interrupted run left would make Ray take this one for finished and train nothing.
    storage.delete_folder(storage.join(out, RAY_FOLDER))
    try:
        _fit_and_follow(trainer, out, on_epoch)
    except ray.train.WorkerGroupError as error:
        for failure in error.worker_failures.values():
            _raise_user_error(failure)
        raise
    storage.delete_folder(storage.join(out, RAY_FOLDER))


def _fit_and_follow(trainer: TorchTrainer, out: str, on_epoch: OnEpoch) -> None:
    """Fits, and tells the driver of each epoch by reading the metrics.jsonl that a worker, on whatever machine, writes.

    On a thread: on the main one Ray Train takes Ctrl-C for itself and ends with exit code 0.
    """
    failures: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            failures.append(error)

    state = checkpoint.read_state(storage.join(out, engine.LAST))
    told = state.epoch if state else 0
    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    ended = False
    while not ended:
        thread.join(POLL_SECONDS)
        ended = not thread.is_alive()  # before the last look, so that nothing is missed
        for line in engine.read_metrics(out)[told:]:
            told += 1
            on_epoch(line)
    for failure in failures:
        raise failure


def _train_worker(loop: dict[str, Any]) -> None:
    """What each of Ray Train's workers runs."""
    import ray.train
    import ray.train.torch
    import torch

    if loop["threads"] is not None:
        torch.set_num_threads(loop["threads"])
    # Ray moves workers to a folder of its own, and its report is a barrier, so every rank calls it.
    train_rows, val_rows = loop["rows"]
    engine.fit(
        loop["config"],
        train_rows,
        val_rows,
        loop["out"],
        device=ray.train.torch.get_device(),
        report=ray.train.report,
    )


def _raise_user_error(failure: BaseException | None) -> None:
    """Raises the UserError somewhere in a chain of causes, if there is one."""
    seen = 0
    while failure is not None and seen < 10:
        if isinstance(failure, UserError):
            raise UserError(str(failure)) from None
        failure, seen = getattr(failure, "cause", None) or failure.__cause__, seen + 1
