"""The training loop: any rows, any number of processes, no Ray.

Legend: N images of a batch, M images of a set, K classes. *World* is the number of training processes, *rank* is
this one's place among them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from unet_ray.config import TrainConfig, UserError
from unet_ray.data import storage
from unet_ray.data.rows import Batch, Rows, Waiting, prefetched
from unet_ray.models import SegmentationModel, build, checkpoint, compiling
from unet_ray.models.checkpoint import LAST, MODEL, TrainingState
from unet_ray.models.device import autocast, check_precision, in_bf16, keep_freed_memory
from unet_ray.models.tiles import mirror_margin
from unet_ray.training import losses
from unet_ray.training.augment import augment, random_tiles
from unet_ray.training.distributed import average_buffers, over_ranks, sum_over_ranks, world_size
from unet_ray.training.optimizers import average_of, build_optimizer
from unet_ray.training.results import read_metrics, rounded, write_metrics
from unet_ray.training.sampler import MicroBatch, Step, batch_plan
from unet_ray.training.schedules import epochs_without_progress, learning_rate_at, plateau_factor
from unet_ray.training.validation import validate

PULSE_SECONDS = 2.0

Report = Callable[[dict[str, Any]], None]
"""Called on every rank after each epoch with that epoch's line of metrics.jsonl."""


