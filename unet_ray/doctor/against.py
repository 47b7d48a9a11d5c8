"""Compares images with those that a model was trained on."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from unet_ray.config import UserError
from unet_ray.data import imaging, storage
from unet_ray.data.imaging import ImageError
from unet_ray.data.inputs import ImageFile, evenly
from unet_ray.data.looks import SAMPLE, Looks, differences, numbers_of_images
from unet_ray.doctor.report import Finding, warning
from unet_ray.models import checkpoint
from unet_ray.models.checkpoint import ModelCard


def training_of(model: str) -> tuple[ModelCard, Looks]:
    """Returns a model's card, and how the images of its training look. Raises UserError if that is not known."""
    location = checkpoint.model_directory(storage.absolute(model))
    trained_on = checkpoint.read_looks(location)
    if not trained_on:
        raise UserError(
            f"--against {model}: it has no {checkpoint.LOOKS}, since it was imported or an earlier version trained it: "
            "look at some masks of `unet-ray predict` instead"
        )
    return checkpoint.read_card(location), trained_on


def unlike(images: Sequence[ImageFile], model: str, card: ModelCard, trained_on: Looks) -> list[Finding]:
    """Returns a warning if images look unlike those of a training."""
    sample = evenly(images, SAMPLE)
    new = numbers_of_images(map(_encoded, sample), card.model.in_channels, card.value_range)
    found = differences(trained_on, new) if new else []
    if not found:
        return []
    name = shlex.quote(model)
    return warning(
        "unlike-the-training",
        f"{len(sample)} images look unlike those that {model} was trained on: {', '.join(found)}",
        f"label a few and score them: `unet-ray evaluate {name} --images IMAGES --masks MASKS`. --adapt --against "
        f"{name} beside it says whether --adapt helps, and `unet-ray train --init {name}` learns from them",
    )


def _encoded(file: ImageFile) -> bytes | str:
    try:
        return imaging.read_file(file.path)
    except (ImageError, OSError, ValueError) as error:
        return str(error)
