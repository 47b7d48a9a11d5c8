"""The training loop: any rows, any number of processes, no Ray.

Legend: N images of a batch, M images of a set, K classes. *World* is the number of training processes, *rank* is
this one's place among them.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import math
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from unet_ray import checkpoint, compiling, losses, metrics, storage
from unet_ray.augment import augment
from unet_ray.checkpoint import TrainingState
from unet_ray.config import DataConfig, FitConfig, ModelConfig, TrainConfig, UserError
from unet_ray.models import SegmentationModel, build
from unet_ray.muon import Muon
from unet_ray.rows import Batch, Rows, Waiting, prefetched
from unet_ray.tiles import by_tiles, mirror_margin, random_tiles

METRICS, CONFIG, MODEL, LAST = "metrics.jsonl", "config.yaml", "model", "last"
WARM_UP = 0.15
"""Share of a one-cycle schedule that goes up."""
POLY_POWER = 0.9
PULSE_SECONDS = 2.0

MUON_SCALE = 7.0
"""Orthogonal steps are this much larger than AdamW's: 0.02, the source's, where those are 0.003."""

Report = Callable[[dict[str, Any]], None]
"""Called on every rank after each epoch with that epoch's line of metrics.jsonl."""


class Part(NamedTuple):
    """What one rank passes through the network at once: its part of a batch, or a part of that."""

    indices: np.ndarray
    """Row numbers; never empty."""
    share: float
    """What the mean loss of these rows is multiplied by, so that the sum over a step's parts and the mean over ranks is
    the mean over the whole batch."""


Step = list[Part]
"""One optimizer step of one rank."""


def batch_plan(
    count: int, batch_size: int, *, seed: int, epoch: int, rank: int = 0, world: int = 1, accumulate: int = 1
) -> list[Step]:
    """This rank's steps of an epoch over `count` rows: all rows in an order drawn from (seed, epoch), in batches of
    equal size give or take one row, each dealt out to the ranks and there cut into at most `accumulate` parts.

    Batches do not depend on `world`, and every rank takes the same number of steps.
    """
    order = np.random.default_rng([seed, epoch]).permutation(count)
    steps = []
    for batch in np.array_split(order, math.ceil(count / batch_size)):
        own = batch[rank::world]
        # A rank that a small batch leaves with nothing takes a row for nothing: the gradients' all-reduce needs it.
        parts = np.array_split(own, min(accumulate, len(own))) if len(own) else [batch[:1]]
        steps.append([Part(part, world * len(part) / len(batch) if len(own) else 0.0) for part in parts])
    return steps


def learning_rate_at(config: FitConfig, progress: float, factor: float = 1.0) -> float:
    """Step size at `progress`, the share of all steps that are done: 0 to 1. `factor`: see `plateau_factor`."""
    peak = config.learning_rate * factor
    warm_up = WARM_UP if config.schedule == "one_cycle" else config.warm_up
    if progress < warm_up:
        # From a twenty-fifth of the peak, as in torch's OneCycleLR.
        return peak * (1 / 25 + (1 - 1 / 25) * progress / warm_up)
    if config.schedule in ("constant", "plateau"):
        return peak
    rest = (progress - warm_up) / (1 - warm_up)
    if config.schedule == "poly":
        return peak * (1 - rest) ** POLY_POWER
    return peak * (1 + math.cos(math.pi * rest)) / 2


def epochs_without_progress(val_dices: Sequence[float]) -> int:
    """How many epochs have passed since the best one."""
    return len(val_dices) - 1 - int(np.argmax(val_dices)) if val_dices else 0


def plateau_factor(config: FitConfig, val_dices: Sequence[float]) -> float:
    """What the schedule `plateau` multiplies the step size by after epochs with these scores: as torch's
    ReduceLROnPlateau counts, `plateau_factor` each time `plateau_patience` epochs and one more brought nothing better.
    """
    if config.schedule != "plateau":
        return 1.0
    factor, best, waited = 1.0, -math.inf, 0
    for dice in val_dices:
        best, waited = (dice, 0) if dice > best else (best, waited + 1)
        if waited > config.plateau_patience:
            factor, waited = factor * config.plateau_factor, 0
    return factor


