"""Measures what comes after the network, on one core: scores to an image's own size, and the mask to PNG."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np
from PIL import Image

from measures.common import Job, Line, in_turns, network_of, scores_of, table
from measures.decode import on_one_thread
from unet_ray.data import own_size, pictures
from unet_ray.models.device import keep_freed_memory
from unet_ray.own_process import claim

COUNT = 8
"""The most images. Every round takes them all."""


def masks_section(job: Job) -> Iterator[Line]:
    classes, threshold = job.card.model.num_classes, job.card.threshold
    network = network_of(job)
    scores = [scores_of(network, image, job).astype(np.float16) for image in job.decoded(COUNT)]
    sizes = [Image.open(path).size[::-1] for path in job.images[:COUNT]]

    def everything() -> Iterator[np.ndarray]:
        for each, size in zip(scores, sizes, strict=True):
            yield own_size.decide([own_size._plane(plane, size) for plane in each], classes, threshold)

    def ours() -> Iterator[np.ndarray]:
        return (own_size.to_own_size(each, size, threshold) for each, size in zip(scores, sizes, strict=True))

    # As in a prediction: freed memory is kept, and a mask is written before the next is made.
    claim()
    keep_freed_memory()
    masks = [*ours()]
    same = all(map(np.array_equal, masks, everything()))
    ways = {"own size, everything interpolated": everything, "own size": ours}
    yield from _each(job, {name: partial(_passed_on, way) for name, way in ways.items()}, f"equal: {same}")

    def level_6() -> list[bytes]:
        return [zlib.compress((np.packbits(mask, axis=1) if classes == 1 else mask).tobytes(), 6) for mask in masks]

    def png() -> list[bytes]:
        return [pictures.encode_png(mask, classes) for mask in masks]

    share = sum(map(len, png())) / sum(map(len, level_6()))
    yield from _each(job, {"PNG, zlib's level 6": level_6, "PNG": png}, f"{share:.2f} of the bytes")


def _passed_on(masks: Callable[[], Iterator[np.ndarray]]) -> None:
    for _ in masks():
        pass


def _each(job: Job, steps: Mapping[str, Callable[[], object]], note: str) -> list[Line]:
    seconds = in_turns({name: on_one_thread(step) for name, step in steps.items()}, job.rounds)
    images, last = len(job.images[:COUNT]), [*seconds][-1]
    return table("masks", {name: value / images for name, value in seconds.items()}, {last: note})
