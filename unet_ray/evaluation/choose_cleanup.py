"""Chooses the clean-up of masks with the best Dice."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from unet_ray.config import EvaluateConfig
from unet_ray.data.pairs import Pair
from unet_ray.data.progress import OnProgress
from unet_ray.evaluation.evaluate import measure
from unet_ray.inference.resolve import pipeline_of
from unet_ray.models import checkpoint
from unet_ray.ray_backend.session import Runtime

CLEANUPS = ("holes", "largest", "largest+holes", "area=0.02%+holes", "area=0.2%+holes", "area=1%+holes")
"""Clean-ups that `choose_cleanup` tries, beside `none`."""
WORTH = 1e-4
"""Mean Dice that a clean-up must gain to be chosen. A smaller gain may be chance; the masks then stay unchanged."""


@dataclass(frozen=True, slots=True)
class CleanupChoice:
    """Names the chosen clean-up, with the scores behind the choice."""

    chosen: str
    dice: dict[str, float]
    """Clean-up -> mean Dice over the images."""
    images: int


def choose_cleanup(
    config: EvaluateConfig,
    *,
    pairs: list[Pair] | None = None,
    runtime: Runtime = Runtime(),
    on_progress: OnProgress = lambda _done, _failed, _all: None,
) -> CleanupChoice:
    """Scores masks after each of `CLEANUPS`, and writes the best clean-up into the model directory for `predict`.

    Arguments and errors are those of `evaluate`; `config.cleanup` is ignored.
    """
    pipeline = pipeline_of(config.model, dataclasses.replace(config, cleanup="none"))
    versions, _ = measure(config, pipeline, CLEANUPS, pairs, runtime, on_progress)
    names = ("none", *CLEANUPS)
    dice = {name: float(scores.means()["dice"].mean()) for name, scores in zip(names, versions, strict=True)}
    best = max(dice, key=dice.__getitem__)
    chosen = best if dice[best] >= dice["none"] + WORTH else "none"
    checkpoint.save_choice(pipeline.model, checkpoint.CLEANUP, pipeline.card, {"cleanup": chosen, "dice": dice})
    return CleanupChoice(chosen, dice, len(versions[0].paths))