def build_optimizer(config: FitConfig, model: SegmentationModel) -> torch.optim.Optimizer:
    """The optimizer; weight decay is for weights only (parameters of more than one dimension)."""
    rate = config.learning_rate
    weights = [p for p in model.parameters() if p.ndim > 1]
    others: list[dict[str, Any]] = [{"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0}]
    groups = [{"params": weights, "weight_decay": config.weight_decay}, *others]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=rate, fused=True)
    if config.optimizer == "adam":
        return torch.optim.Adam(groups, lr=rate, fused=True)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=config.momentum, fused=True)
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(groups, lr=rate)
    # The last layer makes numbers, not features: its directions are not alike (Jordan et al.).
    last = {id(p) for p in model.head.parameters()}
    return Muon(
        [
            {
                "params": [p for p in weights if id(p) not in last],
                "weight_decay": config.weight_decay,
                "scale": MUON_SCALE,
            },
            {"params": [p for p in weights if id(p) in last], "weight_decay": 0.0, "orthogonal": False},
            {**others[0], "orthogonal": False},
        ],
        lr=rate,
    )


def device_here(wanted: str, workers: int) -> torch.device:
    """The device of a `--local` command; `auto` is CUDA where torch can use it. Raises UserError."""
    if workers > 1:
        raise UserError(f"--workers {workers} with --local: one process has one worker; drop either")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has none that torch can use: use --device cpu")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def check_gpu() -> None:
    """Raises UserError where torch can't use the GPU that Ray, which counts them without torch, has given."""
    if not torch.cuda.is_available():
        raise UserError(
            f"torch can't use the GPU of {platform.node()}: install it for CUDA, with a driver that fits, or use "
            "--device cpu"
        )


def bf16_is_fast(device: torch.device) -> bool:
    """Whether the device multiplies in bfloat16, rather than emulating it."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    able = torch.cpu.get_capabilities()
    return bool(able.get("amx_bf16") or able.get("avx512_bf16") or able.get("sve_bf16") or able.get("arm_bf16"))


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """The arithmetic of a forward pass: `auto`, `fp32`, `bf16` or (on CUDA) `fp16`."""
    if precision == "fp16":
        return torch.autocast(device.type, torch.float16)
    return torch.autocast(device.type, torch.bfloat16) if in_bf16(device, precision) else contextlib.nullcontext()


def in_bf16(device: torch.device, precision: str) -> bool:
    """Whether `bf16`, or `auto` on a device that is good at it, was asked for."""
    return precision == "bf16" or (precision == "auto" and bf16_is_fast(device))


def check_precision(precision: str, device: str) -> None:
    """Raises UserError for what the device does not do."""
    if precision == "fp16" and device != "cuda":
        raise UserError("--precision fp16 is for CUDA: use bf16 or fp32 on CPUs")
    if precision == "int8" and device != "cpu":
        raise UserError("--precision int8 is for CPUs: add --device cpu, or use bf16")


def keep_freed_memory(*, of_any_size: bool = False) -> None:
    """Tells glibc to keep the memory of freed arrays instead of handing it back to the system.

    Taking it anew means a page fault for every 4 KiB: on two CPU cores decoding and writing was 27 % faster without,
    a training step of U-Net base 64 on four images of 512² 14 %.

    `of_any_size`: blocks over 32 MiB, too, as a network takes at every step; not for what is of another size each time,
    whose gaps would add up. Elsewhere (musl, macOS, Windows) it does nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD, at its largest: blocks up to here come from the heap
    mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks
    mallopt(-2, 256 * 2**20)  # M_TOP_PAD: the heap grows by this much at a time
    if of_any_size:
        mallopt(-4, 0)  # M_MMAP_MAX: all blocks come from the heap


ONE_HEAP = {"MALLOC_ARENA_MAX": "1"}
"""Environment of a process whose network does not run on the main thread, as in Ray's workers: glibc gives other
threads heaps of 64 MiB, and takes larger blocks from the system whatever `keep_freed_memory` says."""


