"""Measures speed, side by side in one run and in turns, so that all code meets the same machine and the same noise.

    python jobs/benchmark.py --images FOLDER [--masks FOLDER] [--model RUN] [--milesial CHECKOUT] [--json FILE]

Each section is a table: seconds are medians over the rounds, ratios are to the section's first line.

    decode    one photograph to the model's size, on one core
    model     the network alone, one image at a time
    masks     scores to an image's own size, and PNG, on one core
    predict   a folder to PNG masks, without the start: `--local`, through Ray, and milesial/Pytorch-UNet's own code
    frontier  images a second to PNG masks at a mean Dice, of --model and each --beside
    train     an optimizer step, beside a plain fp32 loop
    epochs    an epoch `--local` and through Ray
    overhead  reading, decoding and writing without a network, beside one bare process per core
    memory    peak resident memory, and images per second, of a short and a long folder
    start     `--help`, one image from a cold start, a training's first step, and the first mask through Ray by part
    scale     images a second that one command hands out to replicas that sleep instead of computing
    names     ten million names handed out like that, killed once and gone on (half an hour; only if it is named)
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import click
import torch

# Import the checkout that this file is in, not a copy that may be installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measures.common import BASE_64, Job, Line, random_model
from measures.decode import decode_section
from measures.frontier import frontier_section
from measures.masks import masks_section
from measures.memory import memory_section
from measures.model import model_section
from measures.names import names_section
from measures.overhead import overhead_section
from measures.predict import predict_section
from measures.scale import scale_section
from measures.start import start_section
from measures.train import epochs_section, train_section

from unet_ray.config import DataConfig, TrainConfig, UserError
from unet_ray.data import masks
from unet_ray.data.inputs import iter_images
from unet_ray.data.pairs import Pair, find_pairs
from unet_ray.models import checkpoint
from unet_ray.settings import load_train_config

SECTIONS: dict[str, Callable[[Job], Iterator[Line]]] = {
    "decode": decode_section,
    "model": model_section,
    "masks": masks_section,
    "predict": predict_section,
    "frontier": frontier_section,
    "train": train_section,
    "epochs": epochs_section,
    "overhead": overhead_section,
    "memory": memory_section,
    "start": start_section,
    "scale": scale_section,
    "names": names_section,
}
LONG = ("names",)
"""Sections that run only if they are named."""


def prices(lines: Sequence[Line], an_hour: Mapping[str, float], batch_size: int) -> Iterator[Line]:
    """Yields the cost of a million images on a machine like this one, from the user's prices and the measured rates."""
    rates = {(line.section, line.name): line.seconds for line in lines if line.seconds}
    step = rates.get(("train", "unet_ray"))
    each = {
        "predicted through Ray": rates.get(("predict", "through Ray")),
        "trained on once": step and step / batch_size,
    }
    for (what, seconds), (machine, amount) in itertools.product(each.items(), an_hour.items()):
        if seconds:
            hours = seconds * 1e6 / 3600
            note = f"a million images: {hours:,.1f} hours of one machine, {hours * amount:,.2f} at {amount:g} an hour"
            yield Line("price", f"{what}, {machine}", seconds, None, note)


