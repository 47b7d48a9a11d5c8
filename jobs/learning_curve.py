"""Measures what more labels are worth on your images: Dice on held-out images against the number of labelled ones.

    python jobs/learning_curve.py --images DIR --masks DIR --out OUT [--group-by REGEX]
    python jobs/learning_curve.py … --out OUT --counts 20 --network few-labels --unlabeled

It trains on 10, 20, 40 and 160 images, and on all, from scratch (the network of `carvana-fast`) and on an encoder from
ImageNet (the recipe `few-labels`, the extra `pretrained`): as many steps each, with the same augmentation, in this
process. Held-out images are the same for all, and no group has images on both sides. With --unlabeled, the images that
are neither held out nor among the labelled ones are learnt from without their masks. OUT has the runs and
learning_curve.png. Give the same command again after a stop: what is finished is not trained again.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import math
import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

# Import the checkout that this file is in, not a copy that may be installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measures import plots

import unet_ray
from unet_ray.config import DataConfig, TrainConfig, UserError
from unet_ray.data.pairs import Pair, find_pairs
from unet_ray.data.splits import group_of
from unet_ray.metrics import Scores
from unet_ray.metrics.comparison import Comparison, compare
from unet_ray.settings import load_train_config
from unet_ray.training.results import read_metrics

SCRATCH, PRETRAINED = "scratch", "few-labels"
ALL = "all"
VIEWS = 4
"""So many images of a held-out group are scored at most: more of them look alike."""


@dataclass(frozen=True, slots=True)
class Draw:
    """Which images are learnt from, in a random order that begins with one of each group, and which are held out."""

    pool: list[Pair]
    held_out: list[Pair]


def drawn(pairs: Iterable[Pair], group_by: str | None, held_out: int, seed: int) -> Draw:
    """Holds out `held_out` groups. Raises UserError if nothing is left to learn from."""
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(group_of(pair.key, group_by), []).append(pair)
    order = [groups[name] for name in sorted(groups)]
    chance = random.Random(seed)
    chance.shuffle(order)
    for group in order:
        chance.shuffle(group)
    if held_out >= len(order):
        raise UserError(f"--held-out {held_out}: there are {len(order)} groups of images: hold out fewer")
    return Draw(_in_turns(order[held_out:]), [pair for group in order[:held_out] for pair in group[:VIEWS]])


def _in_turns(groups: Sequence[Sequence[Pair]]) -> list[Pair]:
    """Returns the first image of each group, then the second of each, and so on."""
    return [pair for turn in itertools.zip_longest(*groups) for pair in turn if pair is not None]


@dataclass(frozen=True, slots=True)
class Training:
    """One point of a curve: a network, and how many images have their masks."""

    network: str
    labelled: int
    unlabeled: bool

    @property
    def name(self) -> str:
        """Its folder."""
        return f"{self.network}{'-unlabeled' if self.unlabeled else ''}-{self.labelled}"

    def scores(self, draw: Draw, out: Path, steps: int, seed: int) -> Scores:
        """Trains `steps` steps, or goes on with that, and scores the images held out."""
        config = self._config(steps, seed)
        if self.unlabeled:
            rest = out / f"{self.name}.txt"
            rest.write_text("".join(f"{pair.image}\n" for pair in draw.pool[self.labelled :]))
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, unlabeled=str(rest)))
        pairs = _listed(out / f"{self.name}.csv", draw.pool[: self.labelled])
        run = out / self.name
        if len(read_metrics(str(run))) < config.train.epochs:
            unet_ray.train(pairs, None, run, config=config, local=True, resume=True)
        return unet_ray.evaluate(run, _listed(out / "held_out.csv", draw.held_out), local=True)

    def _config(self, steps: int, seed: int) -> TrainConfig:
        """Returns the settings: as many steps, whatever the number of images, and the last epoch's weights."""
        recipe = load_train_config(recipe=PRETRAINED)
        epochs = round(steps / math.ceil(self.labelled / recipe.train.batch_size))
        return dataclasses.replace(
            recipe,
            model=load_train_config(recipe="carvana-fast").model if self.network == SCRATCH else recipe.model,
            data=dataclasses.replace(recipe.data, val_fraction=0.0),
            train=dataclasses.replace(recipe.train, epochs=max(1, epochs), seed=seed),
        )


