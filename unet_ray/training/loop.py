"""The training loop: any rows, any number of processes, no Ray.

Legend: *world size* is the number of training processes, *rank* is this one's number among them.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unet_ray.config import TrainConfig, UserError
from unet_ray.data import storage
from unet_ray.data.output_lock import Holder
from unet_ray.data.rows import Rows
from unet_ray.models import checkpoint, compiling, training_state
from unet_ray.models.device import in_bf16, keep_freed_memory
from unet_ray.models.operations import floating_point_operations
from unet_ray.models.run_files import LAST, MODEL
from unet_ray.models.training_state import TrainingState
from unet_ray.training import distributed
from unet_ray.training.progress import OnStep, ProgressTimer
from unet_ray.training.results import read_metrics, rounded, write_metrics
from unet_ray.training.sampler import EpochBatches, Sampler
from unet_ray.training.schedules import decay_after_plateaus, learning_rate_at, stops_early
from unet_ray.training.step import Training, prepare
from unet_ray.training.validation import validate

Report = Callable[[dict[str, Any]], None]
"""Gets the line of metrics.jsonl of each finished epoch, on every rank."""


def fit(
    config: TrainConfig,
    train_rows: Rows,
    val_rows: Rows,
    holder: Holder,
    *,
    device: torch.device,
    unlabeled: int = 0,
    report: Report = lambda _line: None,
    on_step: OnStep = lambda _progress: None,
) -> None:
    """Trains from the run's last finished epoch, or from the start, and writes the run directory.
    `holder`: of the run directory's lock; it is checked before each write. `unlabeled`: the last rows of `train_rows`,
    so many, have no masks.

    Each process of a training calls it in the same way. With an initialised torch.distributed group, only rank 0 writes
    and calls `on_step`. Raises UserError if the loss is not finite.
    """
    rank, world_size, out = distributed.rank(), distributed.world_size(), holder.out
    training, state = _start(config, out, device)
    labeled = len(train_rows) - unlabeled
    sampler = Sampler.of(config.train, labeled, unlabeled=unlabeled, rank=rank, world_size=world_size)
    if _compiles(config, sampler, device):
        training.forward = compiling.Compiled(training.ddp_network)
    history = [line for line in read_metrics(out) if line["epoch"] <= state.epoch]

    for epoch in range(state.epoch + 1, config.train.epochs + 1):
        val_dices = [line["val_dice"] for line in history if "val_dice" in line]
        if stops_early(config.train, val_dices):
            break
        started = time.perf_counter()
        _seed_dropout(config.train.seed, epoch, rank)
        batches = EpochBatches(train_rows, sampler.epoch(epoch))
        timer = ProgressTimer(on_step if rank == 0 else None, epoch, steps=batches.steps, images=labeled)
        decay = decay_after_plateaus(config.train, val_dices)
        train_loss = train_epoch(training, batches, epoch=epoch, decay=decay, on_step=timer)
        for network in training.networks:
            distributed.average_buffers(network, device)
        train_seconds = time.perf_counter() - started
        scores = _validate(training, val_rows) if len(val_rows) else {}
        _check_finite(scores.get("val_loss", 0.0), "loss of the validation images", epoch)
        line = {
            "epoch": epoch,
            "train_loss": train_loss,
            **scores,
            "learning_rate": training.optimizer.param_groups[-1]["lr"],
            "workers": world_size,
            "images_per_second": labeled / train_seconds,
            "train_seconds": train_seconds,
            "wait_seconds": batches.wait_seconds,
            "seconds": time.perf_counter() - started,
        }
        # Rounded as in the file, so that a resumed run, which reads it, decides the same as an uninterrupted one.
        history.append(line := rounded(line))
        dice = line.get("val_dice")
        is_best = dice is None or dice > state.best  # without validation, the last epoch is kept
        state = TrainingState(epoch, state.best if dice is None else max(state.best, dice), config.to_yaml())
        if rank == 0:
            _save(holder, training, state, history, is_best=is_best)
        report(line)


def train_epoch(
    training: Training,
    batches: EpochBatches,
    *,
    epoch: int,
    decay: float = 1.0,
    on_step: Callable[[int, Tensor], None] = lambda _step, _total: None,
) -> float:
    """Trains on an epoch's micro-batches once. Returns the mean loss over all ranks.

    `decay`: see `learning_rate_at`. `on_step` gets the number of steps done and the sum of this rank's losses.
    Raises UserError if the loss is not finite.
    """
    training.ddp_network.train()
    step, total_loss = 0, torch.zeros((), dtype=torch.float64, device=training.device)
    step_loss = torch.zeros((), device=training.device)
    for arrays, labeled, weight, ends_step in batches:
        step_loss += training.backward(arrays, weight, epoch=epoch, labeled=labeled, ends_step=ends_step)
        if not ends_step:
            continue
        _set_learning_rate(training, (epoch - 1 + step / batches.steps) / training.config.train.epochs, decay)
        training.update()
        step += 1
        total_loss += step_loss
        step_loss.zero_()
        on_step(step, total_loss)
    mean_loss = torch.tensor(float(total_loss) / batches.steps / distributed.world_size(), dtype=torch.float64)
    distributed.sum_over_ranks(mean_loss, training.device)
    _check_finite(float(mean_loss), "loss", epoch)
    return float(mean_loss)


def _check_finite(loss: float, what: str, epoch: int) -> None:
    """Raises UserError for a loss that is not finite: the epoch must not be kept, since its weights are spoilt."""
    if not math.isfinite(loss):
        after = f", which goes on after epoch {epoch - 1}" if epoch > 1 else ""
        raise UserError(
            f"the {what} became {loss} in epoch {epoch}: give the command again with --resume{after}, and a lower "
            "--lr, or --set train.precision=fp32"
        )


def _set_learning_rate(training: Training, progress: float, decay: float) -> None:
    rate = learning_rate_at(training.config.train, progress, decay)
    for group in training.optimizer.param_groups:
        group["lr"] = rate * group.get("scale", 1.0)


def _validate(training: Training, val_rows: Rows) -> dict[str, Any]:
    """Scores the network on the validation rows, which the ranks divide among themselves."""
    config, rank, world_size = training.config, distributed.rank(), distributed.world_size()
    own = np.arange(len(val_rows))[rank::world_size]
    size = max(1, config.train.batch_size // world_size)
    batches = val_rows.batches([own[start : start + size] for start in range(0, len(own), size)])
    return validate(training.saved_network, batches, training.loss, config, training.device)


def _save(
    holder: Holder, training: Training, state: TrainingState, history: list[dict[str, Any]], *, is_best: bool
) -> None:
    """Writes the best model, metrics.jsonl and `last/`. The state comes last: a run that is stopped before it repeats
    the epoch and writes the same files again. Raises UserError if another run has taken over."""
    out = holder.out
    holder.check()
    if is_best:
        checkpoint.save_model(storage.join(out, MODEL), training.saved_network, training.config, history[-1])
        holder.check()
    write_metrics(out, history)
    holder.check()
    training_state.save_state(
        storage.join(out, LAST), state, training.network, training.optimizer, training.scaler, training.ema
    )


def _start(config: TrainConfig, out: str, device: torch.device) -> tuple[Training, TrainingState]:
    """Builds the training and loads the state of its last finished epoch, if there is one."""
    if device.type == "cpu":
        keep_freed_memory(of_any_size=True)
    last = storage.join(out, LAST)
    training = prepare(config, device, resumes=training_state.has_state(last))
    state = training_state.load_state(last, training.network, training.optimizer, training.scaler, training.ema)
    if distributed.world_size() > 1:
        training.ddp_network = training.forward = distributed.over_ranks(training.network, device)
    return training, state or TrainingState(0, -1.0, config.to_yaml())


def _seed_dropout(seed: int, epoch: int, rank: int) -> None:
    """Seeds torch from (seed, epoch, rank) only, so that a resumed run draws what an uninterrupted one would."""
    torch.manual_seed(int(np.random.SeedSequence([seed, epoch, rank]).generate_state(1)[0]))


def _compiles(config: TrainConfig, sampler: Sampler, device: torch.device) -> bool:
    """Returns whether the network is compiled for training."""
    if config.compute.compile is not None:
        return config.compute.compile
    size_hw = (config.data.tile, config.data.tile) if config.data.tile else config.data.size_hw
    # The backward pass computes the gradients of inputs and of weights, each as much as the forward pass.
    per_image = 3 * floating_point_operations(config.model, size_hw)
    operations = per_image * sampler.rows * config.train.epochs / sampler.world_size
    # All ranks use the sizes of rank 0, so that they decide alike.
    sizes = len({len(micro.indices) + len(micro.unlabeled) for micro in dataclasses.replace(sampler, rank=0).epoch(1)})
    return compiling.pays(operations, device, bf16=in_bf16(device, config.train.precision), sizes=sizes)
