"""Holds what all sections share: the job, turns, tables, and separate processes for peers."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from unet_ray.config import MaskOptions, TrainConfig
from unet_ray.data import imaging, own_size
from unet_ray.data.pairs import Pair
from unet_ray.inference import backends
from unet_ray.inference.arithmetic import Arithmetic
from unet_ray.inference.resolve import pipeline_of
from unet_ray.models import build, checkpoint
from unet_ray.models.checkpoint import ModelCard
from unet_ray.models.device import run_network
from unet_ray.settings import load_train_config

ROOT = str(Path(__file__).resolve().parents[2])
BASE_64 = (("model.base_channels", 64), ("model.depth", 4), ("model.norm", "batch"), ("data.image_size", 512))
"""U-Net as most people run it: 31 million parameters, 385 GFLOP an image."""


@dataclass(frozen=True, slots=True)
class Line:
    """One measured figure."""

    section: str
    name: str
    seconds: float | None = None
    """Median over the rounds, per image (`train`: per step, `epochs`: per epoch)."""
    ratio: float | None = None
    """Speed relative to the first line of the section, or of its part of the section."""
    note: str = ""
    """Further figures, in words."""


@dataclass(frozen=True, slots=True)
class Job:
    """The images, the model and the settings that all sections measure with."""

    images: list[str]
    pairs: list[Pair]
    model: str
    card: ModelCard
    device: Literal["cpu", "cuda"]
    rounds: int
    milesial: Path | None
    others: tuple[str, ...]
    """Further models of the section `frontier`."""
    folder: Path
    """Holds the outputs; removed at the end."""
    config: TrainConfig
    """The settings of the training step, with the folders of the pairs."""
    names: int
    """Names of the section `names`."""
    plots: Path | None
    """Folder for the plots of `frontier`, `scale` and `names`."""

    def listed(self, count: int) -> str:
        """Writes a list of the first `count` images, for `predict`. Returns its path."""
        location = self.folder / f"first {count}.txt"
        location.write_text("".join(f"{path}\n" for path in self.images[:count]))
        return str(location)

    def decoded(self, count: int) -> list[np.ndarray]:
        """Returns the first `count` images at the model's size, uint8 [H,W,3] each."""
        size = self.card.image_size
        return [imaging.decode_image(Path(path).read_bytes(), 3, size)[0] for path in self.images[:count]]

    def their_scale(self, image: Image.Image) -> float:
        """Returns milesial's `--scale` at which its network sees as many pixels as ours; it keeps the aspect ratio."""
        height, width = self.card.image_size
        return (height * width / (image.width * image.height)) ** 0.5


def in_turns(steps: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Runs all steps one after the other in every round. Returns each one's median seconds; a first round warms up
    and does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def table(section: str, seconds: Mapping[str, float], notes: Mapping[str, str] | None = None) -> list[Line]:
    """Returns a section's lines, with ratios to the first."""
    first = next(iter(seconds.values()))
    return [Line(section, name, value, first / value, (notes or {}).get(name, "")) for name, value in seconds.items()]


def dice(one: np.ndarray, other: np.ndarray) -> float:
    """Returns the Dice of the foregrounds (every class but 0) of two masks."""
    total = int((one > 0).sum()) + int((other > 0).sum())
    return 1.0 if not total else 2 * int(((one > 0) & (one == other)).sum()) / total


class Apart:
    """Runs a measured function in a process of its own.

    Peers run there unchanged: in our process glibc keeps freed memory, which would make them faster too. Our own
    training runs there so that the process holds one network only.

    The process calls `peer(*given)` once. With the arguments of each call, it then calls the returned function.
    """

    def __init__(self, peer: Callable[..., Callable[..., Any]], *given: Any) -> None:
        self.peer, self.given = peer, given
        self.process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.shutdown()

    def __call__(self, *arguments: Any) -> Any:
        return self.process.submit(_asked, self.peer, self.given, arguments).result()


_PEER: list[Callable[..., Any]] = []


def _asked(peer: Callable[..., Callable[..., Any]], given: Sequence[Any], arguments: Sequence[Any]) -> Any:
    if not _PEER:
        _PEER.append(peer(*given))
    return _PEER[0](*arguments)


def arithmetic_for(job: Job, precision: str = "auto", backend: str = "auto") -> Arithmetic:
    """Returns the arithmetic that `predict` would choose on this machine."""
    options = MaskOptions(device=job.device, precision=precision, backend=backend)  # type: ignore[arg-type]
    return pipeline_of(job.model, options).chosen_here().arithmetic  # type: ignore[return-value]


def network_of(job: Job, precision: str = "auto", backend: str = "auto") -> backends.Network:
    """Loads the network as `predict` would on this machine."""
    return backends.load(job.model, arithmetic_for(job, precision, backend), one_by_one=True)[0]


def mask_of(
    network: backends.Network, image: np.ndarray, job: Job, size_hw: tuple[int, int] | None = None
) -> np.ndarray:
    """Returns the class ids, uint8 at `size_hw` (default: the model's size), of one image, uint8 [H,W,3]."""
    scores = scores_of(network, image, job)
    return own_size.to_own_size(scores, size_hw or job.card.image_size, job.card.threshold)


@torch.inference_mode()
def scores_of(network: backends.Network, image: np.ndarray, job: Job) -> np.ndarray:
    """Returns the network's scores, [K,H,W], of one image, uint8 [H,W,3]."""
    tensor = torch.from_numpy(image.copy())[None].to(job.device)
    return run_network(network, tensor, job.card.model, job.card.data)[0].cpu().numpy()


def random_model(folder: Path, *settings: tuple[str, Any]) -> str:
    """Writes a model directory with random weights: the U-Net that most people run, changed by `settings`."""
    config = load_train_config(settings=[*BASE_64, ("data.mask_values", [0, 1]), *settings])
    checkpoint.save_model(str(folder), build(config.model), config, {})
    return str(folder)
