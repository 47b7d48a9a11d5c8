"""Says which class a stored value, or a colour, of a mask is: `data.mask_values`, `data.mask_colors`, and what else."""

from __future__ import annotations

import functools
import operator
from typing import Any, cast

import numpy as np

from unet_ray.config import COMPARISON, IGNORE, Colour, DataConfig, MaskValue, colour_code, colours_of, selectors
from unet_ray.data.headers import ImageError

UNKNOWN = -1
LEFT_OUT = 2**16
"""Stands for stored values below 0, which a table can't have."""
COMPARE = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}


def class_ids(stored: np.ndarray, data: DataConfig) -> np.ndarray:
    """Returns class ids, uint8 [H,W], with `IGNORE` for pixels to leave out.

    `stored`: integers [H,W]; with `data.mask_colors` they are colours as `config.colour_code` writes them. Raises
    ImageError that names the values that are no class.
    """
    if data.mask_colors:
        table = _table_of_colours(data.mask_colors, data.ignored)
    else:
        stored = _not_negative(stored, data)
        assert data.mask_values is not None, "resolve mask_values first: see masks.infer_values"
        table = _table(data.mask_values, data.ignored)
    ids = table[stored]
    if ids.min(initial=0) < 0 and data.mask_nearest and data.mask_colors:
        ids[ids < 0] = _nearest(stored[ids < 0], data)
    if ids.min(initial=0) < 0:
        raise ImageError(_unknown(np.unique(stored[ids < 0]), data))
    return ids.astype(np.uint8)


def _nearest(stored: np.ndarray, data: DataConfig) -> np.ndarray:
    """Returns the class id, or `IGNORE`, of the colour that is nearest to each of some colours [N]."""
    by_colour = {colour_code(each): k for k, entry in enumerate(data.mask_colors) for each in colours_of(entry)}
    by_colour |= {colour_code(cast("Colour", each)): IGNORE for each in data.ignored}
    known, ids = _parts(np.array([*by_colour])), np.array([*by_colour.values()], np.int16)
    colours, place = np.unique(stored, return_inverse=True)
    distances = ((_parts(colours)[:, None] - known) ** 2).sum(axis=2)
    return ids[distances.argmin(axis=1)][place.reshape(-1)]


def _parts(codes: np.ndarray) -> np.ndarray:
    """Returns red, green and blue, int32 [N,3]."""
    return np.stack([codes >> 16 & 255, codes >> 8 & 255, codes & 255], axis=1).astype(np.int32)


def _not_negative(stored: np.ndarray, data: DataConfig) -> np.ndarray:
    """Returns values that a table can be indexed with. Values below 0 can only be ones to leave out."""
    if stored.dtype == np.uint8 or not stored.size:
        return stored
    low, high = int(stored.min()), int(stored.max())
    if high >= 2**16 or (low < 0 and not set(np.unique(stored[stored < 0]).tolist()) <= set(data.ignored)):
        raise ImageError(
            f"mask values from {low} to {high}: 0 to 65535 can be class values (data.ignore_index: others)"
        )
    return np.where(stored < 0, LEFT_OUT, stored) if low < 0 else stored


def matches(comparison: str, values: np.ndarray) -> np.ndarray:
    """Returns which values meet a comparison such as `>=128`, bool [N]."""
    found = COMPARISON.fullmatch(comparison.strip())
    assert found is not None, "DataConfig has checked it"
    return COMPARE[found[1]](values, int(found[2]))


@functools.lru_cache(maxsize=8)
def _table(values: tuple[MaskValue, ...], ignored: tuple[int, ...]) -> np.ndarray:
    """Returns class id by stored value, int16 [LEFT_OUT + 1]. A stored value wins over a comparison, and a later
    comparison over an earlier one."""
    table = np.full(LEFT_OUT + 1, UNKNOWN, np.int16)
    entries = [(class_id, each) for class_id, value in enumerate(values) for each in selectors(value)]
    comparisons = [(class_id, each) for class_id, each in entries if isinstance(each, str)]
    for class_id, comparison in comparisons:
        table[matches(comparison, np.arange(len(table)))] = class_id
    for class_id, each in entries:
        if isinstance(each, int):
            table[each] = class_id
    if comparisons:
        table[table == UNKNOWN] = 0
    table[[*(value for value in ignored if value >= 0), LEFT_OUT]] = IGNORE
    return table


@functools.lru_cache(maxsize=2)
def _table_of_colours(colours: tuple[Colour | tuple[Colour, ...], ...], ignored: tuple[Any, ...]) -> np.ndarray:
    """Returns class id by colour, int16 [2**24], which takes 32 MiB."""
    table = np.full(2**24, UNKNOWN, np.int16)
    for class_id, entry in enumerate(colours):
        table[[colour_code(colour) for colour in colours_of(entry)]] = class_id
    table[[colour_code(cast("Colour", colour)) for colour in ignored]] = IGNORE
    return table


def _unknown(values: np.ndarray, data: DataConfig) -> str:
    if data.mask_colors:
        shown = ", ".join(f"#{value:06x}" for value in values[:5].tolist())
        return (
            f"{len(values)} colour(s) of no class ({shown}{' …' if len(values) > 5 else ''}): add them to "
            "data.mask_colors, or to data.ignore_index; if JPEG or smoothing made them: --set data.mask_nearest=true"
        )
    shown = ", ".join(map(str, values[:5])) + (" …" if len(values) > 5 else "")
    return f"mask value(s) {shown} outside the classes (data.mask_values {[*(data.mask_values or ())]})"


def combined(parts: list[np.ndarray | None], *, classes: bool) -> np.ndarray:
    """Makes one mask of several of the same image: uint8 [H,W] each, None for a class that the image does not have.

    `classes`: the foreground of part k becomes class k + 1, and the later one wins; else the foreground of all becomes
    class 1. Pixels that one part leaves out are left out unless another has found something there. Raises ImageError if
    the sizes differ.
    """
    present = [(number, part) for number, part in enumerate(parts, start=1) if part is not None]
    if len({part.shape for _, part in present}) > 1:
        sizes = " and ".join(sorted({f"{part.shape[1]}x{part.shape[0]}" for _, part in present}))
        raise ImageError(f"the masks of one image have different sizes, {sizes}")
    mask = np.zeros(present[0][1].shape, np.uint8)
    for _, part in present:
        mask[part == IGNORE] = IGNORE
    for number, part in present:
        mask[(part != 0) & (part != IGNORE)] = number if classes else 1
    return mask
