"""`train`: from folders of images and masks to a run directory, in this process or on a Ray cluster."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from unet_ray.config import TrainConfig, UserError
from unet_ray.data import cache, rows, storage
from unet_ray.data.looks import Looks
from unet_ray.data.output_lock import Holder, OutputLock, output_lock
from unet_ray.data.pairs import find_pairs
from unet_ray.models import checkpoint, encoder_weights, run_files
from unet_ray.models.device import check_precision, device_here
from unet_ray.ray_backend.session import Runtime
from unet_ray.training import custom, teacher, tracking
from unet_ray.training.first_look import look
from unet_ray.training.follower import Follower, OnEpoch
from unet_ray.training.loop import fit
from unet_ray.training.nothing_found import share_found, why_nothing
from unet_ray.training.on_cluster import train_on_cluster
from unet_ray.training.progress import EpochProgress, OnStep
from unet_ray.training.results import TrainResult, result_of
from unet_ray.training.setup import (
    Split,
    check_out,
    decoder_with_filled_cache,
    explained_errors,
    has_weights,
    resolved,
    say_if_rate_rises,
    with_absolute_paths,
    write_start,
)

if TYPE_CHECKING:
    import torch


log = logging.getLogger("unet_ray")


@dataclass(frozen=True, slots=True)
class Callbacks:
    """Functions that a training calls while it runs."""

    on_start: Callable[[Split], None] = lambda _split: None
    """Gets the images to train and validate on, before the first epoch."""
    on_epoch: Callable[[dict[str, Any]], None] = lambda _line: None
    """Gets each line of metrics.jsonl, after it is written."""
    on_step: Callable[[EpochProgress], None] = lambda _progress: None
    """Gets the progress of the epoch, every few seconds."""
    on_retry: Callable[[str, int], None] = lambda _reason, _epoch: None
    """Gets why a worker was lost, and the epoch after which training goes on."""


def train(
    config: TrainConfig,
    out: str,
    *,
    runtime: Runtime = Runtime(),
    resume: bool = False,
    callbacks: Callbacks = Callbacks(),
) -> TrainResult:
    """Trains `config` into the run directory `out`: on Ray, or with `runtime.local` in this process.

    Checks everything that needs no Ray before it starts Ray. `resume` goes on from the last finished epoch, or starts
    from the beginning if there is none. Raises UserError for what the user must fix.
    """
    _check_settings(config)
    custom.check(config)
    out = storage.absolute(out)
    config = with_absolute_paths(config)
    pairs = find_pairs(config.data, config.model.in_channels, say=True)
    split = Split.of(pairs, config.data, config.train.seed)
    if config.data.unlabeled:
        split = split.with_unlabeled(config.data, [pair.image for pair in pairs])
    _check_validation(config, split)
    config = resolved(config, split.train_masks)
    teacher.check(config)
    if not storage.exists(storage.join(out, run_files.LOCK)):  # else another training may be at work: the lock tells
        _check_out(config, split, out, resume)
    with output_lock(out, run_files.LOCK, "give the same command again with --resume") as lock:
        # Again, because another training may have begun and ended before this one got the lock.
        _check_out(config, split, out, resume)
        say_if_rate_rises(config, out)
        callbacks.on_start(split)
        looks = look([split.pairs[index] for index in split.train], config)
        _train(config, split, out, runtime, lock, callbacks, looks)
    return _explained(storage.patiently(lambda: result_of(out), out), split, config)


def _explained(result: TrainResult, split: Split, config: TrainConfig) -> TrainResult:
    """Adds the likely reason if the network finds nothing, or says that a longer training is needed."""
    if "val_counts" not in result.best:
        return result
    steps = result.epochs * -(-len(split.train) // config.train.batch_size)
    trained_on = [split.pairs[index] for index in split.train]
    reason = why_nothing(trained_on, config, share_found(result.best["val_counts"]), steps)
    if reason is None:
        return result
    text, lasting = reason
    if lasting:
        return dataclasses.replace(result, problem=text)
    log.warning("%s", text)
    return result


def _check_out(config: TrainConfig, split: Split, out: str, resume: bool) -> None:
    """Raises UserError if this training can't write into `out`, or can't begin with the weights it is given."""
    check_out(config, split, out, resume)
    if has_weights(out):
        return
    if config.train.init is not None:
        checkpoint.check_init(config.train.init, config.model)
    if config.train.encoder_weights is not None:
        encoder_weights.check(config.model, config.train.encoder_weights)


def _train(
    config: TrainConfig,
    split: Split,
    out: str,
    runtime: Runtime,
    lock: OutputLock,
    callbacks: Callbacks,
    looks: Looks,
) -> None:
    """Trains in this process or on Ray, as long as `lock` is held. Writes how the images look beside the model."""
    begun = False
    with tracking.trackers(config, out, PurePosixPath(out).name) as track, runtime.started():

        def on_epoch(line: dict[str, Any]) -> None:
            nonlocal begun
            if not begun:  # now there is a model
                lock.check()
                checkpoint.save_looks(storage.join(out, run_files.MODEL), looks)
                begun = True
            track(line)
            callbacks.on_epoch(line)

        def on_step(progress: EpochProgress) -> None:
            lock.check()
            callbacks.on_step(progress)

        if runtime.local:
            _train_here(config, split, lock.holder, on_epoch, on_step)
        else:
            follower = Follower(out, on_epoch, callbacks.on_step, lock.check)
            train_on_cluster(config, split, lock.holder, follower, callbacks.on_retry, verbose=runtime.verbose)


def _check_settings(config: TrainConfig) -> None:
    """Raises UserError for settings that are missing or contradict each other."""
    if not config.data.images:
        raise UserError("--images is missing: the folder of the images")
    if not config.data.masks:
        raise UserError("--masks is missing: the folder of the masks, or that of the images if they end in _mask there")
    workers = config.compute.most_workers
    if config.train.batch_size < workers:
        raise UserError(
            f"--batch-size {config.train.batch_size} is for all workers together, and there are {workers}: use "
            f"{workers} or more"
        )


def _check_validation(config: TrainConfig, split: Split) -> None:
    """Raises UserError for settings that need images to validate on if there are none."""
    for name, wanted, instead in (("patience", config.train.patience, 0), ("schedule", "plateau", "cosine")):
        if not split.val and wanted and getattr(config.train, name) == wanted:
            raise UserError(
                f"train.{name}={wanted} goes by validation scores, and data.val_fraction=0 leaves none: --set "
                f"train.{name}={instead}"
            )


def _train_here(config: TrainConfig, split: Split, holder: Holder, on_epoch: OnEpoch, on_step: OnStep) -> None:
    """Trains in this process."""
    import torch

    device = device_here(config.compute.device, config.compute.fewest_workers)
    check_precision(config.train.precision, device.type)
    # The seed and the number of threads hold for the whole process, so a host gets its own back.
    threads = torch.get_num_threads()
    gpus = [torch.cuda.current_device()] if device.type == "cuda" else []
    with torch.random.fork_rng(gpus):
        try:
            if config.compute.cpus_per_worker:
                torch.set_num_threads(config.compute.cpus_per_worker)
            _fit_here(config, split, holder, device, on_epoch, on_step)
        finally:
            torch.set_num_threads(threads)


def _fit_here(
    config: TrainConfig, split: Split, holder: Holder, device: torch.device, on_epoch: OnEpoch, on_step: OnStep
) -> None:
    out = holder.out
    decoder = decoder_with_filled_cache(config, split.pairs, cache.in_threads(os.cpu_count() or 1))
    fits = rows.fits_in_memory(len(split.pairs), decoder, config.compute.memory_fraction)
    kind = rows.MemoryRows if fits else rows.StreamedRows
    train_rows, val_rows = split.rows(kind(split.pairs, decoder))
    holder.check()
    write_start(config, split, out)
    with explained_errors(out, config):
        fit(
            config,
            train_rows,
            val_rows,
            holder,
            device=device,
            unlabeled=split.unlabeled,
            report=on_epoch,
            on_step=on_step,
        )
