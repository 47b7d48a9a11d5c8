"""Measures a training step beside a plain fp32 loop, and whole epochs."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from measures.common import Apart, Job, Line, in_turns, table
from measures.decode import by_pillow
from unet_ray.config import TrainConfig
from unet_ray.data import rows
from unet_ray.data.pairs import Pair
from unet_ray.models import build, compiling
from unet_ray.models.device import keep_freed_memory
from unet_ray.own_process import claim
from unet_ray.ray_backend.session import Runtime
from unet_ray.settings import load_train_config
from unet_ray.training.results import read_metrics
from unet_ray.training.run import train
from unet_ray.training.sampler import EpochBatches, Sampler
from unet_ray.training.step import prepare


class PlainPairs(Dataset):
    """Reads images and masks as tutorials do: with Pillow, resized, float32 [C,H,W]."""

    def __init__(self, pairs: list[Pair], size_hw: tuple[int, int]) -> None:
        self.pairs, self.size_hw = pairs, size_hw

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        pair = self.pairs[index]
        picture = by_pillow(Path(pair.image).read_bytes(), self.size_hw)
        with Image.open(pair.mask) as image:
            mask = np.asarray(image.resize(self.size_hw[::-1], Image.Resampling.NEAREST)) > 0
        # Values stay 0 to 255: the network normalises them.
        return torch.from_numpy(picture.copy()).permute(2, 0, 1).float(), torch.from_numpy(mask).float()[None]


def plain_steps(config: TrainConfig, pairs: list[Pair], device: str) -> Callable[[], float]:
    """Returns the step of a plain PyTorch loop with the same network: fp32, no memory format, default AdamW."""
    network = build(config.model).train().to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.train.learning_rate)
    criterion = torch.nn.BCEWithLogitsLoss()
    loader = DataLoader(PlainPairs(pairs, config.data.size_hw), config.train.batch_size, shuffle=True, drop_last=True)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def step() -> float:
        image, mask = next(batches)
        optimizer.zero_grad()
        loss = criterion(network(image.to(device)), mask.to(device))
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def our_steps(config: TrainConfig, pairs: list[Pair], device: str, compiled: bool) -> Callable[[], float]:
    """Returns the training step of `unet-ray train --local`; with `compiled`, the step of long trainings."""
    claim()
    keep_freed_memory(of_any_size=True)
    prepared = prepare(config, torch.device(device))
    prepared.ddp_network.train()
    if compiled:
        prepared.forward = compiling.Compiled(prepared.ddp_network)
    decoded = rows.MemoryRows(pairs, rows.Decoder.of(config))
    sampler = Sampler(rows=len(decoded), batch_size=config.train.batch_size, seed=config.train.seed)

    def steps() -> Iterator[float]:
        for epoch in itertools.count(1):
            for arrays, _, weight, _ in EpochBatches(decoded, sampler.epoch(epoch)):
                loss = prepared.backward(arrays, weight, epoch=epoch)
                prepared.update()
                yield float(loss)

    return partial(next, steps())


def train_section(job: Job) -> Iterator[Line]:
    pairs = job.pairs[: 8 * job.config.train.batch_size]
    given = job.config, pairs, job.device
    with (
        Apart(plain_steps, *given) as plain,
        Apart(our_steps, *given, False) as ours,
        Apart(our_steps, *given, True) as compiled,
    ):
        for step in (ours, compiled):
            step()  # memory grows during two steps, and the warm-up round has only one
        seconds = in_turns({"plain fp32": plain, "unet_ray": ours, "unet_ray, compiled": compiled}, job.rounds)
    yield from table("train", seconds, {"unet_ray": f"batch {job.config.train.batch_size}"})


def small_training(job: Job, images: int) -> list[tuple[str, Any]]:
    """Returns the settings of a training of a small network on so many images."""
    return [
        *(("model.base_channels", 16), ("model.patch", 2), ("model.depth", 4), ("model.norm", "batch")),
        ("data.images", job.config.data.images),
        ("data.masks", job.config.data.masks),
        ("data.image_size", 512),
        ("data.fraction", min(1.0, images / len(job.pairs))),
        ("train.batch_size", 4),
        ("compute.device", job.device),
    ]


def epochs_section(job: Job) -> Iterator[Line]:
    """Times whole epochs of a small network, so that the rest of the work shows. A run's first epoch does not count."""
    count = 20
    config = load_train_config(settings=[*small_training(job, 128), ("train.epochs", 1 + count)])
    measured: dict[str, tuple[float, float]] = {}
    for name, local in (("--local", True), ("through Ray", False)):
        out = str(job.folder / name)
        train(config, out, runtime=Runtime(local=local))
        lines = read_metrics(out)[1:]
        seconds = statistics.median(line["train_seconds"] for line in lines)
        waited, trained = (sum(line[key] for line in lines) for key in ("wait_seconds", "train_seconds"))
        measured[name] = (seconds, waited / trained)
    notes = {name: f"waits for data {share:.2%} of the time" for name, (_, share) in measured.items()}
    yield from table("epochs", {name: seconds for name, (seconds, _) in measured.items()}, notes)
