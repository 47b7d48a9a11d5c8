"""unet-ray train."""

from __future__ import annotations

import shlex
import sys
import textwrap
from typing import Any

import click

from unet_ray import custom_parts
from unet_ray.cli.messages import print_next, print_places, training_callbacks, written_report
from unet_ray.cli.options import (
    DATA,
    OUTPUT,
    PRECISIONS,
    SETTINGS,
    TRAINING,
    WHERE,
    Command,
    Workers,
    allow_code,
    classes,
    device,
    no_report,
    one_or_several,
    option,
    overlap_order,
    pairs,
    rle_order,
    runtime,
    setting,
    settings,
)
from unet_ray.config import AugmentConfig, TrainConfig, UserError
from unet_ray.data import storage
from unet_ray.ray_backend.session import Runtime
from unet_ray.registry import LOSSES, NETWORKS, OPTIMIZERS, is_custom
from unet_ray.report.progress import TrainingDisplay
from unet_ray.settings import load_train_config, quoted

DEFAULTS = TrainConfig()
FLAGS = {
    "images": "data.images",
    "masks": "data.masks",
    "match": "data.match",
    "split": "data.split",
    "unlabeled": "data.unlabeled",
    "overlap_order": "data.overlap_order",
    "rle_order": "data.rle_order",
    "epochs": "train.epochs",
    "batch_size": "train.batch_size",
    "image_size": "data.image_size",
    "lr": "train.learning_rate",
    "cache": "compute.cache",
    "seed": "train.seed",
    "group_by": "data.group_by",
    "init": "train.init",
    "workers": "compute.workers",
    "device": "compute.device",
    "precision": "train.precision",
}
"""Option -> the setting that it stands for."""
AUGMENTATION_NAMES = textwrap.indent(textwrap.fill(", ".join(AugmentConfig.__dataclass_fields__), 52), 25 * " ")
CHOICES = f"""\b
Some settings for --set (unet_ray/config.py has all, with meaning and source;
an error about a misspelt name suggests the nearest):
  model.name             {", ".join(NETWORKS)}
  model.encoder          efficientnet_lite0 with model.pretrained=true: U-Net
                         on ImageNet's weights (the extra `pretrained`)
  model.num_classes      1: one class and background; K: ids 0 to K-1
  model.padding          same; valid with data.tile: the 2015 paper's network,
                         which then predicts by overlap-tiles
  train.loss             {", ".join(LOSSES)} or a sum: ce+dice
                         model.name, train.loss and augment.custom also take
                         your own: mine:Net is Net of mine.py in this folder;
                         unet_ray/custom_parts.py has an example of each
  train.optimizer        {", ".join(OPTIMIZERS)}
  train.schedule         constant, plateau, cosine, poly, one_cycle
  train.                 ema, clip_norm, accumulate, patience, warm_up,
                         class_weights, border_weight, checkpoint_activations
  train.foreground       0.33: so many tiles (data.tile) around an object
  train.encoder_weights  FILE.safetensors: the encoder's first weights
  data.mask_values       [0, 255]: the stored value of each class; [[0], [1, 3]]
                         gives a class several; [0, '>0'], [0, '>=128']
  data.mask_colors       ['#000000', '#ff0000']: the colour of each class
  data.several_masks     union: each mask of an image is an object; classes:
                         the folder of a mask is its class
  data.mask_nearest      true: other colours, of JPEG, are the nearest class
  data.mask_resize       true: masks of another size in the same proportions
  data.mask_turn         true: masks drawn on images as stored, before EXIF
  data.ignore_index      255: pixels that neither train nor score; several
  augment. (image and mask together; the same for the same seed, epoch and
           image, whatever the number of workers)
{AUGMENTATION_NAMES}
  compute.               compile, mlflow, retries, memory_fraction"""


