"""Builds the page of a training run."""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from unet_ray import __version__, custom_parts
from unet_ray.config import EvaluateConfig, TrainConfig, UserError, locations
from unet_ray.data import storage
from unet_ray.data.inputs import evenly
from unet_ray.data.pairs import Pair
from unet_ray.data.progress import OnProgress
from unet_ray.data.splits import SPLIT, read_split
from unet_ray.evaluation.evaluate import evaluate
from unet_ray.evaluation.run_pairs import pairs_of_run
from unet_ray.metrics import Scores
from unet_ray.models import checkpoint, run_files
from unet_ray.ray_backend.session import Runtime
from unet_ray.report import run_pictures, run_tables
from unet_ray.report.charts import curves, threshold_curves
from unet_ray.report.progress import duration
from unet_ray.report.sections import Page, Section, name_of, plural, short
from unet_ray.settings import load_train_config
from unet_ray.training.results import result_of

SCORED = 128
"""The most validation images that are scored for the page at their own size, evenly spaced."""
BACKEND: Literal["torch"] = "torch"
"""OpenVINO would take longer to load and compile than torch takes for so few images."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredPairs:
    """The validation pairs of a run, scored at their own size; `scores` is None if that was not possible."""

    scores: Scores | None = None
    pairs: list[Pair]
    """The pairs that were scored."""
    notes: list[str]


def of_run(run: str, runtime: Runtime, on_progress: OnProgress, allow_code: bool) -> str:
    """Returns the page of a run directory. `allow_code`: see `custom_parts`."""
    config = load_train_config(config_file=storage.read_bytes(storage.join(run, run_files.CONFIG)).decode())
    result = result_of(run)
    card = checkpoint.read_card(checkpoint.model_directory(run))
    sides = Counter(read_split(storage.join(run, SPLIT)).values())
    if sides["val"]:
        scored = _scored(run, config, runtime, on_progress, allow_code)
    else:
        scored = ScoredPairs(pairs=[], notes=["No image was held out to validate on, so no score is known."])
    best, history = result.best, result.history
    config_place = storage.without_secrets(storage.join(run, run_files.CONFIG))
    sections = [Section(title="How it went", charts=curves(history, best["epoch"]), keep=True)]
    if scored.scores is not None:
        sections += [run_tables.scores(scored.scores), *run_tables.classes(scored.scores)]
        pairs = {pair.image: pair for pair in scored.pairs}
        sections.append(run_pictures.compared(run, scored.scores, pairs, card, BACKEND))
    threshold = checkpoint.read_choice(checkpoint.model_directory(run), checkpoint.THRESHOLD, card)
    if threshold is not None:
        sections.append(Section(title="Threshold", charts=[threshold_curves(threshold)], keep=True))
    settings = run_tables.settings(config, card, sides)
    sections += [
        Section(title="What was trained on what", table=settings, keep=True),
        Section(title="Time", table=run_tables.times(history), keep=True),
        Section(
            title="The same again",
            text="All settings are in config.yaml; the split of the images depends on their names alone.",
            command=f"unet-ray train --config {shlex.quote(config_place)} --out NEW_RUN"
            + (" --allow-code" if custom_parts.names_in(config) else ""),
            keep=True,
        ),
    ]
    seconds = sum(line["seconds"] for line in history)
    return Page(
        title=f"{name_of(run)}: {run_tables.network(config)}",
        subtitle=f"Trained by unet-ray {__version__}: {storage.without_secrets(run)}",
        tiles=[
            _dice_tile(scored.scores, best),
            (f"{best['epoch']} of {len(history)}", "best epoch of all" if sides["val"] else "the last epoch is kept"),
            (f"{sides['train']} + {sides['val']}", "images trained + validated on"),
            (duration(seconds), f"on {plural(history[-1]['workers'], 'process', 'processes')}"),
        ],
        notes=scored.notes,
        sections=sections,
    ).html()


def _scored(run: str, config: TrainConfig, runtime: Runtime, on_progress: OnProgress, allow_code: bool) -> ScoredPairs:
    """Scores up to `SCORED` validation images. If that fails, e.g. because they were moved, returns a note instead."""
    try:
        held_out = pairs_of_run(run, "val")
        pairs = evenly(held_out, SCORED)
        options = EvaluateConfig(model=run, backend=BACKEND, allow_code=allow_code)
        scores = evaluate(options, pairs=pairs, runtime=runtime, on_progress=on_progress)
    except UserError as error:
        reason = str(error)
        for place in (run, *locations(config.data.images), *locations(config.data.masks)):
            reason = reason.replace(place, storage.without_secrets(place))
        return ScoredPairs(pairs=[], notes=[f"The validation images could not be scored again: {reason}"])
    notes = []
    if _has_interval(scores):
        if len(held_out) > scores.images + len(scores.failures):
            notes.append(
                f"Scored at their own size: {scores.images} of {len(held_out)} validation images, evenly spaced."
            )
        if scores.failures:
            path, reason = scores.failures[0]
            notes.append(f"{len(scores.failures)} could not be scored; the first: {short(path)}: {reason}")
    return ScoredPairs(scores=scores, pairs=pairs, notes=notes)


def _has_interval(scores: Scores) -> bool:
    return scores.dice.mean is not None and scores.dice.ci95[0] is not None


def _dice_tile(scores: Scores | None, best: dict[str, Any]) -> tuple[str, str]:
    """Returns the Dice at the images' own size, or else that of the best epoch."""
    if scores is None or not _has_interval(scores):
        known = "val_dice" in best
        return f"{best['val_dice']:.4f}" if known else "unknown", "Dice at the network's size"
    low, high = scores.dice.ci95
    return f"{scores.dice.mean:.4f}", f"Dice, 95 % {low:.4f} – {high:.4f}"
