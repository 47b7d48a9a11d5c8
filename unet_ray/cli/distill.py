"""unet-ray distill."""

from __future__ import annotations

import shlex
import sys

import click

from unet_ray import custom_parts
from unet_ray.cli.messages import print_next, print_places, training_callbacks, written_report
from unet_ray.cli.options import (
    DATA,
    OUTPUT,
    SETTINGS,
    TRAINING,
    WHERE,
    Command,
    Workers,
    allow_code,
    device,
    no_report,
    option,
    runtime,
    setting,
    settings,
)
from unet_ray.data import storage
from unet_ray.ray_backend.session import Runtime
from unet_ray.report.progress import TrainingDisplay


@click.command(cls=Command, short_help="Train a small, fast network on what a run's network finds.")
@click.argument("run")
@option(
    DATA,
    "--images",
    multiple=True,
    metavar="DIR",
    help="Images without masks to learn from, too, in each step as many as with masks; may be repeated.",
)
@option(SETTINGS, "--recipe", default="small", show_default=True, metavar="NAME", help="Network and training.")
@settings("It wins over --recipe. Those of images, augmentation and seed are the run's.")
@allow_code
@option(
    TRAINING, "--epochs", type=int, metavar="N", help="Passes over the images.", shown="the recipe's, or 2,000 steps"
)
@option(TRAINING, "--batch-size", type=int, metavar="N", help="Images per step.", shown="the recipe's")
@option(
    TRAINING,
    "--may-fall",
    type=click.FloatRange(min=0),
    default=0.001,
    show_default=True,
    metavar="X",
    help="Largest loss of validation Dice with which the small network is accepted.",
)
@option(TRAINING, "--resume", is_flag=True, help="Go on from the last finished epoch in SMALL.")
@option(OUTPUT, "--out", required=True, metavar="SMALL", help="Run directory to write.")
@no_report
@option(WHERE, "--workers", type=Workers(), metavar="N|FEWEST-MOST", help="Processes that train.", shown=1)
@device
@runtime
def distill(
    run: str,
    images: tuple[str, ...],
    recipe: str,
    settings: tuple[str, ...],
    epochs: int | None,
    batch_size: int | None,
    allow_code: bool,
    may_fall: float,
    resume: bool,
    out: str,
    no_report: bool,
    workers: int | tuple[int, int] | None,
    device: str | None,
    runtime: Runtime,
) -> None:
    """Train a small, fast network on what a run's network finds; refused if validation Dice falls by more than a bound.

    RUN is a run directory. The small network learns from the run's masks and from the probabilities that the run's
    network gives, on the run's training images and on --images, which need no masks. Pairs, split, image size and
    augmentation are those of RUN; network and training are those of the recipe.

    \b
    Example:
      unet-ray distill RUN --images photos --out SMALL

    SMALL is a run as any other: predict, quantize and export take it. Both networks are scored on the images that RUN
    held out, and SMALL/distilled.json keeps the scores. Exit code 2: refused; SMALL stays.
    """
    from unet_ray.evaluation.distillation import config_of
    from unet_ray.evaluation.distillation import distill as make_small

    flags = {
        "train.epochs": epochs,
        "train.batch_size": batch_size,
        "compute.workers": workers,
        "compute.device": device,
    }
    given = [(name, value) for name, value in flags.items() if value is not None]
    config = config_of(run, recipe, [*map(setting, settings), *given], images)
    custom_parts.check_typed(config, settings, allow_code)
    with TrainingDisplay(config) as display:
        callbacks = training_callbacks(config, display)
        result = make_small(config, out, may_fall=may_fall, runtime=runtime, resume=resume, callbacks=callbacks)
    click.echo(f"scored on {result.images} images of validation")
    click.echo(f"Dice {result.dice:.4f} with {result.gflop:.2f} GFLOP an image: {run}")
    click.echo(f"Dice {result.dice_small:.4f} with {result.gflop_small:.2f} GFLOP: {out}")
    print_places(model=storage.join(out, "model"), **written_report(out, no_report))
    if not result.kept:
        click.echo(f"refused: Dice falls by {result.dice - result.dice_small:.3g}, more than {may_fall:g}", err=True)
        sys.exit(2)
    print_next(f"unet-ray predict {shlex.quote(out)} FOLDER --out MASKS")
