"""Speed, measured side by side in one run, in turns: what is compared meets the same machine and the same noise.

python jobs/benchmark.py --images carvana512/train --masks carvana512/train_masks --recipe carvana-cpu
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from unet_ray import engine, masks, models, records, rows
from unet_ray.config import TrainConfig, load_train_config


@dataclass(frozen=True, slots=True)
class Timing:
    """One thing that was measured."""

    section: str
    name: str
    seconds: float
    """Median of the rounds."""
    images_per_second: float
    ratio: float
    """How many times as fast as the first of its section."""


class PlainPairs(Dataset):
    """Images and masks as tutorials read them: Pillow, resized, float32 [C,H,W]."""

    def __init__(self, pairs: list[records.Pair], size_hw: tuple[int, int]) -> None:
        self.pairs, self.size_hw = pairs, size_hw

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        pair = self.pairs[index]
        with Image.open(pair.image) as image:
            picture = np.asarray(image.convert("RGB").resize(self.size_hw[::-1], Image.Resampling.BILINEAR))
        with Image.open(pair.mask) as image:
            mask = np.asarray(image.resize(self.size_hw[::-1], Image.Resampling.NEAREST)) > 0
        # From 0 to 255: the network divides.
        return torch.from_numpy(picture.copy()).permute(2, 0, 1).float(), torch.from_numpy(mask).float()[None]


def plain_steps(config: TrainConfig, pairs: list[records.Pair]) -> Iterator[float]:
    """Training steps of a plain PyTorch loop with the same network: fp32, no memory format, AdamW as it comes."""
    network = models.build(config.model).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.train.learning_rate)
    criterion = torch.nn.BCEWithLogitsLoss()
    loader = DataLoader(PlainPairs(pairs, config.data.size_hw), config.train.batch_size, shuffle=True, drop_last=True)
    for image, mask in itertools.chain.from_iterable(itertools.repeat(loader)):
        optimizer.zero_grad()
        loss = criterion(network(image), mask)
        loss.backward()
        optimizer.step()
        yield loss.item()


def our_steps(config: TrainConfig, pairs: list[records.Pair]) -> Iterator[float]:
    """Training steps as `unet-ray train --local` takes them."""
    engine.keep_freed_memory()
    training = engine.prepare(config, torch.device("cpu"))
    training.model.train()
    held = rows.MemoryRows(pairs, rows.Decoder.of(config))
    for epoch in itertools.count(1):
        plan = engine.batch_plan(len(held), config.train.batch_size, seed=config.train.seed, epoch=epoch)
        batches = held.batches([part.indices for step in plan for part in step])
        for step in plan:
            yield float(training.step(((next(batches), part) for part in step), len(step), epoch))


def in_turns(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, one after the other in every round; the first round, which warms up, does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def train_section(config: TrainConfig, pairs: list[records.Pair], rounds: int) -> list[Timing]:
    plain, ours = plain_steps(config, pairs), our_steps(config, pairs)
    seconds = in_turns({"plain fp32": lambda: next(plain), "unet_ray": lambda: next(ours)}, rounds)
    first = seconds["plain fp32"]
    return [
        Timing("train", name, value, config.train.batch_size / value, first / value) for name, value in seconds.items()
    ]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--images", required=True, metavar="DIR")
@click.option("--masks", "masks_folder", required=True, metavar="DIR")
@click.option("--recipe", default="carvana-cpu", show_default=True)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=1))
@click.option("--json", "as_json", is_flag=True)
def main(images: str, masks_folder: str, recipe: str, settings: tuple[str, ...], rounds: int, as_json: bool) -> None:
    """Time a training step beside the same network in a plain fp32 PyTorch loop."""
    pairs = records.find_pairs(images, masks_folder)[:32]
    chosen: list[tuple[str, object]] = [(name, value) for name, _, value in (text.partition("=") for text in settings)]
    base = load_train_config(recipe=recipe, settings=chosen)
    values = masks.infer_values([pair.mask for pair in pairs], base.model.num_classes, base.data)
    config = load_train_config(recipe=recipe, settings=[*chosen, ("data.mask_values", list(values))])
    timings = train_section(config, pairs, rounds)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(timing) for timing in timings]))
        return
    click.echo(f"{'section':<10} {'what':<14} {'s/step':>8} {'images/s':>9} {'ratio':>7}")
    for t in timings:
        click.echo(f"{t.section:<10} {t.name:<14} {t.seconds:8.2f} {t.images_per_second:9.2f} {t.ratio:6.2f}x")


if __name__ == "__main__":
    main()
