"""Measures what a user buys: images a second from photographs to PNG masks, at a mean Dice, for several models."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from PIL import Image

from measures.common import Apart, Job, Line, dice, table
from measures.predict import Milesial, seconds_an_image, seconds_each
from unet_ray.config import PredictConfig
from unet_ray.data import imaging, storage
from unet_ray.models import checkpoint
from unet_ray.models.operations import floating_point_operations
from unet_ray.ray_backend.session import ray_session

LEAST = 600
"""So many images are predicted at least. Fewer are repeated: a run of some seconds says little."""


def frontier_section(job: Job) -> Iterator[Line]:
    """Predicts the images with every model in turns, `--local` and through Ray; the start is not counted."""
    folder = _repeated(job)
    seconds: dict[str, list[float]] = {}
    notes: dict[str, str] = {}
    with ExitStack() as stack:
        stack.enter_context(ray_session())
        milesial = None if job.milesial is None else stack.enter_context(Apart(Milesial, job.milesial, job))
        if milesial is not None:
            milesial(job.images[0])  # starts
        outs = itertools.count()
        for _ in range(job.rounds):
            if milesial is not None:
                seconds.setdefault("milesial's predict.py", []).append(seconds_each(milesial, job.images[:3]))
            for model in dict.fromkeys((job.model, *job.others)):
                for way, local in (("--local", True), ("through Ray", False)):
                    name = f"{_short(model)} {way}"
                    out = job.folder / f"frontier {next(outs)}"
                    config = PredictConfig(model=model, inputs=(folder,), out=str(out), device=job.device)
                    seconds.setdefault(name, []).append(seconds_an_image(config, local=local))
                    notes.setdefault(name, _note(job, model, out))
    yield from table("frontier", {name: statistics.median(values) for name, values in seconds.items()}, notes)


def _repeated(job: Job) -> str:
    """Returns a folder with `LEAST` images or more: links to those of the job, all of them equally often."""
    folder = job.folder / "repeated"
    for turn in range(-(-LEAST // len(job.images))):
        (folder / str(turn)).mkdir(parents=True)
        for path in job.images:
            (folder / str(turn) / Path(path).name).symlink_to(Path(path).resolve())
    return str(folder)


def _short(model: str) -> str:
    """Returns the name of a run, or of a model directory outside of one."""
    path = Path(model)
    return path.parent.name if path.name == "model" else path.name


def _note(job: Job, model: str, out: Path) -> str:
    """Returns the mean Dice of the masks in `out`, and the network's size."""
    card = checkpoint.read_card(model)
    gflop = floating_point_operations(card.model, card.image_size) / 1e9
    found = []
    for pair in job.pairs:
        predicted = np.asarray(Image.open(out / "masks/0" / f"{Path(pair.image).stem}.png")).astype(np.uint8)
        truth, _ = imaging.decode_mask(storage.read_bytes(pair.mask), job.config.data, None)
        found.append(dice(predicted, truth))
    scored = f"Dice {statistics.mean(found):.4f} of {len(found)}, " if found else ""
    return f"{scored}{gflop:.2f} GFLOP at {card.image_size[1]}x{card.image_size[0]}"
