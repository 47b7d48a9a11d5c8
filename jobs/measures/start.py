"""Measures `--help`, one image from a cold start, a training's first step, and the first mask through Ray by part."""

from __future__ import annotations

import itertools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from PIL import Image

from measures.common import ROOT, Job, Line, in_turns, table
from measures.train import small_training
from unet_ray.config import PredictConfig
from unet_ray.inference.predict import predict
from unet_ray.models.run_files import METRICS
from unet_ray.ray_backend.session import ray_session
from unet_ray.training.results import read_metrics


def start_section(job: Job) -> Iterator[Line]:
    one = job.folder / "one"
    one.mkdir()
    image = one / Path(job.images[0]).name
    shutil.copy(job.images[0], image)
    command = [sys.executable, "-m", "unet_ray"]
    environment = {**os.environ, "PYTHONPATH": ROOT}
    outs = itertools.count()

    def run(*arguments: str) -> None:
        subprocess.run([*command, *arguments], check=True, capture_output=True, env=environment)

    def ours() -> None:
        run("predict", job.model, str(image), "--out", str(job.folder / f"cold{next(outs)}"), "--local")

    steps: dict[str, Callable[[], object]] = {}
    if job.milesial is not None:
        steps["one image, milesial's predict.py"] = _theirs_cold(job, str(image))
    steps["one image, --local"] = ours
    yield from table("start", in_turns(steps, job.rounds))
    yield from table("start", in_turns({"--help": lambda: run("--help")}, 5))
    if job.pairs:
        for name, where in (("first training step, --local", ["--local"]), ("first training step, Ray", [])):
            yield Line("start", name, statistics.median(_to_first_step(job, run, where) for _ in range(job.rounds)))
    out = str(job.folder / "first")
    started = time.perf_counter()
    with ray_session():
        ready = time.perf_counter() - started
        summary = predict(PredictConfig(model=job.model, inputs=(job.listed(8),), out=out, device=job.device))
    parts = {"Ray": ready, "listing": summary.stages["listing"], "to the first masks": summary.stages["starting"]}
    note = ", ".join(f"{name} {value:.1f} s" for name, value in parts.items())
    yield Line("start", "first mask through Ray", sum(parts.values()), None, f"{note}; imports come before")


def _to_first_step(job: Job, run: Callable[..., None], where: Sequence[str]) -> float:
    """Returns the seconds from the command to the first step of a training."""
    with tempfile.TemporaryDirectory(dir=job.folder) as folder:
        settings = [part for name, value in small_training(job, 16) for part in ("--set", f"{name}={value}")]
        started = time.time()
        run("train", "--out", f"{folder}/RUN", "--epochs", "1", "--no-report", *settings, *where)
        ended = Path(folder, "RUN", METRICS).stat().st_mtime  # when its only epoch was written down
        return ended - read_metrics(f"{folder}/RUN")[0]["seconds"] - started


def _theirs_cold(job: Job, image: str) -> Callable[[], object]:
    """Returns a call of milesial's command on one image, with as many pixels as ours and random weights."""
    assert job.milesial is not None
    weights = job.folder / "milesial.pth"
    code = f"import torch; from unet import UNet; torch.save(UNet(3, 2).state_dict(), {str(weights)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=job.milesial)
    with Image.open(image) as opened:
        scale = job.their_scale(opened)
    arguments = ["-m", str(weights), "-i", image, "-o", str(job.folder / "theirs.png"), "-s", str(scale)]
    command = [sys.executable, "predict.py", *arguments]
    return lambda: subprocess.run(command, check=True, capture_output=True, cwd=job.milesial)
