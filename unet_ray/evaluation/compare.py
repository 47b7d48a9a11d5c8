"""The stage of evaluation that compares masks with the ground truth."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from unet_ray import metrics
from unet_ray.config import IGNORE, Cleanup
from unet_ray.data import imaging, masks, storage
from unet_ray.data.chunks import Chunk, objects
from unet_ray.data.imaging import ImageError
from unet_ray.inference.stages import Prediction
from unet_ray.models.checkpoint import ModelCard


@dataclass(frozen=True, slots=True)
class Compare:
    """Masks and the true ones at `mask_path` -> `counts` int64 [N,V,K*3], `valid` pixels int64 [N] and `surface`
    float64 [N,K*3] (`metrics.surface_scores`), at the mask's own size. V: as it is, then each of `cleanups`."""

    card: ModelCard
    tolerance: float
    """Of the surface Dice, pixels."""
    cleanups: tuple[Cleanup, ...] = ()

    def __call__(self, chunk: Chunk, predictions: Iterator[Prediction]) -> Chunk:
        count, classes = len(chunk["path"]), self.card.model.num_classes
        counts = np.zeros((count, 1 + len(self.cleanups), classes * 3), np.int64)
        valid = np.zeros(count, np.int64)
        surface = np.zeros((count, classes * len(metrics.SURFACE)))
        errors = [""] * count
        for row, prediction in enumerate(predictions):
            if isinstance(prediction, str):
                errors[row] = prediction
                continue
            path = os.fsdecode(chunk["mask_path"][row])
            size = prediction.mask.shape
            try:
                truth, own_size = imaging.decode_mask(storage.read_bytes(path), self.card.data, None)
            except (ImageError, OSError) as error:
                errors[row] = f"mask {path}: {error}"
                continue
            if own_size != size:
                errors[row] = f"mask {path}: {own_size[1]}x{own_size[0]} pixels, the image {size[1]}x{size[0]}"
                continue
            versions = [prediction.mask, *(masks.clean(prediction.mask, cleanup) for cleanup in self.cleanups)]
            for number, predicted in enumerate(versions):
                pair = torch.from_numpy(predicted)[None], torch.from_numpy(truth)[None]
                counts[row, number] = metrics.count(*pair, classes).numpy().reshape(-1)
            valid[row] = (truth != IGNORE).sum()
            surface[row] = metrics.surface_scores(prediction.mask, truth, classes, self.tolerance).reshape(-1)
        return {
            "path": chunk["path"],
            "error": objects(errors),
            "counts": counts,
            "valid": valid,
            "surface": surface,
        }
