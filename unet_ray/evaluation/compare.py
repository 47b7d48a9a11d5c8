"""Compares masks with the ground truth."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from unet_ray import metrics
from unet_ray.config import IGNORE, Cleanup
from unet_ray.data import imaging, mask_files, masks
from unet_ray.data.chunks import Chunk, objects
from unet_ray.data.imaging import ImageError
from unet_ray.inference.segmenter import SegmentedMask
from unet_ray.inference.stages import Prediction
from unet_ray.models.checkpoint import ModelCard


@dataclass(frozen=True, slots=True)
class Compare:
    """Compares masks with the ground truth at `mask_path`, at its own size. It is a `stages.MaskSink`.

    Returns the columns `path`, `error`, `counts` int64 [N,V,K*3], `valid` pixels int64 [N] and `surface` float64
    [N,K*3] (`metrics.surface_scores`). V versions: the mask itself, then the mask after each of `cleanups`.
    """

    card: ModelCard
    tolerance: float
    """Tolerance of the surface Dice in pixels."""
    cleanups: tuple[Cleanup, ...] = ()

    def __call__(self, chunk: Chunk, predictions: Iterator[Prediction]) -> Chunk:
        rows, classes = len(chunk["path"]), self.card.model.num_classes
        counts = np.zeros((rows, 1 + len(self.cleanups), classes * 3), np.int64)
        valid = np.zeros(rows, np.int64)
        surface = np.zeros((rows, classes * len(metrics.SURFACE)))
        errors = [""] * rows
        for row, segmented, ground_truth in self.with_ground_truth(chunk, predictions, errors):
            mask = imaging.resized_ids(segmented.mask, ground_truth.shape)
            counts[row] = self._counts(mask, ground_truth)
            valid[row] = (ground_truth != IGNORE).sum()
            surface[row] = metrics.surface_scores(mask, ground_truth, classes, self.tolerance).reshape(-1)
        return {"path": chunk["path"], "error": objects(errors), "counts": counts, "valid": valid, "surface": surface}

    def with_ground_truth(
        self, chunk: Chunk, predictions: Iterator[Prediction], errors: list[str]
    ) -> Iterator[tuple[int, SegmentedMask, np.ndarray]]:
        """Yields row, segmented image and ground truth, uint8 [H,W]; writes into `errors` why a row has none."""
        for row, prediction in enumerate(predictions):
            if prediction.segmented is None:
                errors[row] = prediction.error
                continue
            size = prediction.segmented.mask.shape
            try:
                ground_truth = self._ground_truth(chunk, row, (size[0], size[1]))
            except (ImageError, OSError) as error:
                errors[row] = f"mask {mask_files.shown(os.fsdecode(chunk['mask_path'][row]))}: {error}"
                continue
            yield row, prediction.segmented, ground_truth

    def _ground_truth(self, chunk: Chunk, row: int, size_hw: tuple[int, int]) -> np.ndarray:
        """Returns the ground truth of a row, uint8 [H,W]. Raises ImageError if its size does not fit the image's
        (`size_hw`), or OSError."""
        data = self.card.data
        encoded = imaging.read_file(os.fsdecode(chunk["path"][row])) if data.mask_turn else None
        mask = mask_files.read(os.fsdecode(chunk["mask_path"][row]))
        ground_truth, own_size = imaging.decode_mask(mask, data, None, encoded)
        if problem := imaging.problem_of_sizes(size_hw, own_size, data):
            raise ImageError(problem)
        return ground_truth

    def _counts(self, mask: np.ndarray, ground_truth: np.ndarray) -> np.ndarray:
        """Returns the counts of each version of the mask, int64 [V,K*3]."""
        versions = [mask, *(masks.clean(mask, cleanup) for cleanup in self.cleanups)]
        classes, expected = self.card.model.num_classes, torch.from_numpy(ground_truth)[None]
        counts = [metrics.count(torch.from_numpy(version)[None], expected, classes) for version in versions]
        return np.stack([count.numpy().reshape(-1) for count in counts])
