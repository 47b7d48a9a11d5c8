"""A model directory as a callable on a batch of images.

Legend: N images, C channels, K classes (1 for a single logit), H, W the model's own image size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from unet_ray import checkpoint
from unet_ray.engine import autocast, check_precision, keep_freed_memory, run_network

IMAGES_AT_ONCE = {"cpu": 1, "cuda": 8}
"""On a CPU one image at a time keeps the activations in the caches, and was fastest."""


@dataclass(frozen=True, slots=True)
class Segmentation:
    """What the network says of a batch."""

    logits: np.ndarray
    """float16 [N,K,H,W]: half the bytes of float32 on the way to the stage that writes; signs are kept exactly."""
    confidence: np.ndarray
    """float32 [N]: probability of the decided class, mean over the pixels."""


class Segmenter:
    """Loads a model once, then segments batch after batch: uint8 [N,H,W,C] at the model's image size -> Segmentation.

    `threads`: torch threads on a CPU; None leaves torch's own choice. Raises UserError if there is no such model.
    """

    def __init__(
        self, location: str, *, device: str = "cpu", precision: str = "auto", threads: int | None = None
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        check_precision(precision, device)
        if device == "cpu":
            keep_freed_memory()
        self.device, self.precision = torch.device(device), precision
        model, self.card = checkpoint.load_model(location)
        self.model = model.eval().to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.inference_mode()
    def __call__(self, image_NHWC: np.ndarray) -> Segmentation:
        step = IMAGES_AT_ONCE[self.device.type]
        logits, confidence = [], []
        for start in range(0, len(image_NHWC), step):
            # A copy: Ray's batches are read-only views of shared memory, which torch must not be given.
            image = torch.from_numpy(image_NHWC[start : start + step].copy()).to(self.device, non_blocking=True)
            with autocast(self.device, self.precision):
                output = run_network(self.model, image, self.card.model, self.card.data).float()
            if output.shape[1] == 1:
                probability = output.sigmoid()
                decided = torch.maximum(probability, 1 - probability)
            else:
                decided = output.softmax(dim=1).amax(dim=1, keepdim=True)
            logits.append(output.half().cpu().numpy())
            confidence.append(decided.mean(dim=(1, 2, 3)).cpu().numpy())
        return Segmentation(np.concatenate(logits), np.concatenate(confidence))
