"""Evaluation: prediction's own stages, compared with the true masks at each mask's own size."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pyarrow as pa

from unet_ray import metrics
from unet_ray.config import Cleanup, EvaluateConfig, UserError
from unet_ray.data import storage
from unet_ray.data.chunks import readable, to_parquet
from unet_ray.data.pairs import Pair
from unet_ray.evaluation.compare import Compare
from unet_ray.evaluation.run_pairs import pairs_of
from unet_ray.inference import ledger
from unet_ray.inference.pipeline import OnProgress, Pipeline
from unet_ray.inference.stages import Chunks
from unet_ray.metrics import ImageScores, Scores
from unet_ray.ray_backend.session import Runtime


def evaluate(
    config: EvaluateConfig,
    *,
    pipeline: Pipeline | None = None,
    pairs: list[Pair] | None = None,
    runtime: Runtime = Runtime(),
    on_progress: OnProgress = lambda _done, _failed, _all: None,
) -> Scores:
    """Scores a model on pairs of images and masks: through Ray Data, or with `local` in this process.

    `pipeline`, `pairs`: instead of those that the config names. `cluster` is entered once all that needs no Ray has
    been checked: a context in which `ray.init` has been called (nothing, where the caller has called it, or with
    `local`).

    A pair that can't be used is listed in `Scores.failures`. Raises UserError for what the user can mend, also when
    no pair could be used.
    """
    pipeline = pipeline or Pipeline.of(config.model, config)
    each, failures = measure(config, pipeline, (), pairs, runtime, on_progress)
    return metrics.score(each[0], config.tolerance, failures)


def measure(
    config: EvaluateConfig,
    pipeline: Pipeline,
    cleanups: tuple[str, ...],
    pairs: list[Pair] | None,
    runtime: Runtime,
    on_progress: OnProgress,
) -> tuple[list[ImageScores], list[tuple[str, str]]]:
    """What was measured on the masks as they are and after each clean-up, and (image, reason) of what failed."""
    card = pipeline.card
    if config.mask_values is not None:
        if len(config.mask_values) != len(card.mask_values):
            raise UserError(f"--mask-values names {len(config.mask_values)}: the model has {len(card.mask_values)}")
        card = dataclasses.replace(card, mask_values=config.mask_values)
    pairs = pairs_of(config) if pairs is None else pairs
    columns = {
        "path": [os.fsencode(pair.image) for pair in pairs],
        "mask_path": [os.fsencode(pair.mask) for pair in pairs],
    }
    chunks = Chunks(columns, ledger.chunk_rows(len(pairs), pipeline.row_cost()))
    compare = Compare(card, config.tolerance, tuple(map(Cleanup.parse, cleanups)))
    versions, classes = 1 + len(cleanups), card.model.num_classes
    scored: list[tuple[str, np.ndarray, int, np.ndarray]] = []
    failures = []
    shared = {"--images": pairs[0].image, "--masks": pairs[0].mask}
    run = pipeline.run(range(len(chunks)), chunks, compare, images=len(pairs), shared=shared, runtime=runtime)
    for result in run:
        for row, (name, error) in enumerate(zip(result["path"], result["error"], strict=True)):
            if error:
                failures.append((readable(name), str(error)))
            else:
                counts = result["counts"][row].reshape(versions, classes, 3)
                surface = result["surface"][row].reshape(classes, 3)
                scored.append((readable(name), counts, int(result["valid"][row]), surface))
        on_progress(len(scored) + len(failures), len(failures), len(pairs))
    # Chunks come as they are finished; the figures must not depend on it.
    scored.sort(key=lambda entry: entry[0])
    failures.sort()
    if not scored:
        raise UserError(f"none of {len(pairs)} pairs could be scored; the first: {failures[0][0]}: {failures[0][1]}")
    paths, all_counts, pixels, surfaces = zip(*scored, strict=True)
    names = card.classes[-classes:] or tuple(f"class {k}" if classes > 1 else "foreground" for k in range(classes))
    counted = np.stack(all_counts)
    each = [
        ImageScores(paths, counted[:, version], np.array(pixels), np.stack(surfaces), names)
        for version in range(versions)
    ]
    return each, failures


def write_table(scores: Scores, location: str) -> None:
    """The scores of each image and class as Parquet."""
    storage.write_bytes(storage.absolute(location), to_parquet(pa.table(scores.each.columns())))
