"""Adapts a model to images unlike those of its training, without masks (`--adapt`).

The statistics of some of the images are blended into the batch norms. The result is a model directory of its own,
written before the first mask: a stopped run goes on with it, and other commands take it, too.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from unet_ray.config import UserError
from unet_ray.data import storage
from unet_ray.data.imaging import ImageError, Source
from unet_ray.inference.pipeline import Pipeline
from unet_ray.models import blend_norms, build, checkpoint

log = logging.getLogger("unet_ray")

FOLDER = "adapted"
"""The adapted model, below the output folder of a prediction."""
DECISION = "adapted.json"
"""Says, in that folder, whether the model was adapted. It is written last."""
SAMPLE = 64
"""The most images whose statistics are blended in."""
STRENGTH = 0.5
"""Share of the images' statistics; the rest is the model's own."""
PIXELS_AT_ONCE = 8 * 512**2


def check(pipeline: Pipeline) -> None:
    """Raises UserError if the model has no batch norms."""
    with torch.random.fork_rng([]):
        network = build(dataclasses.replace(pipeline.card.model, pretrained=False))
    if not blend_norms.batch_norms(network):
        raise UserError(
            f"--adapt blends the statistics of batch norms, and {storage.without_secrets(pipeline.model)} has none "
            f"(model.norm={pipeline.card.model.norm}): leave --adapt out"
        )


def adapted(
    pipeline: Pipeline, images: Iterable[Source | str], location: str, unlike: tuple[str, ...] | None
) -> Pipeline:
    """Returns the pipeline with a model that is adapted to some images, `SAMPLE` at most. If `location` says how it was
    decided before, it is done again so; else it writes the model there.

    `images`: encoded, or the reason why one can't be read. `unlike`: in what they look unlike those of the training,
    None if that is not known. The model stays as it is if they look like those, since adapted it scores lower on them,
    and if none can be read.
    """
    place = storage.join(location, DECISION)
    if not storage.exists(place):
        done = unlike != () and _write(pipeline, images, location)
        if not done:
            why = "look like those of the training" if unlike == () else "can't be read, as far as they were tried"
            log.warning("--adapt: the images %s, so the model stays as it is", why)
        decision = {"adapted": done, "strength": STRENGTH, "unlike": unlike}
        storage.write_bytes(place, (json.dumps(decision, indent=2) + "\n").encode(), durable=True)
    return pipeline.of_model(location) if json.loads(storage.read_bytes(place))["adapted"] else pipeline


def _write(pipeline: Pipeline, images: Iterable[Source | str], location: str) -> bool:
    """Writes the adapted model. Returns False, and writes nothing, if no image can be read."""
    network, card = checkpoint.load_model(pipeline.model, allow_code=pipeline.options.allow_code)
    gpu = torch.cuda.is_available() and pipeline.options.device != "cpu"
    device = torch.device("cuda" if gpu else "cpu")
    try:
        batches = _batches(pipeline, images)
        seen = blend_norms.blend(network.to(device), (batch.to(device) for batch in batches), STRENGTH)
    except torch.OutOfMemoryError:
        raise UserError("--adapt: the GPU has no room for one image: use a smaller --tile, or --device cpu") from None
    finally:
        network.cpu()
        if gpu:
            torch.cuda.empty_cache()  # the replicas need the room
    if seen:
        checkpoint.save_copy(location, pipeline.model, card, network)
    return seen


def _batches(pipeline: Pipeline, images: Iterable[Source | str]) -> Iterator[Tensor]:
    """Yields images as the network gets them, uint8 [N,C,H,W]; skips those that can't be read."""
    batch: list[np.ndarray] = []
    for image in islice(images, SAMPLE):
        try:
            batch.append(pipeline.network_input(image))
        except (ImageError, OSError):
            continue
        _, height, width, _ = batch[0].shape
        if (len(batch) + 1) * height * width > PIXELS_AT_ONCE:
            yield _joined(batch)
            batch = []
    if batch:
        yield _joined(batch)


def _joined(images: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(images)).permute(0, 3, 1, 2)
