"""Evaluates a model: runs prediction's stages, and compares the masks with the ground truth at its own size."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import pyarrow as pa

from unet_ray import metrics
from unet_ray.config import IGNORE, Cleanup, EvaluateConfig, UserError
from unet_ray.data import looks, mask_files, pages, storage
from unet_ray.data.annotations import drawing
from unet_ray.data.chunks import Chunk, readable, to_parquet
from unet_ray.data.darkness import SAMPLE, may_be_deep, warn_of_deep
from unet_ray.data.imaging import Source
from unet_ray.data.inputs import evenly
from unet_ray.data.pairs import Pair
from unet_ray.data.progress import OnProgress
from unet_ray.evaluation.compare import Compare
from unet_ray.evaluation.run_pairs import pairs_of
from unet_ray.inference import adapt
from unet_ray.inference.chunk_size import chunk_rows
from unet_ray.inference.pipeline import Pipeline
from unet_ray.inference.resolve import pipeline_of
from unet_ray.inference.stages import Chunks, MaskSink
from unet_ray.inference.unlike import say_if_unlike
from unet_ray.metrics import ImageScores, Scores
from unet_ray.models.checkpoint import ModelCard
from unet_ray.ray_backend.session import Runtime

Failure = tuple[str, str]
"""(image, reason)"""


def evaluate(
    config: EvaluateConfig,
    *,
    pipeline: Pipeline | None = None,
    pairs: list[Pair] | None = None,
    runtime: Runtime = Runtime(),
    on_progress: OnProgress = lambda _done, _failed, _all: None,
) -> Scores:
    """Scores a model on pairs of images and masks, through Ray Data or in this process (`runtime`).

    `pipeline`, `pairs`: replace those that the config names. Ray starts only after all checks that need no Ray.

    A pair that can't be used is listed in `Scores.failures`. Raises UserError for what the user must fix, also when no
    pair could be used.
    """
    pipeline = pipeline or pipeline_of(config.model, config)
    pairs = pairs_of(config) if pairs is None else pairs
    unlike = say_if_unlike(_sample(pairs, looks.SAMPLE, pipeline), pipeline)
    with _adapted(pipeline, pairs, unlike, runtime) if config.adapt else nullcontext(pipeline) as pipeline:
        versions, failures = measure(config, pipeline, (), pairs, runtime, on_progress)
    return metrics.score(versions[0], config.tolerance, failures)


@contextmanager
def _adapted(
    pipeline: Pipeline, pairs: list[Pair], unlike: tuple[str, ...] | None, runtime: Runtime
) -> Iterator[Pipeline]:
    """Gives the pipeline with a model that is adapted to the images, until the evaluation is done. On a cluster it lies
    beside the model itself, where all nodes see it. Raises UserError if it can't be written there."""
    adapt.check(pipeline)
    images = _sample(pairs, adapt.SAMPLE, pipeline)
    with tempfile.TemporaryDirectory(prefix="unet_ray-") as here:
        location = here if runtime.local else storage.join(pipeline.model, f".{adapt.FOLDER}-{uuid.uuid4().hex[:12]}")
        try:
            yield adapt.adapted(pipeline, images, location, unlike)
        except PermissionError as error:
            raise UserError(
                f"--adapt: {error.filename or pipeline.model} can't be written to: add --local, or `unet-ray predict "
                "MODEL IMAGES --out OUT --adapt` and evaluate OUT/adapted, or MODEL if that says that it stays as it is"
            ) from None
        finally:
            if not runtime.local:
                storage.delete_folder(location)


def _sample(pairs: list[Pair], count: int, pipeline: Pipeline) -> Iterator[Source | str]:
    """Yields the files of some images, evenly spaced, or the reason why one can't be read."""
    return pipeline.reader().encoded_files(pair.image for pair in evenly(pairs, count))


