"""Exports a network to a file that other programs run without unet_ray, checked against torch on real images."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.util
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from unet_ray import __version__
from unet_ray.config import ModelConfig, UserError, first_line, nearest
from unet_ray.data import imaging, storage
from unet_ray.data.imaging import ImageError
from unet_ray.data.inputs import evenly
from unet_ray.evaluation.export_forms import FORMS, Runs, Work
from unet_ray.evaluation.run_pairs import pairs_of_run
from unet_ray.inference import backends
from unet_ray.inference.portable import Portable
from unet_ray.inference.reader import Reader
from unet_ray.models import checkpoint
from unet_ray.models.checkpoint import ModelCard

CHECKED = 8
"""Validation images on which the file is compared with torch, half of them at an odd size."""
CALIBRATION = 32
"""Training images that give the ranges of activations in int8."""
MAY_DIFFER = {"fp32": 1e-4, "fp16": 0.02}
"""Precision -> the largest difference of a probability."""
WITH_INSTANCE_NORM = 5e-3
"""The same in fp32 for networks with instance norm. Where an image is nearly one colour, as the margins of MRI slices,
it magnifies what programs round differently. Measured on BraTS: 3e-4 onnxruntime, 1.2e-3 OpenVINO."""
MAY_DIFFER_IN_CLASS = {"fp32": 1e-4, "fp16": 5e-3, "int8": 5e-3}
"""Precision -> the largest share of pixels whose class differs. In int8 only this counts: probabilities near an edge
differ more, without another decision."""


@dataclass(frozen=True, slots=True)
class Exported:
    """Says what `export` has written, and how far it differs from torch."""

    file: str
    about: str
    """The JSON file beside it, for people and programs."""
    difference: float
    """Largest difference of a probability, or with `by_class` the largest share of pixels of another class."""
    by_class: bool
    """Whether classes were compared: those of a network that decides, and those of int8."""
    images: int
    """Images that were compared."""
    real: bool
    """Whether they were the run's validation images; else they were noise."""
    bytes: int


def export(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: str | None = None,
    *,
    decide: bool = False,
    precision: str = "fp32",
    allow_code: bool = False,
) -> Exported:
    """Writes the network of a run or model directory for other programs, with a JSON file about it.

    `to`: one of `FORMS`; None: by the name of the file. `decide`: it gives class ids instead of probabilities.
    `precision`: fp32, fp16 or int8, as far as the form has it. Nothing is written unless the file, opened by its own
    program, gives what torch gives. `allow_code`: see `checkpoint.load_model`. Raises UserError.

    >>> import unet_ray
    >>> unet_ray.export("RUN", "network.pt").difference < 1e-4
    True
    """
    model, out = storage.absolute(model), storage.absolute(out)
    location, form = checkpoint.model_directory(model), to or form_of(out)
    _check(form, out, precision)
    network, card = checkpoint.load_model(location, allow_code=allow_code)
    card = dataclasses.replace(card, threshold=checkpoint.read_threshold(location, card))
    reference = Portable(copy.deepcopy(network.eval()), card.threshold if decide else None).eval()
    backends.fold_batch_norm(network)
    portable = Portable(network, reference.threshold).eval()
    images, real = _images(model, card, portable.step)
    calibration = _images_of(model, card, "train", CALIBRATION) if precision == "int8" else []
    if precision == "int8" and not calibration:
        raise UserError(f"--precision int8 needs the training images of a run: {model} has none that can be read")
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder, PurePosixPath(storage.split_options(out)[0]).name)
        try:
            work = Work(portable, torch.from_numpy(_odd(images[0], card.model)), path, precision, calibration)
            runs = FORMS[form].write(work)
            by_class = decide or precision not in MAY_DIFFER
            threshold = card.threshold if by_class else None
            difference = max(_difference(runs, reference, image, threshold) for image in images)
        except Exception as error:  # exporters and runtimes raise many kinds
            raise UserError(f"this network can't be exported to {form}: {first_line(error)[:300]}") from error
        bound = _bound(card, precision, by_class)
        if not difference <= bound:
            raise UserError(f"refused: {form} differs from torch by {difference:.2g}, and {bound:g} is allowed")
        files = {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}
    measured = "largest_share_of_differing_pixels" if by_class else "largest_difference_from_torch"
    about = {**_about(card, portable, form, precision), measured: difference}
    parent = storage.parent(out)
    for name, data in files.items():
        storage.write_bytes(storage.join(parent, name), data)
    beside = backends.with_suffix(out, ".json")
    storage.write_bytes(beside, (json.dumps(about, indent=2) + "\n").encode())
    return Exported(out, beside, difference, by_class, len(images), real, sum(map(len, files.values())))


def _bound(card: ModelCard, precision: str, by_class: bool) -> float:
    """Returns the difference from torch with which a file is accepted."""
    if by_class:
        return MAY_DIFFER_IN_CLASS[precision]
    return max(MAY_DIFFER[precision], WITH_INSTANCE_NORM if card.model.norm == "instance" else 0)


def form_of(out: str) -> str:
    """Returns the form that a file's name stands for. Raises UserError."""
    name = storage.split_options(out)[0]
    found = [form for form, each in FORMS.items() if name.endswith(each.suffix)]
    if not found:
        known = ", ".join(f"{each.suffix} ({form})" for form, each in FORMS.items())
        raise UserError(f"--out {out}: a name that ends with one of {known}")
    return found[0]


