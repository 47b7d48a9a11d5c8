"""Scores a network on the validation rows during its training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from unet_ray import metrics
from unet_ray.config import IGNORE, TrainConfig
from unet_ray.data.rows import Batch
from unet_ray.models.device import autocast, decide, run_network
from unet_ray.training import losses
from unet_ray.training.distributed import sum_over_ranks


@torch.inference_mode()
def validate(
    model: nn.Module, batches: Iterable[Batch], loss: losses.Loss, config: TrainConfig, device: torch.device
) -> dict[str, Any]:
    """Returns the `val_` figures of metrics.jsonl, over the batches of all ranks together, at the size of the rows.

    Ranks may have different numbers of batches. Counts are summed over ranks and divided once.
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
        pixels_N = (mask != IGNORE).sum(dim=(1, 2)).cpu()
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
    """Returns Dice, IoU and pixel accuracy, float64 [...], from counts [...,K,3] and valid pixels [...]."""
    return (
        metrics.image_mean(metrics.dice(counts), class_names),
        metrics.image_mean(metrics.iou(counts), class_names),
        np.nan_to_num(metrics.pixel_accuracy(counts, pixels), nan=1.0),
    )