def measure(
    config: EvaluateConfig,
    pipeline: Pipeline,
    cleanups: tuple[str, ...],
    pairs: list[Pair] | None,
    runtime: Runtime,
    on_progress: OnProgress,
) -> tuple[list[ImageScores], list[Failure]]:
    """Compares the masks with the ground truth, without a clean-up of `cleanups` and after each.

    Returns the scores of each of these versions of the masks, and the failures. Raises UserError if all pairs failed.
    """
    pairs = pairs_of(config) if pairs is None else pairs
    card = card_for(config, pipeline.card, pairs)
    _look(pairs, pipeline)
    compare = Compare(card, config.tolerance, tuple(map(Cleanup.parse, cleanups)))
    compared = results(pipeline, compare, pairs, runtime)
    scored, failures = _collected(compared, card.model.num_classes, len(pairs), on_progress)
    if not scored:
        raise UserError(f"none of {len(pairs)} pairs could be scored; the first: {failures[0][0]}: {failures[0][1]}")
    paths, counts, pixels, surfaces = zip(*scored, strict=True)
    counts_NVK3, surface_NK3 = np.stack(counts), np.stack(surfaces)
    versions = [
        ImageScores(paths, counts_NVK3[:, version], np.array(pixels), surface_NK3, _class_names(card))
        for version in range(1 + len(cleanups))
    ]
    return versions, failures


def _look(pairs: list[Pair], pipeline: Pipeline) -> None:
    """Warns if some images look nearly black to the model."""
    reader = pipeline.reader()
    some = evenly([pair.image for pair in pairs if may_be_deep(pair.image)], SAMPLE)
    if some:
        where = storage.without_secrets(storage.parent(pages.file_of(some[0])))
        warn_of_deep(reader.encoded_files(some), reader.channels, reader.value_range, where)


def card_for(config: EvaluateConfig, card: ModelCard, pairs: list[Pair]) -> ModelCard:
    """Returns the model's card with the config's mask values, or, for annotations, with the class ids that drawn masks
    hold. Raises UserError if their number does not fit."""
    ids = max(2, card.model.num_classes)
    if pairs and drawing.split_drawn(pairs[0].mask):
        of_masks = {**card.of_masks, "mask_values": tuple(range(ids)), "mask_colors": (), "ignore_index": IGNORE}
        return dataclasses.replace(card, of_masks=of_masks)
    if config.mask_values is None:
        return card
    if len(config.mask_values) != ids:
        raise UserError(f"--mask-values names {len(config.mask_values)}: the model has {ids}")
    of_masks = {**card.of_masks, "mask_values": config.mask_values, "mask_colors": ()}
    return dataclasses.replace(card, of_masks=of_masks)


def _class_names(card: ModelCard) -> tuple[str, ...]:
    classes = card.model.num_classes
    return card.classes[-classes:] or tuple(f"class {k}" if classes > 1 else "foreground" for k in range(classes))


def results(
    pipeline: Pipeline, sink: MaskSink, pairs: list[Pair], runtime: Runtime, *, probabilities: bool = False
) -> Iterator[Chunk]:
    """Yields what `sink` returns of each chunk of pairs. `probabilities`: it needs them."""
    columns = {
        "path": [os.fsencode(pair.image) for pair in pairs],
        "mask_path": [os.fsencode(pair.mask) for pair in pairs],
    }
    chunks = Chunks(columns, chunk_rows(len(pairs), pipeline.row_cost()))
    one_mask = mask_files.first_file(pairs[0].mask)
    shared = {"--images": pages.file_of(pairs[0].image), "--masks": pages.file_of(one_mask)}
    yield from pipeline.run(
        range(len(chunks)),
        chunks,
        sink,
        images=len(pairs),
        probabilities=probabilities,
        shared=shared,
        runtime=runtime,
    )


def _collected(
    results: Iterator[Chunk], classes: int, pairs: int, on_progress: OnProgress
) -> tuple[list[tuple[str, np.ndarray, int, np.ndarray]], list[Failure]]:
    """Returns (path, counts [V,K,3], valid pixels, surface [K,3]) of each image, and the failures. Both are sorted,
    since chunks arrive in any order, and the scores must not depend on it."""
    scored: list[tuple[str, np.ndarray, int, np.ndarray]] = []
    failures: list[Failure] = []
    for chunk in results:
        for row, (path, error) in enumerate(zip(chunk["path"], chunk["error"], strict=True)):
            if error:
                failures.append((readable(path), str(error)))
            else:
                counts = chunk["counts"][row].reshape(-1, classes, 3)
                surface = chunk["surface"][row].reshape(classes, 3)
                scored.append((readable(path), counts, int(chunk["valid"][row]), surface))
        on_progress(len(scored) + len(failures), len(failures), pairs)
    return sorted(scored, key=lambda entry: entry[0]), sorted(failures)


def write_table(scores: Scores, location: str) -> None:
    """Writes the scores of each image and class as Parquet."""
    storage.write_bytes(storage.absolute(location), to_parquet(pa.table(scores.each.columns())))
