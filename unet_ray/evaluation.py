"""Evaluation: prediction's own stages, compared with the true masks at each mask's own size."""

from __future__ import annotations

import dataclasses
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from unet_ray import checkpoint, ledger, metrics, records, stages, storage
from unet_ray.config import Cleanup, DataConfig, EvaluateConfig, UserError, load_train_config
from unet_ray.engine import CONFIG
from unet_ray.ledger import readable
from unet_ray.metrics import ImageScores, Scores
from unet_ray.prediction import OnProgress, Pipeline
from unet_ray.records import Pair

CLEANUPS = ("holes", "largest", "largest+holes", "area=0.02%+holes", "area=0.2%+holes", "area=1%+holes")
"""What `choose_cleanup` tries, beside nothing."""
WORTH = 1e-4
"""Mean Dice that a clean-up must gain to be chosen: less is chance, and masks better stay as the network drew them."""


@dataclass(frozen=True, slots=True)
class CleanupChoice:
    """What `choose_cleanup` returns."""

    chosen: str
    dice: dict[str, float]
    """Clean-up -> mean Dice over the images."""
    images: int


def evaluate(
    config: EvaluateConfig,
    *,
    pipeline: Pipeline | None = None,
    pairs: list[Pair] | None = None,
    local: bool = False,
    cluster: AbstractContextManager[None] = nullcontext(),
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
    each, failures = _measure(config, pipeline, (), pairs, local, cluster, on_progress)
    return metrics.score(each[0], config.tolerance, failures)


def choose_cleanup(
    config: EvaluateConfig,
    *,
    pairs: list[Pair] | None = None,
    local: bool = False,
    cluster: AbstractContextManager[None] = nullcontext(),
    on_progress: OnProgress = lambda _done, _failed, _all: None,
) -> CleanupChoice:
    """Scores masks after each of `CLEANUPS`; the best is written into the model directory, where `predict` finds it.

    Arguments and errors as of `evaluate`; `config.cleanup` has no say.
    """
    pipeline = Pipeline.of(config.model, dataclasses.replace(config, cleanup="none"))
    each, _ = _measure(config, pipeline, CLEANUPS, pairs, local, cluster, on_progress)
    dice = {name: float(scores.means()["dice"].mean()) for name, scores in zip(("none", *CLEANUPS), each, strict=True)}
    best = max(dice, key=dice.__getitem__)
    chosen = best if dice[best] >= dice["none"] + WORTH else "none"
    checkpoint.save_choice(pipeline.model, checkpoint.CLEANUP, pipeline.card, {"cleanup": chosen, "dice": dice})
    return CleanupChoice(chosen, dice, len(each[0].paths))


def _measure(
    config: EvaluateConfig,
    pipeline: Pipeline,
    cleanups: tuple[str, ...],
    pairs: list[Pair] | None,
    local: bool,
    cluster: AbstractContextManager[None],
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
    chunks = stages.Chunks(columns, ledger.chunk_rows(len(pairs), pipeline.row_cost()))
    compare = stages.Compare(card, config.tolerance, tuple(map(Cleanup.parse, cleanups)))
    versions, classes = 1 + len(cleanups), card.model.num_classes
    scored: list[tuple[str, np.ndarray, int, np.ndarray]] = []
    failures = []
    shared = {"--images": pairs[0].image, "--masks": pairs[0].mask}
    run = pipeline.run(
        range(len(chunks)), chunks, compare, images=len(pairs), shared=shared, local=local, cluster=cluster
    )
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


def pairs_of(config: EvaluateConfig) -> list[Pair]:
    """The pairs to score: of the folders that the config names, or those that the run held out."""
    if config.images is not None and config.masks is not None:
        return records.find_pairs(config.images, config.masks)
    return pairs_of_run(config.model, "val")


def pairs_of_run(model: str, part: str) -> list[Pair]:
    """The pairs of one part of a run, `train` or `val`. Raises UserError if they are not all there any more."""
    location = storage.absolute(model)
    checkpoint.model_directory(location)
    trained = _trained(location)
    if trained is None:
        raise UserError(f"{location} is not a run directory, so it has no validation set: give --images and --masks")
    data, parts = trained
    pairs = [pair for pair in records.find_pairs(data.images, data.masks) if parts.get(pair.key) == part]
    wanted = sum(other == part for other in parts.values())
    if len(pairs) != wanted:
        what = "validation" if part == "val" else "training"
        raise UserError(f"{data.images}: {len(pairs)} of the {wanted} {what} images of {location} are still there")
    return pairs


def _trained(location: str) -> tuple[DataConfig, dict[str, str]] | None:
    """What a run was trained on, and which image was on which side; None for what is no run directory."""
    path = storage.join(location, CONFIG)
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
    storage.write_bytes(storage.absolute(location), ledger.to_parquet(pa.table(scores.each.columns())))
