"""Measures the prediction of a folder to PNG masks, after the start."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from measures.common import Apart, Job, Line, mask_of, network_of, table
from unet_ray.config import PredictConfig, UserError
from unet_ray.inference.predict import predict
from unet_ray.ray_backend.session import Runtime, ray_session


class Milesial:
    """Runs milesial/Pytorch-UNet's predict.py from its checkout, with random weights: image in, PNG out."""

    def __init__(self, checkout: Path, job: Job) -> None:
        sys.path.insert(0, str(checkout))
        self.code = importlib.import_module("predict")
        self.job, self.out = job, job.folder / "milesial"
        self.out.mkdir()
        self.network = importlib.import_module("unet").UNet(n_channels=3, n_classes=2)

    def __call__(self, path: str) -> None:
        image = Image.open(path)
        mask = self.code.predict_img(self.network, image, torch.device("cpu"), self.job.their_scale(image))
        self.code.mask_to_image(mask, [0, 1]).save(self.out / f"{Path(path).stem}_OUT.png")


Reports = list[tuple[float, int]]
"""(time in seconds, images finished by then) of each report."""


def reports_of(run: Callable[[Callable[[int, int, int], None]], object]) -> Reports:
    """Runs a prediction. Returns its reports, from the first finished images on."""
    reports: Reports = []
    run(lambda done, _failed, images: reports.append((time.perf_counter(), done)) if images and done else None)
    return reports


def steady(reports: Reports, begin: float = 0, end: float = 1) -> float:
    """Returns the seconds per image between the first and the last report, or between two shares of the images.
    Raises UserError if there is one report only."""
    (_, first), (_, last) = reports[0], reports[-1]
    if first == last:
        raise UserError(f"{last} images are done at once: give more --images to see a rate")
    bounds = [first + share * (last - first) for share in (begin, end)]
    begun, ended = (next(report for report in reports if report[1] >= bound) for bound in bounds)
    return (ended[0] - begun[0]) / max(1, ended[1] - begun[1])


def seconds_an_image(config: PredictConfig, *, local: bool) -> float:
    """Predicts. Returns the seconds per image, without the start."""
    return steady(reports_of(lambda tell: predict(config, runtime=Runtime(local=local), on_progress=tell)))


def seconds_each(function: Callable[[Any], object], arguments: Sequence[Any]) -> float:
    """Calls the function with each argument. Returns the mean seconds of a call."""
    started = time.perf_counter()
    for argument in arguments:
        function(argument)
    return (time.perf_counter() - started) / len(arguments)


def predict_section(job: Job) -> Iterator[Line]:
    outs = itertools.count()

    def ours(*, local: bool) -> float:
        out = str(job.folder / f"out{next(outs)}")
        config = PredictConfig(model=job.model, inputs=(job.listed(96),), out=out, device=job.device)
        return seconds_an_image(config, local=local)

    alone = partial(mask_of, network_of(job), job=job)
    decoded = job.decoded(8)
    milesial = None if job.milesial is None else Apart(Milesial, job.milesial, job)
    seconds: dict[str, list[float]] = {}
    with ray_session(), milesial or nullcontext():
        if milesial is not None:
            milesial(job.images[0])  # starts
        for _ in range(job.rounds):
            if milesial is not None:
                seconds.setdefault("milesial's predict.py", []).append(seconds_each(milesial, job.images[:3]))
            for image in decoded[:2]:  # warms up
                alone(image)
            seconds.setdefault("model alone", []).append(seconds_each(alone, decoded))
            seconds.setdefault("--local", []).append(ours(local=True))
            seconds.setdefault("through Ray", []).append(ours(local=False))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    notes = {
        name: f"{medians['model alone'] / medians[name]:.3f} of the model's own rate"
        for name in ("--local", "through Ray")
    }
    yield from table("predict", medians, notes)