def run_network(
    model: Callable[[Tensor], Tensor], image_NHWC: Tensor, model_config: ModelConfig, data: DataConfig
) -> Tensor:
    """Logits [N,K,H,W] of whole images, uint8 [N,H,W,C] on the model's device."""
    # The permuted NHWC memory is channels_last already, so nothing is copied to get there.
    image_NCHW = image_NHWC.permute(0, 3, 1, 2)
    if data.tile and model_config.padding == "valid":
        return by_tiles(model, image_NCHW, data.tile, model_config)
    return model(mirror_margin(image_NCHW, model_config.margin))


def decide(logits_NKHW: Tensor, threshold: float = 0.5) -> Tensor:
    """Class ids, uint8 [N,H,W]."""
    if logits_NKHW.shape[1] == 1:
        return (logits_NKHW[:, 0] > math.log(threshold / (1 - threshold))).to(torch.uint8)
    return logits_NKHW.argmax(dim=1).to(torch.uint8)


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

    def step(self, parts: Iterable[tuple[Batch, Part]], count: int, epoch: int) -> Tensor:
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


def average_of(network: nn.Module, decay: float) -> AveragedModel:
    """The exponential moving average of a network's weights and running statistics.

    Over the first steps the decay is (1 + steps) / (10 + steps), as in TensorFlow's ExponentialMovingAverage.
    """

    @torch.no_grad()
    def update(averages: Any, values: Any, steps: Any) -> None:
        weight = 1 - min(decay, (1 + int(steps)) / (10 + int(steps)))
        for average, value in zip(averages, values, strict=True):
            if average.is_floating_point():
                average.lerp_(value.to(average.dtype), weight)
            else:
                average.copy_(value)

    return AveragedModel(network, multi_avg_fn=update, use_buffers=True)


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
class Progress:
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

    def __init__(self, report: Callable[[Progress], None], epoch: int, steps: int, images: int) -> None:
        self.report, self.epoch, self.steps, self.images = report, epoch, steps, images
        self.started = self.last = time.perf_counter()

    def __call__(self, step: int, total: Tensor) -> None:
        now = time.perf_counter()
        if now - self.last >= PULSE_SECONDS:
            self.last = now
            speed = self.images * step / self.steps / (now - self.started)
            self.report(Progress(self.epoch, step, self.steps, float(total) / step, speed))


@torch.inference_mode()
def evaluate(
    model: nn.Module, batches: Iterable[Batch], loss: losses.Loss, config: TrainConfig, device: torch.device
) -> dict[str, Any]:
    """Scores over the batches of all ranks together, at the size of the rows.

    Each rank brings any number of batches. Counts are summed over ranks and divided once.
    """
    model.eval()
    classes = config.model.num_classes
    counts = torch.zeros(classes, 3, dtype=torch.int64)
    pixels = torch.zeros(1, dtype=torch.int64)
    sums = torch.zeros(5, dtype=torch.float64)  # images, loss, and mean-over-images Dice, IoU, pixel accuracy
    for batch in batches:
        image, mask = (torch.from_numpy(batch[name]).to(device) for name in ("image", "mask"))
        border = torch.from_numpy(batch["border"]).to(device) if "border" in batch else None
        with autocast(device, config.train.precision):
            logits = run_network(model, image, config.model, config.data).float()
        loss_N = loss(logits, mask, border)
        counts_NK3 = metrics.count(decide(logits), mask, classes).cpu()
        pixels_N = (mask != metrics.IGNORE).sum(dim=(1, 2)).cpu()
        ratios = image_ratios(counts_NK3.numpy(), pixels_N.numpy(), config.data.classes)
        counts += counts_NK3.sum(dim=0)
        pixels += pixels_N.sum()
        sums += torch.tensor([len(mask), float(loss_N.double().sum()), *(float(r.sum()) for r in ratios)])
    for tensor in (counts, pixels, sums):
        sum_over_ranks(tensor, device)
    images, *means = sums.tolist()
    total = [float(r) for r in image_ratios(counts.numpy(), pixels.numpy()[0], config.data.classes)]
    names = ("val_loss", "val_dice", "val_iou", "val_pixel_accuracy")
    return {
        **{name: value / max(1, images) for name, value in zip(names, means, strict=True)},
        "val_dice_global": total[0],
        "val_iou_global": total[1],
        "val_images": int(images),
        "val_pixels": int(pixels),
        "val_counts": counts.tolist(),
    }


