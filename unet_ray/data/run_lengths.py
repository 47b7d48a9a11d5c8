"""Encodes masks as run lengths in Kaggle's and COCO's formats."""

from __future__ import annotations

from typing import Any

import numpy as np


def row_runs(mask: np.ndarray) -> str:
    """Encodes the pixels that are not 0 for Kaggle's Carvana challenge: `start length start length …`.

    Pixels are numbered from 1, left to right, then top to bottom. Empty for an empty mask.
    """
    runs = _run_starts(mask.reshape(-1))
    pairs = runs.copy()
    pairs[0::2] += 1
    pairs[1::2] = runs[1::2] - runs[0::2]
    return " ".join(map(str, pairs.tolist()))


def coco_runs(mask: np.ndarray) -> str:
    """Encodes the pixels that are not 0, uint8 or bool [H,W], as COCO's compressed run lengths, pycocotools' `counts`.

    Runs go down the columns; the first counts zeros. From the fourth on, each is stored as its difference to the run
    two before it. A character holds five bits, low bits first.
    """
    flat = np.ascontiguousarray(mask.T).reshape(-1)
    counts = np.diff(np.concatenate([[0], _run_starts(flat), [flat.size]]))
    if counts[-1] == 0 and len(counts) > 1:
        counts = counts[:-1]
    values = counts.copy()
    values[3:] -= counts[1:-2]
    shifts = 5 * np.arange(8)
    digits = (values[:, None] >> shifts) & 31
    # Each value takes as many digits as it needs with its sign.
    limit = 16 << shifts
    length = 1 + ((values[:, None] >= limit) | (values[:, None] < -limit)).sum(axis=1)
    place = np.arange(8)
    characters = digits + 48 + 32 * (place < length[:, None] - 1)
    return characters[place < length[:, None]].astype(np.uint8).tobytes().decode("ascii")


def coco_region(region: np.ndarray) -> dict[str, Any]:
    """Returns COCO's `bbox` and `counts` of the True pixels in bool [H,W], which needs at least one."""
    return {"bbox": box(region), "counts": coco_runs(region)}


def box(region: np.ndarray) -> list[int]:
    """Returns [left, top, width, height] of the True pixels in bool [H,W], which needs at least one."""
    rows, columns = (np.flatnonzero(region.any(axis=axis)) for axis in (1, 0))
    left, top = int(columns[0]), int(rows[0])
    return [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top]


def _run_starts(flat: np.ndarray) -> np.ndarray:
    """Returns the begin and end of each run of non-zeros, int64: begin, end, begin, end, …"""
    inside = flat.view(bool) if flat.dtype == bool else flat != 0
    edges = np.flatnonzero(inside[1:] != inside[:-1]) + 1
    return np.concatenate([[0] * bool(inside[:1].any()), edges, [flat.size] * bool(inside[-1:].any())]).astype(np.int64)