def shown(line: Line) -> str:
    seconds = "" if line.seconds is None else f"{line.seconds:9.4f}"
    rate = "" if not line.seconds else f"{1 / line.seconds:9.2f}"
    ratio = "" if line.ratio is None else f"{line.ratio:7.2f}x"
    return f"{line.section:<9} {line.name:<34} {seconds:>9} {rate:>9} {ratio:>8}  {line.note}".rstrip()


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--images", required=True, metavar="DIR", help="Photographs.")
@click.option(
    "--masks",
    "masks_folder",
    metavar="DIR",
    help="Masks of the photographs; without them, `train` and `epochs` are skipped.",
)
@click.option("--model", metavar="RUN", help="A trained model; without it, a U-Net of 64 channels with random weights.")
@click.option("--beside", multiple=True, metavar="RUN", help="A further model of `frontier`; may be repeated.")
@click.option(
    "--section",
    "sections",
    multiple=True,
    type=click.Choice([*SECTIONS]),
    help="Measure only this section; may be repeated.",
)
@click.option("--milesial", metavar="DIR", help="A checkout of milesial/Pytorch-UNet to compare with.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="[default: cuda if there is a GPU]")
@click.option("--recipe", help="Settings of the training step.  [default: U-Net of 64 channels, 512, batch 4]")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="A setting of the training step; may be repeated."
)
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--price",
    "price_list",
    multiple=True,
    metavar="NAME=AMOUNT",
    help="Price of an hour of a machine like this one, to print the cost of a million images; may be repeated.",
)
@click.option("--json", "json_file", metavar="FILE", help="Also write the lines to FILE, as JSON.")
@click.option("--names", default=10_000_000, show_default=True, help="Names of the section `names`.")
@click.option("--plots", metavar="DIR", help="Also draw plots of `frontier`, `scale` and `names`, as PNG in DIR.")
def main(
    images: str,
    masks_folder: str | None,
    model: str | None,
    beside: tuple[str, ...],
    sections: tuple[str, ...],
    milesial: str | None,
    device: Literal["cpu", "cuda"] | None,
    recipe: str | None,
    settings: tuple[str, ...],
    rounds: int,
    price_list: tuple[str, ...],
    json_file: str | None,
    names: int,
    plots: str | None,
) -> None:
    """Measure how fast this machine decodes, predicts and trains, compared with other implementations."""
    an_hour = _amounts(price_list)
    pairs = find_pairs(DataConfig(images=images, masks=masks_folder)) if masks_folder else []
    config = _training(images, masks_folder, pairs, recipe, settings)
    with tempfile.TemporaryDirectory(prefix="unet-ray-benchmark-") as folder:
        location = checkpoint.model_directory(model) if model else random_model(Path(folder, "model"))
        job = Job(
            images=[os.fsdecode(image.path) for image in iter_images(images)],
            pairs=pairs,
            model=location,
            card=checkpoint.read_card(location),
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            rounds=rounds,
            milesial=Path(milesial).resolve() if milesial else None,
            others=tuple(map(checkpoint.model_directory, beside)),
            folder=Path(folder),
            config=config,
            names=names,
            plots=Path(plots) if plots else None,
        )
        if job.plots:
            job.plots.mkdir(parents=True, exist_ok=True)
        lines, failed = _measured(job, sections or tuple(name for name in SECTIONS if name not in LONG))
    for line in prices([*lines], an_hour, config.train.batch_size):
        click.echo(shown(line))
        lines.append(line)
    if json_file:
        Path(json_file).write_text(json.dumps([dataclasses.asdict(line) for line in lines], indent=2) + "\n")
    sys.exit(failed)


def _amounts(price_list: Sequence[str]) -> dict[str, float]:
    """Returns name -> price of an hour. Raises UserError."""
    try:
        return {name: float(amount) for name, _, amount in (text.rpartition("=") for text in price_list)}
    except ValueError:
        raise UserError(f"--price {' '.join(price_list)}: write NAME=AMOUNT, e.g. spot=0.35") from None


def _training(
    images: str, masks_folder: str | None, pairs: list[Pair], recipe: str | None, settings: Sequence[str]
) -> TrainConfig:
    """Returns the settings of the training step, with the folders of the pairs."""
    chosen: list[tuple[str, Any]] = [(name, value) for name, _, value in (text.partition("=") for text in settings)]
    base = [] if recipe else [*BASE_64, ("train.batch_size", 4)]
    config = load_train_config(recipe=recipe, settings=[*base, *chosen])
    if not masks_folder:
        return config
    values = masks.infer_values([pair.mask for pair in pairs], config.model.num_classes, config.data)
    data = dataclasses.replace(config.data, images=images, masks=masks_folder, mask_values=values)
    return dataclasses.replace(config, data=data)


def _measured(job: Job, sections: Sequence[str]) -> tuple[list[Line], bool]:
    """Runs the sections and prints their lines as they come. Returns the lines, and whether a section failed."""
    lines: list[Line] = []
    failed = False
    click.echo(f"{'section':<9} {'':<34} {'seconds':>9} {'a second':>9} {'ratio':>8}")
    for name in sections:
        if name in ("train", "epochs") and not job.pairs:
            continue
        try:
            for line in SECTIONS[name](job):
                click.echo(shown(line))
                lines.append(line)
        except Exception as error:  # a peer that does not run must not cost an hour's measurements
            failed = True
            click.echo(f"{name}: {type(error).__name__}: {error}", err=True)
    return lines, failed


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"Error: {error}") from None
