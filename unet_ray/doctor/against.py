"""Compares images with those that a model was trained on."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from unet_ray.config import UserError
from unet_ray.data import imaging, storage
from unet_ray.data.imaging import ImageError
from unet_ray.data.inputs import ImageFile, evenly
from unet_ray.data.looks import SAMPLE, differences, looks_of
from unet_ray.doctor.report import Finding, warning
from unet_ray.models import checkpoint


def unlike(images: Sequence[ImageFile], model: str) -> list[Finding]:
    """Returns a warning if images look unlike those of a training. Raises UserError if it is not known how those
    look."""
    location = checkpoint.model_directory(storage.absolute(model))
    card, trained_on = checkpoint.read_card(location), checkpoint.read_looks(location)
    if not trained_on:
        raise UserError(
            f"--against {model}: it has no {checkpoint.LOOKS}, since an earlier version trained it: train it again, or "
            "look at some masks of `unet-ray predict`"
        )
    sample = evenly(images, SAMPLE)
    found = differences(trained_on, looks_of(map(_encoded, sample), card.model.in_channels, card.value_range))
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
    except (ImageError, OSError) as error:
        return str(error)
