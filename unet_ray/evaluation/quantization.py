"""A network in int8 for CPUs: calibrated on training images, kept only if validation finds it as good."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import logging
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

import numpy as np

from unet_ray.config import EvaluateConfig, UserError
from unet_ray.data import storage
from unet_ray.data.imaging import ImageError
from unet_ray.data.pairs import Pair
from unet_ray.evaluation.evaluate import evaluate
from unet_ray.evaluation.run_pairs import pairs_of, pairs_of_run
from unet_ray.inference import backends
from unet_ray.inference.pipeline import OnProgress, Pipeline
from unet_ray.inference.reader import Reader
from unet_ray.models import checkpoint, compiling
from unet_ray.models.checkpoint import ModelCard
from unet_ray.models.tiles import mirrored
from unet_ray.ray_backend.session import LOCAL

MAY_FALL = 0.001
"""Mean validation Dice that int8 may cost."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """What `quantize` returns."""

    kept: bool
    dice: float
    """Mean over the validation images, of the network as it is."""
    dice_int8: float
    images: int
    """Validation images that both were scored on."""
    calibrated_on: int
    """Training images that the ranges of the activations were taken from."""


def quantize(
    config: EvaluateConfig,
    *,
    calibration: int,
    on_progress: OnProgress = lambda _done, _failed, _all: None,
) -> Quantization:
    """Makes the network of a run in int8, which `predict` then uses on CPUs, in this process.

    Weights and activations become 8-bit integers (symmetric, per channel for weights: NNCF's post-training
    quantization) with ranges from `calibration` training images. Refused, and nothing kept, if the mean Dice on the
    run's validation images is lower by more than `MAY_FALL`.

    Raises UserError for what the user can mend, also where OpenVINO or NNCF are not installed.
    """
    if any(importlib.util.find_spec(name) is None for name in ("openvino", "nncf")):
        raise UserError(f"int8 needs OpenVINO and NNCF: {backends.INSTALL}")
    if config.ensemble or config.precision == "int8":
        raise UserError("unet-ray quantize takes one model, in its own precision")
    plain = Pipeline.of(config.model, dataclasses.replace(config, precision="auto"))
    plain = dataclasses.replace(plain, quantized=None)
    options = dataclasses.replace(plain.options, precision="int8")  # not `auto`, which may fall back to torch
    card = plain.card
    known = pairs_of_run(config.model, "train")
    chosen = np.random.default_rng(0).choice(len(known), min(calibration, len(known)), replace=False)
    images = list(_images([known[number] for number in sorted(chosen)], plain.reader(), card))
    if not images:
        raise UserError(f"{config.model}: none of its training images can be read")
    storage.delete_file(storage.join(plain.model, checkpoint.INT8))
    network = _in_int8(backends.exported(plain.model, card), images)
    data = backends.serialized(network)
    name = f"int8-{hashlib.sha256(data['.xml'] + data['.bin']).hexdigest()[:16]}"
    stem = storage.join(plain.model, name)
    for other in storage.names_in(plain.model):
        if other.startswith("int8-"):
            storage.delete_file(storage.join(plain.model, other))
    backends.write(data, stem)
    pairs = pairs_of(config)
    both = [
        evaluate(config, pipeline=pipeline, pairs=pairs, runtime=LOCAL, on_progress=on_progress)
        for pipeline in (plain, dataclasses.replace(plain, quantized=stem, options=options))
    ]
    before, after = (float(scores.dice.mean or 0) for scores in both)
    result = Quantization(before - after <= MAY_FALL, before, after, both[0].images, len(images))
    if result.kept:
        checkpoint.save_choice(plain.model, checkpoint.INT8, card, {"network": name, **dataclasses.asdict(result)})
    else:
        for end in data:
            storage.delete_file(backends.with_end(stem, end))
    return result


def _images(pairs: Sequence[Pair], reader: Reader, card: ModelCard) -> Iterator[np.ndarray]:
    """uint8 [1,H,W,C] as the network is given them in prediction; what can't be read is left out."""
    side, margin = card.tile if card.model.padding == "valid" else 0, card.model.margin
    for pair in pairs:
        try:
            image, _ = reader.resized(storage.read_bytes(pair.image), card.image_size)
        except (ImageError, OSError):
            continue
        rows, columns = (
            mirrored(((length - side) // 2 if side else 0) - margin, (side or length) + 2 * margin, length)
            for length in card.image_size
        )
        yield image[rows][:, columns][None]


def _in_int8(network: Any, images: Sequence[np.ndarray]) -> Any:
    backends.without_telemetry()
    compiling.without_cuda_chatter()
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)  # its own function silences everybody's handlers
    network.reshape(list(images[0].shape))
    with redirect_stdout(StringIO()):  # progress bars
        quantized = nncf.quantize(network, nncf.Dataset(list(images)), subset_size=len(images))
    quantized.reshape([1, -1, -1, images[0].shape[-1]])
    return quantized
