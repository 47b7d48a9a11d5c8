"""The training loop: any rows, any number of processes, no Ray.

Legend: N images of a batch, M images of a set, K classes. *World* is the number of training processes, *rank* is
this one's place among them.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from unet_ray import checkpoint, losses, metrics, storage
from unet_ray.augment import augment
from unet_ray.checkpoint import TrainingState
from unet_ray.config import FitConfig, TrainConfig, UserError
from unet_ray.models import UNet, build, mirror_margin
from unet_ray.muon import Muon
from unet_ray.rows import Batch, Rows

METRICS, CONFIG, MODEL, LAST = "metrics.jsonl", "config.yaml", "model", "last"
WARM_UP = 0.15
"""Share of a one-cycle schedule that goes up."""

MUON_SCALE = 7.0
"""Orthogonal steps are this much larger than AdamW's: 0.02, the source's, where those are 0.003."""

Report = Callable[[dict[str, Any]], None]
"""Called on every rank after each epoch with that epoch's line of metrics.jsonl."""


class Step(NamedTuple):
    """One optimizer step of one rank."""

    indices: np.ndarray
    """Row numbers of this rank's part of the batch; never empty."""
    share: float
    """What this rank's mean loss is multiplied by, so that the mean over ranks is the mean over the whole batch."""


def batch_plan(count: int, batch_size: int, *, seed: int, epoch: int, rank: int = 0, world: int = 1) -> list[Step]:
    """This rank's steps of an epoch over `count` rows: all rows in an order drawn from (seed, epoch), in batches of
    equal size give or take one row, each dealt out to the ranks.

    Batches do not depend on `world`, and every rank takes the same number of steps.
    """
    order = np.random.default_rng([seed, epoch]).permutation(count)
    steps = []
    for batch in np.array_split(order, math.ceil(count / batch_size)):
        own = batch[rank::world]
        # A rank that a small batch leaves with nothing takes a row for nothing: the gradients' all-reduce needs it.
        steps.append(Step(own if len(own) else batch[:1], world * len(own) / len(batch)))
    return steps


def learning_rate_at(config: FitConfig, progress: float) -> float:
    """Step size at `progress`, the share of all steps that are done: 0 to 1."""
    peak = config.learning_rate
    if config.schedule == "constant":
        return peak
    if config.schedule == "cosine":
        return peak * (1 + math.cos(math.pi * progress)) / 2
    if progress < WARM_UP:
        # From a twenty-fifth of the peak, as in torch's OneCycleLR.
        return peak * (1 / 25 + (1 - 1 / 25) * progress / WARM_UP)
    return peak * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP))) / 2