@click.command(cls=Command, epilog=CHOICES)
@pairs
@option(
    DATA,
    "--group-by",
    metavar="REGEX",
    help="Keep images whose names share this match on one side of the split. Training prints a note if names look like "
    "groups that are on both sides.",
)
@option(
    DATA,
    "--split",
    metavar="FILE",
    help="CSV of (key or path, part: train, val, test), or a folder with train.txt and val.txt; random: nothing else.",
    shown="folders named train, val, test; else random",
)
@classes("all are the foreground")
@overlap_order
@rle_order
@option(
    DATA,
    "--unlabeled",
    multiple=True,
    callback=one_or_several,
    metavar="DIR",
    help="Images without masks to learn from, too: where the network is sure of one, it must see the same in a changed "
    "copy (FixMatch).",
)
@option(DATA, "--cache", metavar="DIR", help="Keep the resized images in DIR, so that later runs don't decode them.")
@option(SETTINGS, "--recipe", metavar="NAME", help="Settings that are known to work: see `unet-ray recipes`.")
@option(SETTINGS, "--config", "config_file", metavar="FILE", help="YAML of settings, such as a run's config.yaml.")
@settings("It wins over --recipe and --config; other flags win over it.")
@allow_code
@option(TRAINING, "--epochs", type=int, metavar="N", help="Passes over the images.", shown=DEFAULTS.train.epochs)
@option(
    TRAINING,
    "--batch-size",
    type=int,
    metavar="N",
    help="Images per step, over all workers together.",
    shown=DEFAULTS.train.batch_size,
)
@option(
    TRAINING,
    "--image-size",
    type=int,
    metavar="N",
    help="Side in pixels that images are resized to; a rectangle: --set data.image_size='[HEIGHT, WIDTH]'.",
    shown=DEFAULTS.data.image_size,
)
@option(TRAINING, "--lr", type=float, metavar="X", help="Learning rate.", shown=DEFAULTS.train.learning_rate)
@option(TRAINING, "--seed", type=int, metavar="N", help="Seed of every random draw.", shown=DEFAULTS.train.seed)
@option(
    TRAINING,
    "--init",
    metavar="MODEL",
    help="Start from the weights of this run or model, and take its network; with another model.num_classes the "
    "last layer starts anew.",
)
@option(
    TRAINING,
    "--folds",
    type=int,
    metavar="K",
    help="Cross-validation: K runs in RUN/fold-1 …, each fold held out once.",
)
@option(TRAINING, "--resume", is_flag=True, help="Go on from the last finished epoch in RUN.")
@option(
    OUTPUT, "--out", required=True, metavar="RUN", help="Run directory to write; on a cluster, all nodes must see it."
)
@no_report
@option(
    WHERE,
    "--workers",
    type=Workers(),
    metavar="N|FEWEST-MOST",
    help="Processes that train, each on a GPU or on CPUs; 1-4: as many of them as fit.",
    shown=DEFAULTS.compute.workers,
)
@device
@option(
    WHERE,
    "--precision",
    type=PRECISIONS,
    metavar="[auto|fp32|bf16|fp16]",
    help="auto: bf16 if the device computes in it. fp16: CUDA only.",
    shown="auto",
)
@runtime
def train(
    out: str,
    recipe: str | None,
    config_file: str | None,
    settings: tuple[str, ...],
    folds: int | None,
    resume: bool,
    no_report: bool,
    allow_code: bool,
    runtime: Runtime,
    **flags: Any,
) -> None:
    """Train a U-Net on pairs of images and masks.

    A mask belongs to the image of the same relative path and stem, with or without _mask: a/car.jpg and a/car.png or
    a/car_mask.gif. Names match exactly. For other names --match finds the text that both have, and globs such as
    'SET/*_sat.jpg' and 'SET/*_mask.png' belong together where their stars stand for the same. Images without a mask and
    masks without an image are left out, and counted. Defaults below are those without --recipe or --config.

    \b
    Example:
      unet-ray train --images train --masks train_masks --out RUN --recipe carvana-fast --group-by '^[^_]+'
      unet-ray train --config RUN/config.yaml --out AGAIN --seed 1

    \b
    Writes:
      RUN/model/         the epoch with the best validation Dice: predict's MODEL
      RUN/last/          the last finished epoch, from which --resume goes on
      RUN/config.yaml    every setting: --config RUN/config.yaml repeats the run
      RUN/split.csv      its training and validation images (RUN/unlabeled.txt: those of --unlabeled)
      RUN/teacher.txt    with train.teacher: the checksum of its weights, which --resume compares
      RUN/metrics.jsonl  one line for each epoch: losses, scores, counts, speed, seconds of waiting for images
      RUN/tensorboard/   the same for TensorBoard (for MLflow: --set compute.mlflow=URI and the extra `mlflow`)
      RUN/report.html    curves, scores, pictures

    Instead of folders, --images may be a list of pairs (.csv, .tsv, .txt, .jsonl, .parquet: a column of images and one
    of masks; Hugging Face's files), and --masks annotations (COCO's JSON, labelme's, VIA's and Label Studio's, CVAT's
    XML, YOLO's polygons, run lengths in a table, or what `predict` writes). They are drawn as pycocotools draws
    polygons, and labelme's as labelme draws them.

    Mask values: training decides once, from a sample of the masks, which value is which class, and writes that into
    config.yaml and the model. 0 and one other value are background and foreground; with model.num_classes=K, the class
    ids are 0 to K-1. A value that is no class is an error. Masks are resized by nearest neighbour only. Everything else
    (several values, colours, instance numbers, JPEG masks, several masks of an image) is a setting, which `unet-ray
    doctor` finds and prints.

    Split: folders named train, val and test (training, valid, validation, testing) are kept to, or what --split says;
    else images are drawn. `unet-ray evaluate RUN --part test` scores those that were neither trained on nor validated
    on.

    Workers: --batch-size is the number of images in a step over all workers together, and the batches of an epoch
    depend on the seed and the epoch only. So one worker and several take the same steps, and their losses agree to
    rounding. With AdamW the weights drift apart a little more: batch norm sees each CPU worker's part of the batch (on
    GPUs it is synchronised). The same command gives the same figures.

    Memory: resized images stay in the object store as uint8 when they fit, and are streamed in each epoch otherwise.
    --cache also keeps them as Parquet, keyed by what the files contain and by every setting that affects a row; any
    file of it may be deleted.

    When something breaks: if a worker or a node is lost, training starts again from the last finished epoch, with the
    same batches. If the command is stopped, give it again with --resume; it ends with the figures of an uninterrupted
    run. If the disk is full, the last checkpoint is whole: files appear under their names only when they are
    complete.
    """
    if recipe and config_file:
        raise UserError("--recipe and --config both say all settings: give one of them")
    config = load_train_config(
        recipe=recipe,
        config_file=_read_text(config_file, "--config") if config_file else None,
        settings=_all_settings(settings, flags),
    )
    custom_parts.check_typed(config, settings, allow_code)
    if folds is not None:
        _cross_validate(config, out, folds, runtime, resume)
        return
    from unet_ray.training.run import train as run

    with TrainingDisplay(config) as display:
        result = run(config, out, runtime=runtime, resume=resume, callbacks=training_callbacks(config, display))
    if result.problem:
        click.echo(f"the network finds nothing: {result.problem}", err=True)
        sys.exit(1)
    click.echo(result.kept)
    print_places(model=storage.join(out, "model"), **written_report(out, no_report))
    print_next(*_next_commands(out, config, validated="val_dice" in result.best))