def _check(form: str, out: str, precision: str) -> None:
    """Raises UserError if this can't be written."""
    if form not in FORMS:
        raise UserError(f"to={form!r} is not one{nearest(form, FORMS)}")
    needs = FORMS[form].needs
    if missing := [name for name in needs if importlib.util.find_spec(name) is None]:
        raise UserError(f"--to {form} needs {', '.join(missing)}: pip install 'unet_ray[{FORMS[form].extra}]'")
    suffix = FORMS[form].suffix
    if not storage.split_options(out)[0].endswith(suffix):
        raise UserError(f"--out {out}: the name of {form} files ends with {suffix}")
    if precision not in FORMS[form].precisions:
        others = " or ".join(name for name, each in FORMS.items() if precision in each.precisions)
        hint = ", and `unet-ray quantize` makes one for OpenVINO" if precision == "int8" else ""
        raise UserError(f"--precision {precision} is for --to {others}{hint}")


def _images(model: str, card: ModelCard, step: int) -> tuple[list[np.ndarray], bool]:
    """Returns images uint8 [1,H,W,C] to compare on, and whether they are real: validation images, or noise if there are
    none."""
    found = _images_of(model, card, "val", CHECKED)
    real = bool(found)
    if not real:
        shape = (4, 1, *card.image_size, card.model.in_channels)
        found = list(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    if card.model.padding == "same":
        found = [_long_enough(image, step) for image in found]
    return [_odd(image, card.model) if number % 2 else image for number, image in enumerate(found)], real


def _images_of(model: str, card: ModelCard, part: str, count: int) -> list[np.ndarray]:
    """Returns images of a run's part at the network's size, uint8 [1,H,W,C]; none if they can't be read."""
    reader, found = Reader.of(card, 10**9), []
    with contextlib.suppress(UserError):
        for pair in evenly(pairs_of_run(model, part), count):
            with contextlib.suppress(ImageError, OSError):
                found.append(reader.resized(imaging.read_file(pair.image), card.image_size)[0][None])
    return found


def _long_enough(image_NHWC: np.ndarray, step: int) -> np.ndarray:
    """Repeats an image until its sides are longer than the network's step: torch.export takes shorter ones for another
    case, which it leaves out."""
    beyond = [(0, max(0, 2 * step + 3 - side)) for side in image_NHWC.shape[1:3]]
    return np.pad(image_NHWC, ((0, 0), *beyond, (0, 0)), mode="wrap")


def _odd(image_NHWC: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Returns a part of an image, of a size that the network has to pad; unpadded networks take only certain sizes."""
    if config.padding == "valid":
        return image_NHWC
    height, width = image_NHWC.shape[1:3]
    return np.ascontiguousarray(image_NHWC[:, : max(1, height - 3), : max(1, width - 5)])


def _difference(runs: Runs, portable: Portable, image: np.ndarray, threshold: float | None) -> float:
    """Returns the largest difference of a probability, or with a threshold the share of pixels of another class."""
    with torch.inference_mode():
        expected = portable(torch.from_numpy(image)).numpy()
    actual = runs(image)
    if actual.shape != expected.shape:
        return float("inf")
    if threshold is None:
        return float(np.abs(actual.astype(np.float64) - expected).max())
    if portable.threshold is None:
        actual, expected = _decided(actual, threshold), _decided(expected, threshold)
    return float((actual != expected).mean())


def _decided(probability_NKHW: np.ndarray, threshold: float) -> np.ndarray:
    one_class = probability_NKHW.shape[1] == 1
    return probability_NKHW[:, 0] > threshold if one_class else probability_NKHW.argmax(axis=1)


def _about(card: ModelCard, portable: Portable, form: str, precision: str) -> dict[str, Any]:
    """Returns what a program must know to use the file."""
    height, width = card.image_size
    channels = {1: "gray", 3: "RGB"}.get(card.model.in_channels, f"{card.model.in_channels} channels")
    sizes = "any height and width" if portable.padded else f"sizes as {height}x{width}: the network pads nothing"
    classes = list(card.classes) or (["background", "foreground"] if card.model.num_classes == 1 else [])
    return {
        "made_by": f"unet_ray {__version__}",
        "format": form,
        "precision": precision,
        "input": f"image: uint8 [1, height, width, {card.model.in_channels}], {channels}, {sizes}",
        "output": "classes: uint8 [1, height, width]"
        if portable.threshold is not None
        else f"probability: float32 [1, {card.model.num_classes}, height, width]"
        + (", of the foreground" if card.model.num_classes == 1 else ", of each class"),
        "image_size": [height, width],
        "resize": "the network was trained on whole images resized to image_size [height, width], bilinear with "
        "antialiasing (Pillow's BILINEAR); resize probabilities back bilinearly, then decide",
        "value_range": card.value_range,
        "classes": classes,
        "mask_values": list(card.of_masks.get("mask_values") or ()),
        "threshold": card.threshold,
        "validation": {name: value for name, value in card.scores.items() if name.startswith("val_dice")},
        "weights_sha256": card.weights_sha256,
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides what exporters warn of: branches that depend on sizes only, and their own future."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
