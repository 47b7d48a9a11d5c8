"""Parts of the user's own (`custom_parts`): applies the augmentation, and tries all of them before the first epoch.

Legend: N images, C channels, K classes (1: a single logit), H, W pixels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unet_ray import custom_parts
from unet_ray.config import IGNORE, TrainConfig, UserError
from unet_ray.data import masks
from unet_ray.models import build
from unet_ray.training import losses
from unet_ray.training.augment import Arrays

STREAM = 1
"""Keeps the random numbers of a custom augmentation apart from those of the others."""
SHORTEST = 64
"""Least side, in pixels, of the images on which a network is tried."""


def augmented(arrays: Arrays, indices: Iterable[int], config: TrainConfig, epoch: int) -> Arrays:
    """Returns the arrays of a batch after `augment.custom`; see `augment.augment`. Raises UserError if it fails."""
    name = config.augment.custom
    if name is None:
        return arrays
    function = custom_parts.load({}, name, "image", "mask", "generator")
    device, images, found = arrays["image"].device, [], []
    for index, image, mask in zip(indices, arrays["image"].cpu().numpy(), arrays["mask"].cpu().numpy(), strict=True):
        generator = np.random.default_rng([config.train.seed, epoch, int(index), STREAM])
        changed = function(image.copy(), mask.copy(), generator)  # `setup.explained_errors` explains its exceptions
        _check_changed(name, changed, image, mask, max(2, config.model.num_classes))
        images.append(changed[0])
        found.append(changed[1])
    arrays = {**arrays, "image": _stacked(images, device), "mask": _stacked(found, device)}
    if "border" in arrays:
        borders = [masks.border_map(mask, config.train.border_sigma) for mask in found]
        arrays["border"] = _stacked(borders, device)
    return arrays


def _stacked(arrays: list[np.ndarray], device: torch.device) -> Tensor:
    return torch.from_numpy(np.stack(arrays)).to(device)


def _check_changed(name: str, changed: Any, image: np.ndarray, mask: np.ndarray, classes: int) -> None:
    """Raises UserError unless an augmentation has returned an image and a mask like those it got."""
    if not isinstance(changed, tuple) or len(changed) != 2:
        raise UserError(f"{name} returns {type(changed).__name__}: a tuple of image and mask is needed")
    for what, new, old in zip(("image", "mask"), changed, (image, mask), strict=True):
        kind = getattr(new, "dtype", type(new).__name__), list(getattr(new, "shape", ()))
        if kind != (old.dtype, list(old.shape)) or not isinstance(new, np.ndarray):
            raise UserError(f"{name} returns as {what} {kind[0]} {kind[1]}: {old.dtype} {list(old.shape)} is needed")
    wrong = changed[1][(changed[1] >= classes) & (changed[1] != IGNORE)]
    if len(wrong):
        raise UserError(f"{name} returns a mask with {wrong[0]}: class ids below {classes}, or {IGNORE}, are needed")


def check(config: TrainConfig) -> None:
    """Tries the parts of the user's own on small random data. Raises UserError for those that fail."""
    names = custom_parts.names_in(config)
    if not names:
        return
    custom_parts.permit(*names)
    with torch.random.fork_rng([]), custom_parts.explained(*names):
        torch.manual_seed(config.train.seed)
        if config.model.name in names:
            _check_network(config)
        _check_loss(config)
        _check_augmentation(config)


def _check_network(config: TrainConfig) -> None:
    """Trains the network on two images of noise, not square, for one step."""
    network = build(config.model).train()
    height, width = (network.step * max(least, math.ceil(SHORTEST / network.step)) for least in (2, 3))
    width += network.step  # never as long as the height
    images = torch.randint(256, (2, config.model.in_channels, height, width), dtype=torch.uint8)
    logits = network(images)
    wanted = [2, config.model.num_classes, height, width]
    if not isinstance(logits, Tensor) or list(logits.shape) != wanted:
        shape = list(getattr(logits, "shape", ())) or type(logits).__name__
        raise UserError(f"{config.model.name} returns {shape} for images of {list(images.shape)}: {wanted} is needed")
    logits.sum().backward()
    unused = [name for name, weight in network.named_parameters() if weight.requires_grad and weight.grad is None]
    if unused and config.compute.most_workers > 1:
        raise UserError(
            f"{config.model.name}: no output depends on {', '.join(unused[:3])}: take them out, since several workers "
            "wait for the gradients of all weights"
        )


def _check_loss(config: TrainConfig) -> None:
    generator = np.random.default_rng(config.train.seed)
    classes = config.model.num_classes
    logits = torch.from_numpy(generator.normal(size=(2, classes, 16, 24)).astype(np.float32)).requires_grad_()
    mask = generator.integers(0, max(2, classes), (2, 16, 24)).astype(np.uint8)
    mask[:, :2] = IGNORE
    # Weights by frequency are of the masks, which are read later.
    weights = "none" if config.train.class_weights == "inverse" else config.train.class_weights
    settings = dataclasses.replace(config.train, class_weights=weights)
    loss = losses.build(settings, classes)(logits, torch.from_numpy(mask))
    if not loss.requires_grad:
        raise UserError(f"train.loss={config.train.loss} has no gradient: compute it from pixels.logits, with torch")
    if not torch.isfinite(loss).all():
        raise UserError(f"train.loss={config.train.loss} is {loss.tolist()} on random logits and masks")


def _check_augmentation(config: TrainConfig) -> None:
    generator = np.random.default_rng(config.train.seed)
    height, width = config.data.size_hw
    images = generator.integers(0, 256, (2, height, width, config.model.in_channels)).astype(np.uint8)
    found = generator.integers(0, max(2, config.model.num_classes), (2, height, width)).astype(np.uint8)
    augmented({"image": torch.from_numpy(images), "mask": torch.from_numpy(found)}, range(2), config, 1)
