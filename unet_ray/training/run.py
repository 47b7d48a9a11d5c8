"""Training: from folders to a run directory, through Ray Train or in this process."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from unet_ray.config import TrainConfig, UserError
from unet_ray.data import cache, rows, storage
from unet_ray.data.pairs import find_pairs
from unet_ray.data.splits import split_pairs
from unet_ray.models import checkpoint
from unet_ray.models.device import check_precision, device_here
from unet_ray.ray_backend.session import Runtime
from unet_ray.training import tracking
from unet_ray.training.loop import EpochProgress, fit
from unet_ray.training.on_ray import Follower, train_on_ray
from unet_ray.training.results import TrainResult, result_of
from unet_ray.training.setup import (
    OnEpoch,
    OnStep,
    Split,
    check_out,
    explain_shortages,
    first_weights,
    resolved,
    row_decoder,
    write_start,
)

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, slots=True)
class Callbacks:
    """What a training tells whoever started it."""

    on_start: Callable[[Split], None] = lambda _split: None
    """What it trains and validates on."""
    on_epoch: Callable[[dict[str, Any]], None] = lambda _line: None
    """Each line of metrics.jsonl, as it is written."""
    on_step: Callable[[EpochProgress], None] = lambda _progress: None
    """Where the epoch stands, every few seconds."""
    on_retry: Callable[[str, int], None] = lambda _reason, _epoch: None
    """Why a worker was lost, and after which epoch training goes on."""


def train(
    config: TrainConfig,
    out: str,
    *,
    runtime: Runtime = Runtime(),
    resume: bool = False,
    callbacks: Callbacks = Callbacks(),
) -> TrainResult:
    """Trains `config` into the run directory `out`: through Ray Train, or with `local` in this process.

    `cluster` is entered once all that needs no Ray has been checked: a context in which `ray.init` has been called
    (nothing, where the caller has called it, or with `local`).

    `resume` goes on from the last finished epoch, and starts anew where there is none.
    Raises UserError for what the user can mend.
    """
    if not config.data.images:
        raise UserError("--images is missing: the folder of the images")
    if not config.data.masks:
        raise UserError("--masks is missing: the folder of the masks, or that of the images if they end in _mask there")
    out = storage.absolute(out)
    workers = config.compute.most_workers
    if config.train.batch_size < workers:
        raise UserError(
            f"--batch-size {config.train.batch_size} is for all workers together, and there are {workers}: use "
            f"{workers} or more"
        )
    images, masks_folder = storage.absolute(config.data.images), storage.absolute(config.data.masks)
    pairs = find_pairs(images, masks_folder)
    train_indices, val_indices = split_pairs([pair.key for pair in pairs], config.data, config.train.seed)
    used = sorted([*train_indices, *val_indices])
    number = {index: row for row, index in enumerate(used)}
    parts = Split([pairs[i] for i in used], [number[i] for i in train_indices], [number[i] for i in val_indices])
    config = resolved(config, images, masks_folder, [pair.mask for pair in pairs])
    check_out(config, parts, out, resume)
    if (init := first_weights(config, out)) is not None:
        checkpoint.check_init(init, config.model)
    callbacks.on_start(parts)

    with tracking.trackers(config, out, PurePosixPath(out).name) as track, runtime.started():

        def told(line: dict[str, Any]) -> None:
            track(line)
            callbacks.on_epoch(line)

        if runtime.local:
            _train_here(config, parts, out, told, callbacks.on_step)
        else:
            train_on_ray(config, parts, out, Follower(out, told, callbacks.on_step), callbacks.on_retry)
    return result_of(out)


def _train_here(config: TrainConfig, parts: Split, out: str, on_epoch: OnEpoch, on_step: OnStep) -> None:
    import torch

    device = device_here(config.compute.device, config.compute.fewest_workers)
    check_precision(config.train.precision, device.type)
    if config.compute.cpus_per_worker:
        torch.set_num_threads(config.compute.cpus_per_worker)
    decoder = row_decoder(config, parts.pairs, cache.in_threads(os.cpu_count() or 1))
    fits = rows.fits_in_memory(len(parts.pairs), decoder, config.compute.memory_fraction)
    kind = rows.MemoryRows if fits else rows.StreamedRows
    train_rows, val_rows = parts.rows(kind(parts.pairs, decoder))
    write_start(config, parts, out)
    with explain_shortages(out):
        fit(config, train_rows, val_rows, out, device=device, report=on_epoch, on_step=on_step)
