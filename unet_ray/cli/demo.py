"""unet-ray demo."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from unet_ray.cli.messages import print_next, print_places, training_callbacks, written_report
from unet_ray.cli.options import OUTPUT, Command, option, runtime
from unet_ray.config import EvaluateConfig, PredictConfig, UserError
from unet_ray.ray_backend.session import Runtime
from unet_ray.report.progress import TrainingDisplay
from unet_ray.settings import load_train_config


@click.command(cls=Command, short_help="Make a data set, train, segment and score: a few minutes.")
@option(OUTPUT, "--out", default="demo", show_default=True, metavar="DIR", help="New folder for data, run and masks.")
@runtime
def demo(out: str, runtime: Runtime) -> None:
    """Make a small data set, train on it, segment unseen images, score them: a few minutes on two CPUs.

    \b
    Example:
      unet-ray demo --out demo

    Writes DIR/data (scenes with cars, and their masks), DIR/run (see `train`) and DIR/masks (see `predict`).
    """
    folder = Path(out)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"--out {out} is not empty: remove it or choose another")
    from unet_ray.demo import make_scenes

    click.echo(f"making 60 scenes with a car: {folder / 'data'}")
    data = folder / "data"
    make_scenes(data)
    config = load_train_config(
        recipe="demo", settings=[("data.images", str(data / "train")), ("data.masks", str(data / "train_masks"))]
    )
    run, masks = str(folder / "run"), str(folder / "masks")
    unseen, unseen_masks = str(data / "unseen"), str(data / "unseen_masks")
    if not runtime.local:
        click.echo("starting Ray (about 20 seconds)")
    from unet_ray.evaluation.evaluate import evaluate
    from unet_ray.inference.predict import predict
    from unet_ray.training.run import train

    with runtime.started():
        with TrainingDisplay(config) as display:
            train(config, run, runtime=runtime, callbacks=training_callbacks(config, display))
        click.echo("segmenting the unseen folder")
        prediction = PredictConfig(model=run, inputs=(unseen,), out=masks, formats=("png", "parquet"))
        summary = predict(prediction, runtime=runtime)
        scores = evaluate(EvaluateConfig(model=run, images=unseen, masks=unseen_masks), runtime=runtime)
    low, high = scores.dice.ci95
    click.echo(
        f"Dice on {scores.images} unseen scenes of unseen cars: {scores.dice.mean:.4f} (95 % {low:.4f} – {high:.4f})"
    )
    print_places(model=f"{run}/model", masks=f"{masks}/masks ({summary.ok} PNG), {masks}/masks.parquet")
    print_places(**written_report(run, False))
    print_next(
        f"unet-ray evaluate {shlex.quote(run)} --images {shlex.quote(unseen)} --masks {shlex.quote(unseen_masks)}",
        f"unet-ray predict {shlex.quote(run)} YOUR_FOLDER --out YOUR_MASKS",
        "unet-ray train --images YOUR_IMAGES --masks YOUR_MASKS --out RUN --recipe carvana-fast",
    )