def build_optimizer(config: FitConfig, model: UNet) -> torch.optim.Optimizer:
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
        return torch.optim.SGD(groups, lr=rate, momentum=0.99, fused=True)
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(groups, lr=rate)
    # The last layer makes numbers, not features: its directions are not alike (Jordan et al.).
    hidden = [p for p in weights if p is not model.head.weight]
    return Muon(
        [
            {"params": hidden, "weight_decay": config.weight_decay, "scale": MUON_SCALE},
            {"params": [model.head.weight], "weight_decay": 0.0, "orthogonal": False},
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


def bf16_is_fast(device: torch.device) -> bool:
    """Whether the device multiplies in bfloat16, rather than emulating it."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    able = torch.cpu.get_capabilities()
    return bool(able.get("amx_bf16") or able.get("avx512_bf16") or able.get("sve_bf16") or able.get("arm_bf16"))


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """The arithmetic of a forward pass: `auto`, `fp32` or `bf16`."""
    use = precision == "bf16" or (precision == "auto" and bf16_is_fast(device))
    return torch.autocast(device.type, torch.bfloat16) if use else contextlib.nullcontext()


def keep_freed_memory() -> None:
    """Tells glibc to keep the memory of freed activations instead of handing it back to the system at every step.

    Taking it anew means a page fault for every 4 KiB: on two CPU cores training was 14 % faster without. Elsewhere
    (musl, macOS, Windows) it does nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD, at its largest: blocks up to here come from the heap
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    mallopt(-2, 256 * 2**20)  # M_TOP_PAD: the heap grows by this much at a time


def to_network(image_NHWC: Tensor, device: torch.device, margin: int) -> Tensor:
    """A batch as the network takes it: uint8 [N,C,H,W] on the device, with the mirrored margin of unpadded models.

    The permuted NHWC memory is channels_last already, so nothing is copied to get there.
    """
    return mirror_margin(image_NHWC.to(device, non_blocking=True).permute(0, 3, 1, 2), margin)


def decide(logits_NKHW: Tensor, threshold: float = 0.5) -> Tensor:
    """Class ids, uint8 [N,H,W]."""
    if logits_NKHW.shape[1] == 1:
        return (logits_NKHW[:, 0] > math.log(threshold / (1 - threshold))).to(torch.uint8)
    return logits_NKHW.argmax(dim=1).to(torch.uint8)


def train_epoch(
    model: nn.Module,
    batches: Iterable[tuple[Batch, Step]],
    optimizer: torch.optim.Optimizer,
    loss: losses.Loss,
    config: TrainConfig,
    *,
    epoch: int,
    steps: int,
    device: torch.device,
) -> float:
    """One pass over the batches. Returns this rank's part of the mean loss: summed over ranks it is the mean."""
    model.train()
    total = torch.zeros((), dtype=torch.float64, device=device)
    fit = config.train
    for number, (batch, step) in enumerate(batches):
        rate = learning_rate_at(fit, (epoch - 1 + number / steps) / fit.epochs)
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("scale", 1.0)
        image, mask = augment(
            torch.from_numpy(batch["image"]),
            torch.from_numpy(batch["mask"]),
            batch["index"],
            config=config.augment,
            seed=fit.seed,
            epoch=epoch,
        )
        mask = mask.to(device, non_blocking=True)
        with autocast(device, fit.precision):
            logits = model(to_network(image, device, config.model.margin))
        batch_loss = loss(logits, mask).mean() * step.share
        optimizer.zero_grad(set_to_none=True)
        batch_loss.backward()
        optimizer.step()
        total += batch_loss.detach()
    return float(total) / steps / world_size()


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
        mask = torch.from_numpy(batch["mask"]).to(device)
        with autocast(device, config.train.precision):
            logits = model(to_network(torch.from_numpy(batch["image"]), device, config.model.margin)).float()
        loss_N = loss(logits, mask)
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


def fit(
    config: TrainConfig, train_rows: Rows, val_rows: Rows, out: str, *, device: torch.device, report: Report
) -> None:
    """Trains from the run's last finished epoch, or from the start, and writes the run directory.

    The same in one process and in each of many: with an initialised torch.distributed group, rank 0 writes.
    """
    rank, world = (dist.get_rank(), world_size()) if dist.is_initialized() else (0, 1)
    fit_config = config.train
    if device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(fit_config.seed)
    network = build(config.model).to(device)
    if fit_config.channels_last:
        network = network.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(fit_config, network)
    loss = losses.build(fit_config.loss, config.model.num_classes)
    last = storage.join(out, LAST)
    state = checkpoint.load_state(last, network, optimizer) or TrainingState(0, -1.0, config.to_yaml())
    history = [line for line in read_metrics(out) if line["epoch"] <= state.epoch]

    model: nn.Module = network
    if world > 1:
        if device.type == "cuda":
            # Normalises over the whole batch, as one worker would. There is no such layer for CPUs.
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        model = nn.parallel.DistributedDataParallel(
            network, device_ids=[device] if device.type == "cuda" else None, broadcast_buffers=False
        )

    for epoch in range(state.epoch + 1, fit_config.epochs + 1):
        started = time.perf_counter()
        # Dropout's draws: of this epoch and rank only, so that a resumed run draws what an unstopped one would.
        torch.manual_seed(int(np.random.SeedSequence([fit_config.seed, epoch, rank]).generate_state(1)[0]))
        plan = batch_plan(
            len(train_rows), fit_config.batch_size, seed=fit_config.seed, epoch=epoch, rank=rank, world=world
        )
        batches = zip(train_rows.batches([step.indices for step in plan]), plan, strict=True)
        train_loss = torch.tensor(
            [train_epoch(model, batches, optimizer, loss, config, epoch=epoch, steps=len(plan), device=device)],
            dtype=torch.float64,
        )
        sum_over_ranks(train_loss, device)
        if not math.isfinite(train_loss):
            raise UserError(f"the loss became {float(train_loss)} in epoch {epoch}: lower --lr, or --precision fp32")
        average_buffers(network, device)
        train_seconds = time.perf_counter() - started
        val_plan = _in_batches(np.arange(len(val_rows))[rank::world], max(1, fit_config.batch_size // world))
        scores = evaluate(network, val_rows.batches(val_plan), loss, config, device)
        line = {
            "epoch": epoch,
            "train_loss": float(train_loss),
            **scores,
            "learning_rate": optimizer.param_groups[-1]["lr"],
            "images_per_second": len(train_rows) / train_seconds,
            "train_seconds": train_seconds,
            "seconds": time.perf_counter() - started,
        }
        history.append(line)
        better = scores["val_dice"] > state.best
        state = TrainingState(epoch, max(state.best, scores["val_dice"]), config.to_yaml())
        if rank == 0:
            # The state comes last: a stop before it repeats the epoch, and writes the same again.
            if better:
                checkpoint.save_model(storage.join(out, MODEL), network, config.model, config.data, line)
            write_metrics(out, history)
            checkpoint.save_state(last, state, network, optimizer)
        report(line)


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
    text = "".join(json.dumps(_rounded(line)) + "\n" for line in history)
    storage.write_bytes(storage.join(out, METRICS), text.encode(), durable=True)


def _rounded(line: dict[str, Any]) -> dict[str, Any]:
    return {key: float(f"{value:.8g}") if isinstance(value, float) else value for key, value in line.items()}


def result_of(out: str) -> TrainResult:
    """The result of a run directory."""
    history = read_metrics(out)
    best = max(history, key=lambda line: line["val_dice"])
    return TrainResult(out=out, epochs=len(history), best=best, history=history)