def image_ratios(
    counts: np.ndarray, pixels: np.ndarray, class_names: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Dice, IoU and pixel accuracy, float64 [...], from counts [...,K,3] and valid pixels [...]."""
    return (
        metrics.image_mean(metrics.dice(counts), class_names),
        metrics.image_mean(metrics.iou(counts), class_names),
        np.nan_to_num(metrics.pixel_accuracy(counts, pixels), nan=1.0),
    )


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(tensor: Tensor, device: torch.device) -> None:
    """Adds a CPU tensor up over all ranks, in place."""
    if world_size() > 1:
        shared = tensor.to(device)
        dist.all_reduce(shared)
        tensor.copy_(shared)


def average_buffers(model: nn.Module, device: torch.device) -> None:
    """Gives every rank the mean of the ranks' running statistics, so that all score and save the same network."""
    for buffer in model.buffers():
        if buffer.is_floating_point() and world_size() > 1:
            sum_over_ranks(buffer, device)
            buffer /= world_size()


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What `train` returns."""

    out: str
    """The run directory."""
    epochs: int
    best: dict[str, Any]
    """The line of metrics.jsonl of the best epoch, whose weights are in `model/`."""
    history: list[dict[str, Any]]
    """All lines of metrics.jsonl."""

    def __repr__(self) -> str:
        out = storage.without_secrets(self.out)
        return (
            f"TrainResult: {self.epochs} epochs, the best is {self.best['epoch']} with validation Dice "
            f"{self.best['val_dice']:.4f}\n"
            f"  model: {storage.join(out, MODEL)}\n"
            f"  next: unet_ray.predict({out!r}, 'FOLDER', 'MASKS'), unet_ray.evaluate({out!r}), "
            f"unet_ray.Segmenter({out!r})(image)"
        )


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
    on_step: Callable[[Progress], None] = lambda _progress: None,
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
        training.model = training.forward = _over_ranks(training.network, device)
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
        scores = evaluate(training.scored, val_rows.batches(val_plan), training.loss, config, device)
        # Rounded as it will be read again, so that a resumed run decides as an unstopped one.
        line = _rounded(
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


def _over_ranks(network: SegmentationModel, device: torch.device) -> DistributedDataParallel:
    on_gpu = device.type == "cuda"
    if on_gpu:
        # Normalises over the whole batch, as one worker would. There is no such layer for CPUs. Converted in place:
        # the outermost module is no norm itself.
        nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return DistributedDataParallel(network, device_ids=[device] if on_gpu else None, broadcast_buffers=False)


def _in_batches(indices: np.ndarray, size: int) -> list[np.ndarray]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def read_metrics(out: str) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; none if there is no such file."""
    path = storage.join(out, METRICS)
    if not storage.exists(path):
        return []
    return [json.loads(line) for line in storage.read_bytes(path).splitlines()]


def write_metrics(out: str, history: Iterable[dict[str, Any]]) -> None:
    """Writes metrics.jsonl anew: whole or absent also in a bucket, where nothing can be appended."""
    text = "".join(json.dumps(line) + "\n" for line in history)
    storage.write_bytes(storage.join(out, METRICS), text.encode(), durable=True)


def _rounded(line: dict[str, Any]) -> dict[str, Any]:
    return {key: float(f"{value:.8g}") if isinstance(value, float) else value for key, value in line.items()}


def result_of(out: str) -> TrainResult:
    """The result of a run directory."""
    history = read_metrics(out)
    best = max(history, key=lambda line: line["val_dice"])
    return TrainResult(out=out, epochs=len(history), best=best, history=history)
