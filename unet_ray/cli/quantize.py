"""unet-ray quantize."""

from __future__ import annotations

import dataclasses
import json
import sys

import click

from unet_ray.cli.options import Command, allow_code, as_json, option
from unet_ray.config import EvaluateConfig
from unet_ray.report.progress import ImagesDisplay


@click.command(cls=Command, short_help="Convert a run's network to int8, twice as fast on CPUs.")
@click.argument("run")
@option(
    "Calibration",
    "--calibration",
    default=64,
    show_default=True,
    type=click.IntRange(min=1),
    metavar="N",
    help="Training images from which the ranges of values are taken.",
)
@allow_code
@as_json
def quantize(run: str, calibration: int, allow_code: bool, as_json: bool) -> None:
    """Convert a run's network to int8, often twice as fast on CPUs.

    RUN is a run directory. NNCF (the extra `cpu`) converts the trained network. Both networks are scored on the run's
    validation images, and timed. int8 is refused if Dice falls by more than 0.001, or if it is not faster on this CPU.
    If it is kept, predict and evaluate use it on CPUs with the same instruction set, unless --precision names another
    precision. On other CPUs scores and speed differ: run quantize there again.

    \b
    Example:
      unet-ray quantize RUN

    Writes RUN/model/int8.json and the network's files, int8-*, beside it. Exit code 2: refused; only a network that was
    kept on another kind of CPU stays.
    """
    from unet_ray.evaluation.quantization import quantize as make_int8

    with ImagesDisplay("scored") as display:
        config = EvaluateConfig(model=run, device="cpu", allow_code=allow_code)
        result = make_int8(config, calibration=calibration, on_progress=display)
    if as_json:
        click.echo(json.dumps({"kept": not result.problem, **dataclasses.asdict(result)}))
    else:
        click.echo(f"calibrated on {result.calibrated_on} training images, scored on {result.images} of validation")
        click.echo(
            f"Dice {result.dice:.4f} as it is, {result.dice_int8:.4f} in int8; {result.speedup:.2f} times as fast"
        )
        if not result.problem:
            click.echo("kept: predict and evaluate use it on CPUs (--precision bf16 or fp32: they don't)")
    if result.problem:
        click.echo(f"refused: {result.problem}", err=True)
        sys.exit(2)