@dataclass(slots=True)
class Training:
    """What is trained, and with what."""

    network: SegmentationModel
    model: nn.Module
    """The network itself, or DistributedDataParallel around it."""
    forward: Callable[[Tensor], Tensor]
    """`model`, perhaps compiled."""
    optimizer: torch.optim.Optimizer
    loss: losses.Loss
    scaler: torch.amp.GradScaler
    """Does something with fp16 only."""
    ema: AveragedModel | None
    config: TrainConfig
    device: torch.device

    @property
    def networks(self) -> list[nn.Module]:
        """The network and, where there is one, its average; in the same order on every rank."""
        return [self.network] if self.ema is None else [self.network, self.ema.module]

    @property
    def scored(self) -> nn.Module:
        """What is validated and saved."""
        return self.networks[-1]

    def prepare(self, batch: Batch, epoch: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Image uint8 [N,C,H,W] as the network takes it, mask and border, on the device, augmented."""
        data, model, seed = self.config.data, self.config.model, self.config.train.seed
        arrays = {
            name: torch.from_numpy(values).to(self.device, non_blocking=True)
            for name, values in batch.items()
            if name != "index"
        }
        arrays = augment(arrays, batch["index"], config=self.config.augment, seed=seed, epoch=epoch)
        if data.tile:
            arrays = random_tiles(arrays, batch["index"], data.tile, margin=model.margin, seed=seed, epoch=epoch)
        image = arrays["image"].permute(0, 3, 1, 2)
        return image if data.tile else mirror_margin(image, model.margin), arrays["mask"], arrays.get("border")

    def step(self, parts: Iterable[tuple[Batch, MicroBatch]], count: int, epoch: int) -> Tensor:
        """One optimizer step over `count` parts. Returns this rank's part of the batch's mean loss."""
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for number, (batch, part) in enumerate(parts, start=1):
            image, mask, border = self.prepare(batch, epoch)
            # Ranks exchange gradients once a step, with the last part's.
            waits = isinstance(self.model, DistributedDataParallel) and number < count
            with self.model.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
                with autocast(self.device, self.config.train.precision):
                    logits = self.forward(image)
                loss = self.loss(logits, mask, border).mean() * part.share
                self.scaler.scale(loss).backward()
            total += loss.detach()
        if self.config.train.clip_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters(), self.config.train.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update_parameters(self.network)
        return total


def train_epoch(
    training: Training,
    batches: Iterator[Batch],
    plan: Sequence[Step],
    *,
    epoch: int,
    factor: float,
    on_step: Callable[[int, Tensor], None] = lambda _step, _total: None,
) -> float:
    """One pass over the batches, one for each part of each step of the plan. Returns this rank's part of the mean loss:
    summed over ranks it is the mean. `factor`: see `learning_rate_at`. `on_step`: gets the number of steps done and the
    sum of this rank's losses."""
    training.model.train()
    fit = training.config.train
    total = torch.zeros((), dtype=torch.float64, device=training.device)
    for number, step in enumerate(plan):
        rate = learning_rate_at(fit, (epoch - 1 + number / len(plan)) / fit.epochs, factor)
        for group in training.optimizer.param_groups:
            group["lr"] = rate * group.get("scale", 1.0)
        total += training.step(((next(batches), part) for part in step), len(step), epoch)
        on_step(number + 1, total)
    return float(total) / len(plan) / world_size()


@dataclass(frozen=True, slots=True)
class EpochProgress:
    """Where an epoch stands."""

    epoch: int
    step: int
    steps: int
    loss: float
    """Mean of the epoch's steps so far, of this rank's images."""
    images_per_second: float
    """Of all ranks."""


class _Pulse:
    """Tells `report` once in `PULSE_SECONDS` how far the epoch is: reading the loss makes a GPU wait."""

    def __init__(self, report: Callable[[EpochProgress], None], epoch: int, steps: int, images: int) -> None:
        self.report, self.epoch, self.steps, self.images = report, epoch, steps, images
        self.started = self.last = time.perf_counter()

    def __call__(self, step: int, total: Tensor) -> None:
        now = time.perf_counter()
        if now - self.last >= PULSE_SECONDS:
            self.last = now
            speed = self.images * step / self.steps / (now - self.started)
            self.report(EpochProgress(self.epoch, step, self.steps, float(total) / step, speed))


def prepare(config: TrainConfig, device: torch.device, *, resumes: bool = False) -> Training:
    """A fresh training: network, optimizer and the rest, for this process alone.

    `resumes`: weights come later, so those of `train.init` are not needed, nor those that libraries download.
    """
    fit_config = config.train
    check_precision(fit_config.precision, device.type)
    torch.manual_seed(fit_config.seed)
    elsewhere = resumes or fit_config.init is not None
    network = build(dataclasses.replace(config.model, pretrained=False) if elsewhere else config.model)
    if fit_config.init is not None and not resumes:
        checkpoint.start_from(fit_config.init, network)
    network = network.to(device)
    network.checkpoint_activations = fit_config.checkpoint_activations
    if fit_config.channels_last:
        network = network.to(memory_format=torch.channels_last)
    return Training(
        network=network,
        model=network,
        forward=network,
        optimizer=build_optimizer(fit_config, network),
        loss=losses.build(fit_config, config.model.num_classes),
        scaler=torch.amp.GradScaler(device.type, enabled=fit_config.precision == "fp16"),
        ema=average_of(network, fit_config.ema) if fit_config.ema else None,
        config=config,
        device=device,
    )


def fit(
    config: TrainConfig,
    train_rows: Rows,
    val_rows: Rows,
    out: str,
    *,
    device: torch.device,
    report: Report = lambda _line: None,
    on_step: Callable[[EpochProgress], None] = lambda _progress: None,
) -> None:
    """Trains from the run's last finished epoch, or from the start, and writes the run directory.

    The same in one process and in each of many: with an initialised torch.distributed group, rank 0 writes, and tells
    `on_step` every other second where it stands.
    """
    rank, world = (dist.get_rank(), world_size()) if dist.is_initialized() else (0, 1)
    fit_config = config.train
    if device.type == "cpu":
        keep_freed_memory(of_any_size=True)
    last = storage.join(out, LAST)
    training = prepare(config, device, resumes=checkpoint.has_state(last))
    state = checkpoint.load_state(
        last, training.network, training.optimizer, training.scaler, training.ema
    ) or TrainingState(0, -1.0, config.to_yaml())
    history = [line for line in read_metrics(out) if line["epoch"] <= state.epoch]
    if world > 1:
        training.model = training.forward = over_ranks(training.network, device)
    if _compiles(config, len(train_rows), world, device):
        training.forward = compiling.Compiled(training.model)

    for epoch in range(state.epoch + 1, fit_config.epochs + 1):
        val_dices = [line["val_dice"] for line in history]
        if fit_config.patience and epochs_without_progress(val_dices) >= fit_config.patience:
            break
        started = time.perf_counter()
        # Dropout's draws: of this epoch and rank only, so that a resumed run draws what an unstopped one would.
        torch.manual_seed(int(np.random.SeedSequence([fit_config.seed, epoch, rank]).generate_state(1)[0]))
        plan = batch_plan(
            len(train_rows),
            fit_config.batch_size,
            seed=fit_config.seed,
            epoch=epoch,
            rank=rank,
            world=world,
            accumulate=fit_config.accumulate,
        )
        batches = Waiting(prefetched(train_rows.batches([part.indices for step in plan for part in step])))
        factor = plateau_factor(fit_config, val_dices)
        pulse = _Pulse(on_step if rank == 0 else lambda _progress: None, epoch, len(plan), len(train_rows))
        train_loss = torch.tensor(
            [train_epoch(training, batches, plan, epoch=epoch, factor=factor, on_step=pulse)], dtype=torch.float64
        )
        sum_over_ranks(train_loss, device)
        if not math.isfinite(train_loss):
            raise UserError(f"the loss became {float(train_loss)} in epoch {epoch}: lower --lr, or --precision fp32")
        for model in training.networks:
            average_buffers(model, device)
        train_seconds = time.perf_counter() - started
        val_plan = _in_batches(np.arange(len(val_rows))[rank::world], max(1, fit_config.batch_size // world))
        scores = validate(training.scored, val_rows.batches(val_plan), training.loss, config, device)
        # Rounded as it will be read again, so that a resumed run decides as an unstopped one.
        line = rounded(
            {
                "epoch": epoch,
                "train_loss": float(train_loss),
                **scores,
                "learning_rate": training.optimizer.param_groups[-1]["lr"],
                "workers": world,
                "images_per_second": len(train_rows) / train_seconds,
                "train_seconds": train_seconds,
                "wait_seconds": batches.seconds,
                "seconds": time.perf_counter() - started,
            }
        )
        history.append(line)
        better = line["val_dice"] > state.best
        state = TrainingState(epoch, max(state.best, line["val_dice"]), config.to_yaml())
        if rank == 0:
            # The state comes last: a stop before it repeats the epoch, and writes the same again.
            if better:
                checkpoint.save_model(storage.join(out, MODEL), training.scored, config, line)
            write_metrics(out, history)
            checkpoint.save_state(last, state, training.network, training.optimizer, training.scaler, training.ema)
        report(line)


def _compiles(config: TrainConfig, rows: int, world: int, device: torch.device) -> bool:
    """Whether the network is compiled for training."""
    if config.compute.compile is not None:
        return config.compute.compile
    fit_config = config.train
    height, width = (config.data.tile,) * 2 if config.data.tile else config.data.size_hw
    # The backward pass computes the gradients of inputs and of weights, each as much as the forward pass.
    operations = 3 * compiling.floating_point_operations(config.model, (height, width)) * rows * fit_config.epochs
    plan = batch_plan(rows, fit_config.batch_size, seed=0, epoch=1, world=world, accumulate=fit_config.accumulate)
    sizes = len({len(part.indices) for step in plan for part in step})
    bf16 = in_bf16(device, fit_config.precision)
    return compiling.pays(operations / world, device, bf16=bf16, sizes=sizes)


def _in_batches(indices: np.ndarray, size: int) -> list[np.ndarray]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]
