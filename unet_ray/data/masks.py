"""Infers class values, counts pixels and class weights, maps borders, and cleans up predicted masks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from unet_ray.config import IGNORE, Cleanup, DataConfig, MaskValue, UserError, selectors
from unet_ray.data import mask_files, mask_meaning
from unet_ray.data.imaging import ImageError, decode_mask, read_file, stored_values

SAMPLE = 32
"""Number of masks, evenly spaced over the sorted list, that are read to learn their values."""


def infer_values(mask_paths: Sequence[str], num_classes: int, config: DataConfig) -> tuple[MaskValue, ...]:
    """Infers the stored value of each class from `SAMPLE` masks, once for the whole data set.

    One class: {0, v} is background and foreground, whatever v is (1, 255, a palette index). K classes: the class ids
    0 .. K-1 if no larger value occurs, otherwise the K values that occur, in order. Raises UserError that names the
    values if neither rule fits.
    """
    found: set[int] = set()
    for path in _sample(mask_paths):
        try:
            for file in mask_files.files_of(path):
                found.update(np.unique(stored_values(read_file(file))).tolist())
        except (ImageError, OSError) as error:
            raise UserError(f"{mask_files.shown(path)}: {error}") from None
    values = sorted(found - set(config.ignored))
    ids = max(2, num_classes)
    if config.several_masks == "classes" and len(values) <= 2 and values[:1] == [0]:
        return (0, ">0")  # each file holds one class
    if num_classes == 1 and len(values) == 2:
        return (values[0], values[1])
    if num_classes > 1 and values and values[-1] < ids:
        return tuple(range(ids))
    if num_classes > 1 and len(values) == ids:
        return tuple(values)
    shown = ", ".join(map(str, values[:8])) + (" …" if len(values) > 8 else "")
    raise UserError(
        f"{len(values)} mask value(s) ({shown}) for {ids} classes: name the value of each with "
        "--set data.mask_values='[0, 255]' (JPEG: \"[0, '>=128']\"; numbered objects: \"[0, '>0']\"), their number "
        "with --set model.num_classes=K, and one to leave out with --set data.ignore_index=V; `unet-ray doctor` prints "
        "what fits"
    )


def check_comparisons(mask_paths: Sequence[str], config: DataConfig) -> None:
    """Raises UserError for a comparison in `data.mask_values` that no value of 8-bit masks meets, such as `>=300`."""
    entries = [each for value in config.mask_values or () for each in selectors(value) if isinstance(each, str)]
    never = [each for each in entries if not mask_meaning.matches(each, np.arange(256)).any()]
    if not never:
        return
    for path in _sample(mask_paths):
        try:
            stored = [stored_values(read_file(file)) for file in mask_files.files_of(path)]
        except (ImageError, OSError):
            continue  # the training stops at it, and names it
        if any(values.dtype != np.uint8 for values in stored):
            return
    raise UserError(
        f"data.mask_values: no value of 8 bits is {never[0]}, and the sampled masks have 8 (such as "
        f"{mask_files.shown(mask_paths[0])}): name a value from 0 to 255; `unet-ray doctor` prints what fits"
    )


def inverse_frequencies(mask_paths: Sequence[str], ids: int, config: DataConfig) -> tuple[float, ...]:
    """Computes the weight of each of `ids` class ids from `SAMPLE` masks: pixels / (classes * pixels of the class).

    Raises UserError if a class does not occur in them.
    """
    counts = np.zeros(256, np.int64)
    for path in _sample(mask_paths):
        try:
            mask, _ = decode_mask(mask_files.read(path), config, None)
        except (ImageError, OSError) as error:
            raise UserError(f"{mask_files.shown(path)}: {error}") from None
        counts += np.bincount(mask.ravel(), minlength=256)
    counts = counts[:ids]
    if not counts.all():
        raise UserError(
            f"train.class_weights=inverse: class {np.flatnonzero(counts == 0)[0]} does not occur in a sample of "
            f"{len(_sample(mask_paths))} masks: give the weights as numbers"
        )
    return tuple(float(f"{weight:.6g}") for weight in counts.sum() / (len(counts) * counts))


def _sample(paths: Sequence[str]) -> Sequence[str]:
    return paths[:: max(1, len(paths) // SAMPLE)][:SAMPLE]


def border_map(mask: np.ndarray, sigma: float) -> np.ndarray:
    """Computes 255 * exp(-(d1 + d2)² / 2σ²) on background pixels, 0 elsewhere: uint8 [H,W].

    d1 and d2 are the distances in pixels to the nearest and second nearest object (equation 2 of Ronneberger et al.
    2015, without w0). An object is a connected region (by edges, not corners) of one class other than 0.
    """
    from scipy import ndimage  # imported here, as in `clean`, so that a prediction without it starts faster

    reach = int(np.ceil(3.53 * sigma))  # farther away the map rounds to 0
    nearest = np.full(mask.shape, np.inf, np.float32)
    second = nearest.copy()
    for class_id in set(np.unique(mask).tolist()) - {0, IGNORE}:
        labels, _ = ndimage.label(mask == class_id)
        # Distances are computed in a window around each object; on the whole image they would take far longer.
        for label, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
            window = (
                slice(max(0, rows.start - reach), rows.stop + reach),
                slice(max(0, columns.start - reach), columns.stop + reach),
            )
            distance = ndimage.distance_transform_edt(labels[window] != label).astype(np.float32)
            nearest_so_far = nearest[window]
            second[window] = np.minimum(second[window], np.maximum(nearest_so_far, distance))
            nearest[window] = np.minimum(nearest_so_far, distance)
    weight = np.exp(-((nearest + second) ** 2) / (2 * sigma**2))
    return np.where(mask == 0, np.rint(255 * weight), 0).astype(np.uint8)


def pixel_counts(mask: np.ndarray, classes: int) -> list[int]:
    """Counts the pixels of each class id in uint8 [H,W]."""
    if classes == 2:
        foreground = int(np.count_nonzero(mask))
        return [mask.size - foreground, foreground]
    # Line by line, because bincount converts each pixel to 8 bytes.
    return np.sum([np.bincount(line, minlength=classes) for line in mask], axis=0).tolist()


def clean(mask: np.ndarray, cleanup: Cleanup) -> np.ndarray:
    """Returns a cleaned-up copy of class ids, uint8 [H,W]."""
    from scipy import ndimage

    cleaned = mask.copy()
    least = max(cleanup.min_area, cleanup.min_share * mask.size)
    for class_id in set(np.unique(mask).tolist()) - {0}:
        if least or cleanup.largest:
            labels, count = ndimage.label(mask == class_id)
            areas = np.bincount(labels.ravel(), minlength=count + 1)
            kept = areas >= least
            if cleanup.largest:
                kept &= np.arange(count + 1) == 1 + areas[1:].argmax()
            kept[0] = True
            cleaned[~kept[labels]] = 0
    if cleanup.holes:
        for class_id in set(np.unique(cleaned).tolist()) - {0}:
            filled = ndimage.binary_fill_holes(cleaned == class_id)
            cleaned[filled & (cleaned == 0)] = class_id
    return cleaned
