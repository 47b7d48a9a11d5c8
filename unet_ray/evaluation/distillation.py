"""Distills a run: trains a small network on what the run's own network finds, and accepts it by its score."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from unet_ray.config import EvaluateConfig, TrainConfig, UserError, plain
from unet_ray.data import storage
from unet_ray.data.splits import SPLIT, read_split
from unet_ray.evaluation.evaluate import evaluate
from unet_ray.evaluation.run_pairs import pairs_of_run
from unet_ray.models import checkpoint
from unet_ray.models.operations import floating_point_operations
from unet_ray.models.run_files import CONFIG
from unet_ray.ray_backend.session import Runtime
from unet_ray.settings import load_train_config, quoted
from unet_ray.training.run import Callbacks, train
from unet_ray.training.setup import is_done

DISTILLED = "distilled.json"
MAY_FALL = 0.001
"""Largest loss of mean validation Dice with which the small network is accepted."""
FEWEST_STEPS = 2000
"""A run on few masks gets more epochs than the recipe has, so that the small network sees enough of the others."""
OF_MODEL = ("in_channels", "num_classes", "pixel_mean", "pixel_std")
"""Settings of the network that are those of the run's."""


@dataclass(frozen=True, slots=True)
class Distillation:
    """Says how the small network scores beside the one that it learnt from, and whether it is accepted."""

    kept: bool
    dice: float
    """Mean Dice of the run over its validation images."""
    dice_small: float
    images: int
    """Number of validation images on which both were scored."""
    gflop: float
    """Of the run's network for an image of the model's size, in billions of multiplications and additions."""
    gflop_small: float


def config_of(
    run: str, recipe: str, settings: Sequence[tuple[str, Any]] = (), images: Sequence[str] = ()
) -> TrainConfig:
    """Returns the settings of the training of a small network: pairs, split and augmentation of the run, what the
    network is and how it learns from the recipe and from `settings` (dotted names).

    `images`: further images, without masks. Raises UserError if `run` is no run directory, if it has held out no
    images, or for a setting that is the run's.
    """
    run = storage.absolute(run)
    card = checkpoint.read_card(checkpoint.model_directory(run))
    if not storage.exists(storage.join(run, CONFIG)):
        raise UserError(f"{run} is not a run directory: distill needs the images that it was trained on")
    parts = [*read_split(storage.join(run, SPLIT)).values()]
    if "val" not in parts:
        raise UserError(f"{run} has held out no images, by which a small network could be accepted")
    pairs_of_run(run, "val")  # that they are still there is found before hours of training
    theirs = load_train_config(config_file=storage.read_bytes(storage.join(run, CONFIG)).decode())
    split = {
        "split": storage.join(run, SPLIT),
        "folds": 0,
        "fold": 0,
        "val_groups": (),
        "unlabeled": tuple(images) or None,
    }
    of_run = {
        **{f"data.{name}": value for name, value in {**dataclasses.asdict(theirs.data), **split}.items()},
        **{f"augment.{name}": value for name, value in dataclasses.asdict(theirs.augment).items()},
        **{f"model.{name}": getattr(card.model, name) for name in OF_MODEL},
        "train.seed": theirs.train.seed,
        "train.teacher": checkpoint.model_directory(run),
    }
    for name, _ in settings:
        if name in of_run:
            raise UserError(f"--set {name}: it is that of {run}: leave it out")
    loss = [("train.loss", "auto")] if card.model.num_classes > 1 else []  # recipes are for one class
    kept = [(name, quoted(plain(value))) for name, value in of_run.items()]
    config = load_train_config(recipe=recipe, settings=[*loss, *settings, *kept])
    if any(name == "train.epochs" for name, _ in settings):
        return config
    steps = -(-parts.count("train") // config.train.batch_size)
    epochs = max(config.train.epochs, -(-FEWEST_STEPS // max(1, steps)))
    return dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=epochs))


def distill(
    config: TrainConfig,
    out: str,
    *,
    may_fall: float = MAY_FALL,
    runtime: Runtime = Runtime(),
    resume: bool = False,
    callbacks: Callbacks = Callbacks(),
) -> Distillation:
    """Trains the small network of `config_of` into the run directory `out`, and scores it beside its teacher on the
    images that the teacher's run held out.

    The small network is accepted if its mean Dice is lower by `may_fall` at most. It stays in `out` in any case.
    Raises UserError as `train` does.
    """
    out, teacher = storage.absolute(out), config.train.teacher
    assert teacher is not None, "config_of sets it"
    if teacher.startswith(f"{out}/"):
        raise UserError(f"--out {out} is the run itself: choose another")
    with runtime.started():
        if not (resume and is_done(config, out)):
            train(config, out, runtime=runtime, resume=resume, callbacks=callbacks)
        scores, scores_small = (
            evaluate(
                EvaluateConfig(model=model, device=config.compute.device),
                pairs=pairs_of_run(out, "val"),
                runtime=runtime,
            )
            for model in (teacher, out)
        )
    dice, dice_small = float(scores.dice.mean or 0), float(scores_small.dice.mean or 0)
    networks = (checkpoint.read_card(teacher).model, config.model)
    gflop, gflop_small = (floating_point_operations(each, config.data.size_hw) / 1e9 for each in networks)
    result = Distillation(dice - dice_small <= may_fall, dice, dice_small, scores.images, gflop, gflop_small)
    text = json.dumps(dataclasses.asdict(result), indent=2) + "\n"
    storage.write_bytes(storage.join(out, DISTILLED), text.encode(), durable=True)
    return result
