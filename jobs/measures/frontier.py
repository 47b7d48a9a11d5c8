"""Measures what a user buys: images a second from photographs to PNG masks, at a mean Dice, for several models."""

from __future__ import annotations

import itertools
import shutil
import statistics
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image

from measures import plots
from measures.common import Apart, Job, Line, dice, table
from measures.predict import Milesial, seconds_an_image, seconds_each
from unet_ray.config import MaskOptions, PredictConfig, UserError
from unet_ray.data import imaging, storage
from unet_ray.inference.arithmetic import Arithmetic
from unet_ray.inference.resolve import pipeline_of
from unet_ray.models import checkpoint
from unet_ray.models.operations import floating_point_operations
from unet_ray.ray_backend.session import ray_session

MILESIAL = "milesial's predict.py"
LEAST, MOST_SECONDS = 600, 120.0
"""So many images are predicted at least: fewer are repeated, since a run of some seconds says little. None is repeated
if a network would take so many seconds for them, by estimate."""


Precision = Literal["auto", "fp32", "bf16", "int8"]


@dataclass(frozen=True, slots=True)
class Way:
    """A model, and how it predicts."""

    model: str
    how: str
    local: bool
    precision: Precision = "auto"

    @property
    def name(self) -> str:
        return f"{_short(self.model)} {self.how}"


def frontier_section(job: Job) -> Iterator[Line]:
    """Predicts the images with every model in turns: `--local` in each precision there is, and through Ray. The start
    is not counted."""
    folders = {model: _repeated(job, model) for model in (job.model, *job.others)}
    ways = [way for model in folders for way in _ways(job, model)]
    seconds: dict[str, list[float]] = {}
    scores: dict[str, float | None] = {}
    with ExitStack() as stack:
        stack.enter_context(ray_session())
        milesial = None if job.milesial is None else stack.enter_context(Apart(Milesial, job.milesial, job))
        if milesial is not None:
            milesial(job.images[0])  # starts
        outs = itertools.count()
        for _ in range(job.rounds):
            if milesial is not None:
                seconds.setdefault(MILESIAL, []).append(seconds_each(milesial, job.images[:3]))
            for way in ways:
                out = job.folder / f"frontier {next(outs)}"
                config = PredictConfig(
                    model=way.model,
                    inputs=(folders[way.model],),
                    out=str(out),
                    device=job.device,
                    precision=way.precision,
                )
                seconds.setdefault(way.name, []).append(seconds_an_image(config, local=way.local))
                if way.name not in scores:
                    scores[way.name] = _dice(job, out)
                shutil.rmtree(out)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    yield from table("frontier", medians, {way.name: _note(job, way, scores[way.name]) for way in ways})
    points = [
        (_short(way.model), way.how, 1 / medians[way.name], score)
        for way in ways
        if (score := scores[way.name]) is not None
    ]
    if job.plots and points:
        plots.frontier(job.plots / "frontier.png", points, 1 / medians[MILESIAL] if MILESIAL in medians else None)


def _ways(job: Job, model: str) -> Iterator[Way]:
    """Yields how a model predicts: `--local` and through Ray as it is, and `--local` in each other precision."""
    chosen: set[Arithmetic | None] = set()
    for precision in get_args(Precision):
        options = MaskOptions(device=job.device, precision=precision)
        try:
            arithmetic = pipeline_of(model, options).chosen_here().arithmetic
        except UserError:  # there is no such network, or not for this machine
            continue
        if arithmetic in chosen:
            continue
        chosen.add(arithmetic)
        named = "" if arithmetic is None else "int8" if arithmetic.int8 else arithmetic.precision
        yield Way(model, f"{named} --local".strip(), local=True, precision=precision)
        if precision == "auto":
            yield Way(model, f"{named} through Ray".strip(), local=False)


def _repeated(job: Job, model: str) -> str:
    """Returns a folder with links to the images of the job: to all of them equally often, so that there are `LEAST` or
    more; to each once if the model is slow."""
    seconds = LEAST * pipeline_of(model, MaskOptions(device=job.device)).row_cost().seconds  # of two CPU cores
    slow = job.device == "cpu" and seconds > MOST_SECONDS
    turns = 1 if slow else -(-LEAST // len(job.images))
    folder = job.folder / f"{turns} times"
    for turn in range(turns):
        if not (folder / str(turn)).exists():
            (folder / str(turn)).mkdir(parents=True)
            for path in job.images:
                (folder / str(turn) / Path(path).name).symlink_to(Path(path).resolve())
    return str(folder)


def _short(model: str) -> str:
    """Returns the name of a run, or of a model directory outside of one."""
    path = Path(model)
    return path.parent.name if path.name == "model" else path.name


def _dice(job: Job, out: Path) -> float | None:
    """Returns the mean Dice of the masks in `out`; None without true masks."""
    found = []
    for pair in job.pairs:
        predicted = np.asarray(Image.open(out / "masks/0" / f"{Path(pair.image).stem}.png")).astype(np.uint8)
        truth, _ = imaging.decode_mask(storage.read_bytes(pair.mask), job.config.data, None)
        found.append(dice(predicted, truth))
    return statistics.mean(found) if found else None


def _note(job: Job, way: Way, score: float | None) -> str:
    card = checkpoint.read_card(way.model)
    gflop = floating_point_operations(card.model, card.image_size) / 1e9
    scored = "" if score is None else f"Dice {score:.4f} of {len(job.pairs)}, "
    return f"{scored}{gflop:.2f} GFLOP at {card.image_size[1]}x{card.image_size[0]}"