def _next_commands(out: str, config: TrainConfig, *, validated: bool) -> tuple[str, str]:
    allow = " --allow-code" if is_custom(config.model.name) else ""
    pairs = "" if validated else " --images IMAGES --masks MASKS"
    model = shlex.quote(out)
    return f"unet-ray evaluate {model}{pairs}{allow}", f"unet-ray predict {model} FOLDER --out MASKS{allow}"


def _cross_validate(config: TrainConfig, out: str, folds: int, runtime: Runtime, resume: bool) -> None:
    from unet_ray.evaluation.cross_validation import cross_validate

    with TrainingDisplay(config) as display, runtime.started():
        summary = cross_validate(
            config,
            out,
            folds,
            runtime=runtime,
            resume=resume,
            callbacks=training_callbacks(config, display),
            on_fold=display.tell,
            on_scores=lambda fold, dice: display.tell(f"{fold}: Dice {dice:.4f} on the images held out"),
        )
    for label, name in (("Dice", "dice"), ("IoU", "iou"), ("pixel accuracy", "pixel_accuracy")):
        mean, sd = summary.mean_and_sd(name)
        click.echo(f"{label:<16} {mean:.4f} ± {sd:.4f} (mean and sd of {folds} folds)")


def _all_settings(typed: tuple[str, ...], flags: dict[str, Any]) -> list[tuple[str, Any]]:
    """Returns the settings of the command line; later ones win: the network of --init, classes, --set, other flags."""
    network: list[tuple[str, Any]] = []
    if flags["init"] is not None:
        from unet_ray.models.checkpoint import model_settings_of

        network = model_settings_of(flags["init"])
    return [*network, *_class_settings(flags.pop("classes")), *map(setting, typed), *_flag_settings(flags)]


def _class_settings(picked: tuple[str, ...]) -> list[tuple[str, Any]]:
    """Returns the settings of `--classes`."""
    if not picked:
        return []
    number = len(picked) + 1 if len(picked) > 1 else 1
    # None: the recipe's values and ignored value are those of other masks.
    of_masks: list[tuple[str, Any]] = [
        ("data.mask_values", None),
        ("data.mask_colors", []),
        ("data.ignore_index", None),
    ]
    return [("model.num_classes", number), ("data.classes", ["background", *picked]), *of_masks]


def _flag_settings(flags: dict[str, Any]) -> list[tuple[str, Any]]:
    """Returns the given flags as dotted settings."""
    return [(FLAGS[flag], quoted(value)) for flag, value in flags.items() if value is not None]


def _read_text(location: str, flag: str) -> str:
    try:
        return storage.read_bytes(storage.absolute(location)).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {location}: {getattr(error, 'strerror', None) or error}") from None
