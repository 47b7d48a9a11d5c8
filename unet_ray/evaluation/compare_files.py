"""Scores masks that any tool has made, with the scores of `evaluate`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from unet_ray import metrics
from unet_ray.config import IGNORE, DataConfig, MaskValue, UserError
from unet_ray.data import imaging, mask_files
from unet_ray.data.imaging import ImageError
from unet_ray.data.pairs import Pair, find_pairs
from unet_ray.data.progress import OnProgress
from unet_ray.metrics import ImageScores, Scores

Locations = str | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Meaning:
    """Says what the values of predictions and of ground truth stand for."""

    classes: int
    """K as in `ModelConfig.num_classes`: 1 for one foreground class."""
    predicted: DataConfig
    truth: DataConfig

    def __str__(self) -> str:
        def text(data: DataConfig) -> str:
            values = data.mask_values or ()
            return ", ".join(str(value) for value in values[:8]) + (" …" if len(values) > 8 else "")

        what = "background and foreground" if self.classes == 1 else f"{self.classes} classes"
        return f"{what}: {text(self.predicted)} in the predictions, {text(self.truth)} in the masks"


def find_predictions(predictions: Locations, masks: Locations, match: str | None = None) -> list[Pair]:
    """Pairs each prediction with its ground truth by name, as images with masks; `Pair.image` is the prediction.

    Raises UserError if nothing pairs.
    """
    return find_pairs(DataConfig(images=predictions, masks=masks, match=match), say=True)


def same_images(pairs: Sequence[Pair], others: Sequence[Pair], of: str) -> list[Pair]:
    """Returns the pairs of another tool's predictions, `others`, for the same ground truth. Raises UserError if some
    have none there (`of`: where they are)."""
    by_mask = {pair.mask: pair for pair in others}
    lacking = [pair.key for pair in pairs if pair.mask not in by_mask]
    if lacking:
        raise UserError(f"--against {of}: no prediction of {len(lacking)} of the images, such as {lacking[0]}")
    return [by_mask[pair.mask] for pair in pairs]


def meaning_of(pairs: Sequence[Pair], mask_values: tuple[MaskValue, ...] | None = None) -> Meaning:
    """Tells from the values of all files what they stand for.

    Files with one value beside 0 are background and foreground, whatever that value is (1, 255, …). Otherwise values
    are class ids, and 255 in the ground truth is left out. `mask_values`: the value of each class in both; for
    predictions that hold class ids, in the ground truth. Raises UserError if this does not fit.
    """
    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        predicted = sorted(set().union(*threads.map(_values, [pair.image for pair in pairs])))
        truth = sorted(set().union(*threads.map(_values, [pair.mask for pair in pairs])))
    if mask_values is not None:
        ids = tuple(range(len(mask_values)))
        theirs: tuple[MaskValue, ...] = ids if set(predicted) <= set(ids) else mask_values
        return Meaning(
            1 if len(ids) == 2 else len(ids), DataConfig(mask_values=theirs), DataConfig(mask_values=mask_values)
        )
    if max(len({0, *predicted}), len({0, *truth})) <= 2:
        two = [DataConfig(mask_values=(0, max([1, *values]))) for values in (predicted, truth)]
        return Meaning(1, *two)
    classes = 1 + max([value for value in truth if value != IGNORE] + predicted)
    if classes > IGNORE or (classes > 64 and classes > 2 * len({*predicted, *truth})):
        shown = ", ".join(map(str, [*predicted[:4], *truth[:4]]))
        raise UserError(f"values such as {shown} are no class ids: name the value of each class with --mask-values")
    ids = tuple(range(classes))
    data = DataConfig(mask_values=ids)
    return Meaning(1 if classes == 2 else classes, data, dataclasses.replace(data, ignore_index=IGNORE))


def _values(location: str) -> set[int]:
    try:
        return {
            value
            for file in mask_files.files_of(location)
            for value in np.unique(imaging.stored_values(imaging.read_file(file))).tolist()
        }
    except (ImageError, OSError):  # scoring it says why
        return set()


def score_files(
    pairs: Sequence[Pair],
    meaning: Meaning,
    tolerance: float,
    on_progress: OnProgress = lambda _done, _failed, _all: None,
) -> Scores:
    """Scores predictions against their ground truth, at its own size. Raises UserError if none can be scored."""
    scored, failures = [], []
    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        for pair, found in zip(pairs, _in_order(threads, pairs, meaning, tolerance), strict=True):
            if isinstance(found, str):
                failures.append((pair.image, found))
            else:
                scored.append((pair.mask, *found))  # by which the same image is found among other predictions
            on_progress(len(scored) + len(failures), len(failures), len(pairs))
    if not scored:
        raise UserError(f"none of {len(pairs)} pairs could be scored; the first: {failures[0][0]}: {failures[0][1]}")
    paths, counts, pixels, surfaces = zip(*scored, strict=True)
    names = ("foreground",) if meaning.classes == 1 else tuple(f"class {k}" for k in range(meaning.classes))
    each = ImageScores(paths, np.stack(counts), np.array(pixels), np.stack(surfaces), names)
    return metrics.score(each, tolerance, failures)


Found = tuple[np.ndarray, int, np.ndarray]
"""Counts int64 [K,3], valid pixels, surface scores [K,3]."""


def _in_order(
    threads: ThreadPoolExecutor, pairs: Sequence[Pair], meaning: Meaning, tolerance: float
) -> Iterator[Found | str]:
    return threads.map(lambda pair: _compared(pair, meaning, tolerance), pairs)


def _compared(pair: Pair, meaning: Meaning, tolerance: float) -> Found | str:
    """Returns the scores of one prediction, or the reason of the failure."""
    try:
        predicted = _ids(pair.image, meaning.predicted)
        truth = _ids(pair.mask, meaning.truth)
    except (ImageError, OSError) as error:
        return str(error)
    if predicted.shape != truth.shape:
        sizes = [f"{each.shape[1]}x{each.shape[0]}" for each in (predicted, truth)]
        return f"{sizes[0]} pixels, and the mask has {sizes[1]}"
    counts = metrics.count(torch.from_numpy(predicted)[None], torch.from_numpy(truth)[None], meaning.classes)
    surface = metrics.surface_scores(predicted, truth, meaning.classes, tolerance)
    return counts[0].numpy(), int((truth != IGNORE).sum()), surface


def _ids(location: str, data: DataConfig) -> np.ndarray:
    """Returns class ids, uint8 [H,W]. Raises ImageError, OSError."""
    return imaging.decode_mask(mask_files.read(location), data, None)[0]
