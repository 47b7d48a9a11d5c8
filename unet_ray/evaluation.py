"""Evaluation: prediction's own stages, compared with the true masks at each mask's own size."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, nullcontext

import numpy as np

from unet_ray import checkpoint, engine, metrics, records, stages, storage
from unet_ray.config import EvaluateConfig, UserError, load_train_config
from unet_ray.metrics import Scores
from unet_ray.prediction import OnProgress, decoder_of, row_bytes, run_stages
from unet_ray.records import Pair


def evaluate(
    config: EvaluateConfig,
    *,
    local: bool = False,
    cluster: AbstractContextManager[None] = nullcontext(),
    on_progress: OnProgress = lambda _done, _failed, _all: None,
) -> Scores:
    """Scores a model on pairs of images and masks: through Ray Data, or with `local` in this process.

    `cluster` is entered once all that needs no Ray has been checked: a context in which `ray.init` has been called
    (nothing, where the caller has called it, or with `local`).

    A pair that can't be used is listed in `Scores.failures`. Raises UserError for what the user can mend, also when
    no pair could be used.
    """
    location = storage.absolute(config.model)
    model = checkpoint.model_directory(location)
    card = checkpoint.read_card(model)
    if config.mask_values is not None:
        if len(config.mask_values) != len(card.mask_values):
            raise UserError(f"--mask-values names {len(config.mask_values)}: the model has {len(card.mask_values)}")
        card = dataclasses.replace(card, mask_values=config.mask_values)
    pairs = _pairs(config, location)
    chunks = stages.chunked(
        {"path": [pair.image for pair in pairs], "mask_path": [pair.mask for pair in pairs]}, row_bytes(card)
    )
    scored: list[tuple[str, np.ndarray, int]] = []
    failures = []
    compare = stages.Compare(card)
    for result in run_stages(chunks, decoder_of(card), model, compare, machine=config, local=local, cluster=cluster):
        for row, (path, error) in enumerate(zip(result["path"], result["error"], strict=True)):
            if error:
                failures.append((str(path), str(error)))
            else:
                counts = result["counts"][row].reshape(card.model.num_classes, 3)
                scored.append((str(path), counts, int(result["valid"][row])))
        on_progress(len(scored) + len(failures), len(failures), len(pairs))
    # Chunks come as they are finished; the figures must not depend on it.
    scored.sort(key=lambda entry: entry[0])
    failures.sort()
    if not scored:
        raise UserError(f"none of {len(pairs)} pairs could be scored; the first: {failures[0][0]}: {failures[0][1]}")
    _, all_counts, pixels = zip(*scored, strict=True)
    return metrics.score(np.stack(all_counts), np.array(pixels), card.classes, failures)


def _pairs(config: EvaluateConfig, location: str) -> list[Pair]:
    if config.images is not None and config.masks is not None:
        return records.find_pairs(config.images, config.masks)
    path = storage.join(location, engine.CONFIG)
    if not storage.exists(path):
        raise UserError(f"{location} is not a run directory, so it has no validation set: give --images and --masks")
    trained = load_train_config(config_file=storage.read_bytes(path).decode())
    pairs = records.find_pairs(trained.data.images, trained.data.masks)
    _, held_out = records.split([pair.key for pair in pairs], trained.data, trained.train.seed)
    return [pairs[index] for index in held_out]
