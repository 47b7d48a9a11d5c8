"""Distills a run: trains a small network on what the run's own network finds, and accepts it by its score."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from unet_ray.config import EvaluateConfig, TrainConfig, UserError
from unet_ray.data import storage
from unet_ray.data.splits import SPLIT
from unet_ray.evaluation.evaluate import evaluate
from unet_ray.evaluation.run_pairs import pairs_of_run
from unet_ray.models import checkpoint, compiling, training_state
from unet_ray.models.run_files import CONFIG, LAST
from unet_ray.ray_backend.session import Runtime
from unet_ray.settings import load_train_config
from unet_ray.training.run import Callbacks, train

DISTILLED = "distilled.json"
MAY_FALL = 0.001
"""Largest loss of mean validation Dice with which the small network is accepted."""
OF_TEACHER = ("in_channels", "num_classes", "pixel_mean", "pixel_std")
"""Settings of the network that are those of the teacher."""


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


def config_of(run: str, recipe: TrainConfig, images: tuple[str, ...]) -> TrainConfig:
    """Returns the settings of the training of a small network: pairs, split and flips of the run, what the network is
    and how it learns from the recipe.

    `images`: further images, without masks. Raises UserError if `run` is no run directory, or has held out no images.
    """
    run = storage.absolute(run)
    card = checkpoint.read_card(checkpoint.model_directory(run))
    if not storage.exists(storage.join(run, CONFIG)):
        raise UserError(f"{run} is not a run directory: distill needs the images that it was trained on")
    pairs_of_run(run, "val")  # before hours of training
    theirs = load_train_config(config_file=storage.read_bytes(storage.join(run, CONFIG)).decode())
    data = dataclasses.replace(
        theirs.data,
        split=storage.join(run, SPLIT),
        folds=0,
        fold=0,
        val_groups=(),
        unlabeled=images or None,
    )
    same = {name: getattr(card.model, name) for name in OF_TEACHER}
    optimization = dataclasses.replace(recipe.train, teacher=checkpoint.model_directory(run), seed=theirs.train.seed)
    if card.model.num_classes > 1 and "bce" in optimization.loss:
        optimization = dataclasses.replace(optimization, loss="auto")
    return dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, **same),
        data=data,
        augment=theirs.augment,
        train=optimization,
    )


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
    with runtime.started():
        if not (resume and _is_trained(out, config)):
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
    gflop, gflop_small = (compiling.floating_point_operations(each, config.data.size_hw) / 1e9 for each in networks)
    result = Distillation(dice - dice_small <= may_fall, dice, dice_small, scores.images, gflop, gflop_small)
    text = json.dumps(dataclasses.asdict(result), indent=2) + "\n"
    storage.write_bytes(storage.join(out, DISTILLED), text.encode(), durable=True)
    return result


def _is_trained(out: str, config: TrainConfig) -> bool:
    """Returns whether the training is done, so that only the scores are missing."""
    state = training_state.read_state(storage.join(out, LAST))
    return state is not None and state.epoch >= config.train.epochs
