"""Adapts a model to images unlike those of its training, without masks (`--adapt`).

The statistics of some of the images are blended into the batch norms. The result is a model directory of its own,
written before the first mask: a stopped run goes on with it, and other commands take it, too.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
import torch

from unet_ray.config import UserError
from unet_ray.data import storage
from unet_ray.data.imaging import ImageError, Source
from unet_ray.inference.pipeline import Pipeline
from unet_ray.models import blend_norms, checkpoint

log = logging.getLogger("unet_ray")

FOLDER = "adapted"
"""The adapted model, below the output folder of a prediction."""
SAMPLE = 64
"""The most images whose statistics are blended in."""
STRENGTH = 0.5
"""Share of the images' statistics; the rest is the model's own."""
AT_ONCE = 8


def adapted(
    pipeline: Pipeline, images: Iterable[Source | str], location: str, unlike: tuple[str, ...] | None
) -> Pipeline:
    """Returns the pipeline with a model that is adapted to some images, `SAMPLE` at most. If `location` holds one, it
    takes that; else it writes the model there.

    `images`: encoded, or the reason why one can't be read. `unlike`: in what they look unlike those of the training,
    None if that is not known. If they look like those, the model stays as it is, since adapted it scores lower on them.
    Raises UserError if none can be read, or if the model has no batch norms.
    """
    if not storage.exists(storage.join(location, checkpoint.CARD)):
        if unlike == ():
            log.warning("--adapt: the images look like those of the training, so the model stays as it is")
        _write(pipeline, images, location, STRENGTH if unlike != () else 0.0)
    return pipeline.of_model(location)


def _write(pipeline: Pipeline, images: Iterable[Source | str], location: str, strength: float) -> None:
    network, card = checkpoint.load_model(pipeline.model, allow_code=pipeline.options.allow_code)
    if not blend_norms.batch_norms(network):
        raise UserError(
            f"--adapt blends the statistics of batch norms, and {storage.without_secrets(pipeline.model)} has none "
            f"(model.norm={card.model.norm}): leave --adapt out"
        )
    gpu = torch.cuda.is_available() and pipeline.options.device != "cpu"
    device = torch.device("cuda" if gpu else "cpu")
    network = network.to(device)
    batches = _batches(pipeline, images)
    blend_norms.blend(network, (torch.from_numpy(batch).to(device) for batch in batches), strength)
    checkpoint.save_copy(location, pipeline.model, network.cpu())


def _batches(pipeline: Pipeline, images: Iterable[Source | str]) -> Iterator[np.ndarray]:
    """Yields images as the network gets them, uint8 [N,C,H,W]. Raises UserError if none can be read."""
    inputs, reason = [], "there is none"
    for image in islice(images, SAMPLE):
        try:
            inputs.append(pipeline.network_input(image))
        except (ImageError, OSError) as error:
            reason = str(error)
    if not inputs:
        raise UserError(f"--adapt: none of the sampled images can be read: {reason}")
    for start in range(0, len(inputs), AT_ONCE):
        yield np.concatenate(inputs[start : start + AT_ONCE]).transpose(0, 3, 1, 2).copy()