def _listed(location: Path, pairs: Iterable[Pair]) -> Path:
    """Writes a list of pairs, and returns where."""
    with location.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("image", "mask"))
        rows.writerows((pair.image, pair.mask) for pair in pairs)
    return location


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--images", required=True, metavar="DIR", help="As for `unet-ray train`.")
@click.option("--masks", required=True, metavar="DIR", help="As for `unet-ray train`.")
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Runs, scores and plot.")
@click.option("--group-by", metavar="REGEX", help="What groups of images share in their names; a label is of a group.")
@click.option("--held-out", default=40, show_default=True, help="Groups held out; without --group-by: images.")
@click.option("--counts", default="10,20,40,160,all", show_default=True, help="Numbers of labelled images.")
@click.option(
    "--network",
    "networks",
    multiple=True,
    type=click.Choice([SCRATCH, PRETRAINED]),
    help="Only this one.  [default: both]",
)
@click.option("--unlabeled", is_flag=True, help="Learn from the other images, too, without their masks.")
@click.option("--steps", default=320, show_default=True, type=click.IntRange(min=1), help="Steps of a training.")
@click.option("--seed", default=42, show_default=True, help="Of the draw and of the trainings.")
def main(
    images: str,
    masks: str,
    out: Path,
    group_by: str | None,
    held_out: int,
    counts: str,
    networks: tuple[str, ...],
    unlabeled: bool,
    steps: int,
    seed: int,
) -> None:
    """Train on more and more images, and score each network on the same ones."""
    draw = drawn(find_pairs(DataConfig(images=images, masks=masks)), group_by, held_out, seed)
    numbers = _numbers(counts, len(draw.pool), unlabeled)
    common = {
        "images": images,
        "masks": masks,
        "group_by": group_by,
        "held_out": held_out,
        "steps": steps,
        "seed": seed,
    }
    _claim(out, common)
    curves: dict[str, dict[int, Scores]] = {}
    for labelled, network in itertools.product(numbers, networks or (SCRATCH, PRETRAINED)):
        training = Training(network, labelled, unlabeled)
        scores = training.scores(draw, out, steps, seed)
        mean, interval, _ = scores.dice.texts(4) or ("not defined for any image", "", "")
        click.echo(f"{training.name:<24} {mean} ({interval}) of {scores.images}")
        curves.setdefault(network, {})[labelled] = scores
        if network == PRETRAINED and (other := curves.get(SCRATCH, {}).get(labelled)):
            click.echo(f"{'  less from scratch':<24} {_gain(compare(scores.each, other.each))}")
    plot = "learning_curve-unlabeled.png" if unlabeled else "learning_curve.png"
    plots.learning_curves(out / plot, {name: _points(curve) for name, curve in curves.items()})


def _claim(out: Path, experiment: Mapping[str, object]) -> None:
    """Writes into `out` what its runs have in common. Raises UserError if those in it have something else."""
    out.mkdir(parents=True, exist_ok=True)
    record = out / "experiment.json"
    if record.exists() and (there := json.loads(record.read_text())) != experiment:
        name = next(name for name in experiment if there.get(name) != experiment[name])
        option = f"--{name.replace('_', '-')}"
        raise UserError(f"{out}: its runs have {option} {there.get(name)}: give that, or choose another --out")
    record.write_text(json.dumps(experiment, indent=2) + "\n")


def _numbers(counts: str, pool: int, unlabeled: bool) -> list[int]:
    """Returns the numbers of labelled images that the pool has; with `unlabeled`, others are left. Raises UserError."""
    try:
        wanted = [pool if count.strip() == ALL else int(count) for count in counts.split(",")]
    except ValueError:
        wanted = []
    if not wanted or min(wanted) < 1:
        raise UserError(f"--counts {counts}: write numbers from 1 on, or all, with commas: 10,20,all")
    possible = [count for count in dict.fromkeys(wanted) if count <= pool - unlabeled]
    if not possible:
        raise UserError(f"--counts {counts}: {pool} images can be labelled: ask for fewer")
    return possible


def _gain(gain: Comparison) -> str:
    low, high = gain.ci95
    return f"{gain.difference:+.4f} ({low:+.4f} – {high:+.4f}), better on {gain.better}, p = {gain.p_value:.2g}"


def _points(curve: Mapping[int, Scores]) -> list[tuple[int, float, float, float]]:
    """Returns labelled images, mean Dice and the ends of its interval."""
    dices = ((labelled, scores.dice.mean, *scores.dice.ci95) for labelled, scores in curve.items())
    return [(labelled, mean, low, high) for labelled, mean, low, high in dices if mean and low and high]


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"Error: {error}") from None
