"""Evaluation: prediction's own stages, compared with the true masks at each mask's own size."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import pyarrow as pa

from unet_ray import checkpoint, engine, metrics, records, stages, storage
from unet_ray.config import DataConfig, EvaluateConfig, UserError, load_train_config
from unet_ray.metrics import ImageScores, Scores
from unet_ray.prediction import OnProgress, decoder_of, row_bytes, run_stages
from unet_ray.records import Pair


def evaluate(
    config: EvaluateConfig,
    *,
    pairs: list[Pair] | None = None,
    local: bool = False,
    cluster: AbstractContextManager[None] = nullcontext(),
    on_progress: OnProgress = lambda _done, _failed, _all: None,
) -> Scores:
    """Scores a model on pairs of images and masks: through Ray Data, or with `local` in this process.

    `pairs`: instead of those that the config names. `cluster` is entered once all that needs no Ray has been checked: a
    context in which `ray.init` has been called (nothing, where the caller has called it, or with `local`).

    A pair that can't be used is listed in `Scores.failures`. Raises UserError for what the user can mend, also when
    no pair could be used.
    """
    model = checkpoint.model_directory(storage.absolute(config.model))
    card = checkpoint.read_card(model)
    if config.mask_values is not None:
        if len(config.mask_values) != len(card.mask_values):
            raise UserError(f"--mask-values names {len(config.mask_values)}: the model has {len(card.mask_values)}")
        card = dataclasses.replace(card, mask_values=config.mask_values)
    pairs = pairs_of(config) if pairs is None else pairs
    chunks = stages.chunked(
        {"path": [pair.image for pair in pairs], "mask_path": [pair.mask for pair in pairs]}, row_bytes(card)
    )
    scored: list[tuple[str, np.ndarray, int, np.ndarray]] = []
    failures = []
    compare = stages.Compare(card, config.tolerance)
    classes = card.model.num_classes
    for result in run_stages(chunks, decoder_of(card), model, compare, machine=config, local=local, cluster=cluster):
        for row, (path, error) in enumerate(zip(result["path"], result["error"], strict=True)):
            if error:
                failures.append((str(path), str(error)))
            else:
                counts, surface = (result[name][row].reshape(classes, 3) for name in ("counts", "surface"))
                scored.append((str(path), counts, int(result["valid"][row]), surface))
        on_progress(len(scored) + len(failures), len(failures), len(pairs))
    # Chunks come as they are finished; the figures must not depend on it.
    scored.sort(key=lambda entry: entry[0])
    failures.sort()
    if not scored:
        raise UserError(f"none of {len(pairs)} pairs could be scored; the first: {failures[0][0]}: {failures[0][1]}")
    paths, all_counts, pixels, surfaces = zip(*scored, strict=True)
    names = card.classes[-classes:] or tuple(f"class {k}" if classes > 1 else "foreground" for k in range(classes))
    each = ImageScores(paths, np.stack(all_counts), np.array(pixels), np.stack(surfaces), names)
    return metrics.score(each, config.tolerance, failures)


def pairs_of(config: EvaluateConfig) -> list[Pair]:
    """The pairs to score: of the folders that the config names, or those that the run held out."""
    if config.images is not None and config.masks is not None:
        return records.find_pairs(config.images, config.masks)
    location = storage.absolute(config.model)
    checkpoint.model_directory(location)
    trained = _trained(location)
    if trained is None:
        raise UserError(f"{location} is not a run directory, so it has no validation set: give --images and --masks")
    data, parts = trained
    pairs = [pair for pair in records.find_pairs(data.images, data.masks) if parts.get(pair.key) == "val"]
    wanted = sum(part == "val" for part in parts.values())
    if len(pairs) != wanted:
        raise UserError(f"{data.images}: {len(pairs)} of the {wanted} validation images of {location} are still there")
    return pairs


def _trained(location: str) -> tuple[DataConfig, dict[str, str]] | None:
    """What a run was trained on, and which image was on which side; None for what is no run directory."""
    path = storage.join(location, engine.CONFIG)
    if not storage.exists(path):
        return None
    data = load_train_config(config_file=storage.read_bytes(path).decode()).data
    return data, records.read_split(storage.join(location, records.SPLIT))


def trained_on(model: str, pairs: list[Pair]) -> int:
    """How many of the images a run was trained on, as far as its directory says."""
    trained = _trained(storage.absolute(model))
    if trained is None:
        return 0
    data, parts = trained
    used = {storage.join(data.images, key) for key, part in parts.items() if part == "train"}
    return sum(pair.image.rpartition(".")[0] in used for pair in pairs)


def write_table(scores: Scores, location: str) -> None:
    """The scores of each image and class as Parquet."""
    storage.write_bytes(storage.absolute(location), stages.to_parquet(pa.table(scores.each.columns())))
