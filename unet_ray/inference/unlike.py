"""Says when images look unlike those that a model was trained on."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from unet_ray.data import storage
from unet_ray.data.imaging import Source
from unet_ray.data.looks import differences, numbers_of_images
from unet_ray.inference.pipeline import Pipeline
from unet_ray.models import checkpoint

log = logging.getLogger("unet_ray")


def say_if_unlike(images: Iterable[Source | str], pipeline: Pipeline) -> tuple[str, ...] | None:
    """Logs a warning if images look unlike those of the training. Returns in what they differ; None if that is not
    known.

    `images`: encoded, or the reason why one can't be read. With tiles it does not look, since images may then be too
    large to be decoded for that.
    """
    trained_on = {} if pipeline.options.tile else checkpoint.read_looks(pipeline.model)
    reader = pipeline.reader()
    new = numbers_of_images(images, reader.channels, reader.value_range, reader.max_pixels) if trained_on else []
    if not new:
        return None
    found = differences(trained_on, new)
    if found:
        log.warning(
            "these images look unlike those that %s was trained on: %s. Look at some masks before you trust them%s",
            storage.without_secrets(pipeline.model),
            ", ".join(found),
            "" if pipeline.options.adapt else "; --adapt may help",
        )
    return tuple(found)
