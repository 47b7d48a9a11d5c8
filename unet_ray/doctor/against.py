"""Compares images with those that a model was trained on."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import NamedTuple

from unet_ray.config import MAX_PIXELS, UserError
from unet_ray.data import storage
from unet_ray.data.inputs import ImageFile, evenly
from unet_ray.data.looks import SAMPLE, Looks, differences, numbers_of_images
from unet_ray.doctor.report import Finding, warning
from unet_ray.inference.reader import Reader
from unet_ray.models import checkpoint
from unet_ray.models.checkpoint import ModelCard


class Training(NamedTuple):
    """What is known of a model's training."""

    model: str
    card: ModelCard
    looks: Looks


def training_of(model: str) -> Training:
    """Returns what is known of a model's training. Raises UserError if that is not how its images look."""
    location = checkpoint.model_directory(storage.absolute(model))
    trained_on = checkpoint.read_looks(location)
    if not trained_on:
        raise UserError(
            f"--against {model}: it has no {checkpoint.LOOKS}, since it was imported or an earlier version trained it: "
            "look at some masks of `unet-ray predict` instead"
        )
    return Training(model, checkpoint.read_card(location), trained_on)


def unlike(images: Sequence[ImageFile], training: Training) -> list[Finding]:
    """Returns a warning if images look unlike those of a training."""
    reader = Reader.of(training.card, MAX_PIXELS)
    sample = evenly(images, SAMPLE)
    encoded = reader.encoded_files(image.path for image in sample)
    new = numbers_of_images(encoded, reader.channels, reader.value_range, reader.max_pixels)
    found = differences(training.looks, new)
    if not found:
        return []
    name = shlex.quote(training.model)
    return warning(
        "unlike-the-training",
        f"{len(sample)} images look unlike those that {training.model} was trained on: {', '.join(found)}",
        f"label a few and score them: `unet-ray evaluate {name} --images IMAGES --masks MASKS`. --adapt --against "
        f"{name} beside it says whether --adapt helps, and `unet-ray train --init {name}` learns from them",
    )
