"""Converts a network to int8 for CPUs: calibrates it on training images, and keeps it if it is as good and faster."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO
from typing import Any

import numpy as np

from unet_ray.config import EvaluateConfig, UserError
from unet_ray.data import imaging, storage
from unet_ray.data.imaging import ImageError
from unet_ray.data.pairs import Pair
from unet_ray.data.progress import OnProgress
from unet_ray.evaluation.evaluate import evaluate
from unet_ray.evaluation.run_pairs import pairs_of, pairs_of_run
from unet_ray.inference import backends
from unet_ray.inference.arithmetic import INSTALL, Arithmetic
from unet_ray.inference.choose_arithmetic import choose
from unet_ray.inference.pipeline import Pipeline
from unet_ray.inference.resolve import pipeline_of
from unet_ray.models import checkpoint, compiling
from unet_ray.models.device import instruction_set
from unet_ray.own_process import is_own
from unet_ray.ray_backend.session import LOCAL

MAY_FALL = 0.001
"""Largest loss of mean validation Dice with which int8 is accepted."""
STEM = "int8-"
"""Prefix of the names of int8 files."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """Says whether int8 was accepted, and how it scored."""

    dice: float
    """Mean Dice of the original network over the validation images."""
    dice_int8: float
    images: int
    """Number of validation images on which both networks were scored."""
    calibrated_on: int
    """Number of training images that gave the ranges of the activations."""
    speedup: float
    """The original network's time for an image on this CPU, divided by the int8 network's."""

    @property
    def problem(self) -> str:
        """Why it was refused; empty if it was kept."""
        if self.dice - self.dice_int8 > MAY_FALL:
            return f"Dice falls by {self.dice - self.dice_int8:.3g}, more than {MAY_FALL}"
        return "" if self.speedup > 1 else f"int8 takes {1 / self.speedup:.2f} times as long on this CPU"


def quantize(
    config: EvaluateConfig,
    *,
    calibration: int,
    on_progress: OnProgress = lambda _done, _failed, _all: None,
) -> Quantization:
    """Converts the network of a run to int8, in this process. `predict` then uses it on CPUs.

    Weights and activations become 8-bit integers (symmetric, per channel for weights: NNCF's post-training
    quantization) with ranges from `calibration` training images. The result is refused and deleted if the mean Dice on
    the run's validation images is lower by more than `MAY_FALL`, or if it is not faster, as on CPUs without
    instructions for int8; what was accepted on another kind of processor then stays. A result holds for processors with
    the same instruction set only, which the record names.

    Raises UserError for what the user must fix, also if OpenVINO or NNCF is not installed.
    """
    if any(importlib.util.find_spec(name) is None for name in ("openvino", "nncf")):
        raise UserError(f"int8 needs OpenVINO and NNCF: {INSTALL}")
    if config.ensemble or config.precision == "int8":
        raise UserError("unet-ray quantize takes one model, in its own precision")
    unchosen = pipeline_of(config.model, dataclasses.replace(config, precision="auto"))
    images = _calibration_images(config.model, unchosen, calibration)
    plain = unchosen.chosen_here(settle=partial(choose, int8=False))
    before = checkpoint.read_choice(plain.model, checkpoint.INT8, plain.card) or {}
    network = _in_int8(backends.exported(plain.model, plain.card), images)
    name = _stored(backends.serialized(network), plain.model)
    assert plain.arithmetic is not None, "just chosen"
    instructions = instruction_set()
    arithmetic = Arithmetic("cpu", "openvino", plain.arithmetic.precision, name, instructions)
    in_int8 = dataclasses.replace(plain, arithmetic=arithmetic)
    pairs = pairs_of(config)
    scores, scores_int8 = (
        evaluate(config, pipeline=pipeline, pairs=pairs, runtime=LOCAL, on_progress=on_progress)
        for pipeline in (plain, in_int8)
    )
    dice, dice_int8 = float(scores.dice.mean or 0), float(scores_int8.dice.mean or 0)
    seconds, seconds_int8 = plain.times([plain.arithmetic, arithmetic])
    result = Quantization(dice, dice_int8, scores.images, len(images), seconds / seconds_int8)
    if not result.problem:
        choice = {"network": name, "instructions": instructions, **dataclasses.asdict(result)}
        checkpoint.save_choice(plain.model, checkpoint.INT8, plain.card, choice)
        kept = name
    elif before.get("instructions", instructions) == instructions:
        storage.delete_file(storage.join(plain.model, checkpoint.INT8))
        kept = ""
    else:  # other processors go on with theirs
        kept = before["network"]
    _delete_networks(plain.model, kept)
    return result


def _calibration_images(run: str, pipeline: Pipeline, count: int) -> list[np.ndarray]:
    """Returns `count` training images of a run, drawn with a fixed seed. Raises UserError if none can be read."""
    known = pairs_of_run(run, "train")
    chosen = np.random.default_rng(0).choice(len(known), min(count, len(known)), replace=False)
    images = list(_images([known[number] for number in sorted(chosen)], pipeline))
    if not images:
        raise UserError(f"{run}: none of its training images can be read")
    return images


def _stored(files: dict[str, bytes], model: str) -> str:
    """Writes the int8 network into the model directory. Returns the stem of its files."""
    name = f"{STEM}{backends.checksum(files)[:16]}"
    backends.write(files, storage.join(model, name))
    return name


def _delete_networks(model: str, kept: str) -> None:
    """Deletes all int8 networks but the one with this stem."""
    for name in storage.names_in(model):
        if name.startswith(STEM) and not (kept and name.startswith(kept)):
            storage.delete_file(storage.join(model, name))


def _images(pairs: Sequence[Pair], pipeline: Pipeline) -> Iterator[np.ndarray]:
    """Yields images in the form in which prediction passes them to the network, uint8 [1,H,W,C]. Skips images that
    can't be read."""
    for pair in pairs:
        try:
            yield pipeline.network_input(imaging.read_file(pair.image))
        except (ImageError, OSError):
            continue


def _in_int8(network: Any, images: Sequence[np.ndarray]) -> Any:
    """Returns an openvino.Model in int8. The images give the ranges of its activations."""
    compiling.without_cuda_chatter()
    network.reshape(list(images[0].shape))
    with backends.without_telemetry(), redirect_stdout(StringIO()):  # hides progress bars
        import nncf

        if is_own():
            # NNCF's own function would silence other loggers' handlers, too.
            logging.getLogger("nncf").setLevel(logging.ERROR)
        quantized = nncf.quantize(network, nncf.Dataset(list(images)), subset_size=len(images))
    quantized.reshape([1, -1, -1, images[0].shape[-1]])
    return quantized
