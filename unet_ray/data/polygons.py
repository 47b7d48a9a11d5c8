"""Turns masks into polygons that a person can edit, and that give the mask back when they are drawn."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import contourpy
import numpy as np
from scipy import ndimage

from unet_ray.data.annotations.drawing import region

TOLERANCES = (1.0, 0.5, 0.25, 0.0)
"""Pixels by which a simplified outline may leave the exact one. Each class takes the first that keeps `LEAST_IOU`."""
EXACT = len(TOLERANCES) - 1
LEAST_IOU = 0.99
"""IoU of each class with its mask, after its polygons are drawn again."""
LEVELS = {"labelme": 0.999, "polygons": 0.5}
"""Where an outline passes between the centre of a pixel outside (0) and one inside (1). labelme's drawing includes the
outline, so it passes through the outermost pixels; pycocotools' passes between pixels."""
CENTRE = {"labelme": 0.0, "polygons": 0.5}
"""Coordinates of a pixel's centre."""


Read = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, slots=True)
class Ring:
    """A closed outline."""

    class_id: int
    """0: a hole in what was drawn before it."""
    points: np.ndarray
    """x and y in pixels, float64 [N,2], without the first point again at the end."""
    is_hole: bool = False


def outlined(mask: np.ndarray, kind: str, read: Read = lambda points: points) -> tuple[list[Ring], list[int]]:
    """Returns the outlines of the classes in a mask, uint8 [H,W], in the order in which they are to be drawn, and the
    classes for which no polygons keep `LEAST_IOU`: they need their mask itself.

    `kind`: how they will be drawn, `labelme` or `polygons` (`annotations.drawing`). `read`: returns points as they come
    out of the file, rounded there.
    """
    classes = [class_id for class_id in np.unique(mask).tolist() if class_id]
    rings = [ring for class_id in classes for ring in _rings(mask == class_id, class_id, kind)]
    if kind == "labelme":  # its outlines belong to what they enclose, so holes are regions of their own
        enclosed = ndimage.binary_fill_holes(mask > 0) & (mask == 0)
        rings = [ring for ring in rings if ring.class_id] + [r for r in _rings(enclosed, 0, kind) if not r.is_hole]
    # A hole is drawn before what lies in it, and after what it is in.
    rings.sort(key=lambda ring: (-abs(_area(ring.points)), ring.class_id))
    choice = dict.fromkeys([0, *classes], 0)  # class -> place in TOLERANCES
    while True:
        simple = [Ring(ring.class_id, simplified(ring.points, TOLERANCES[choice[ring.class_id]])) for ring in rings]
        drawn = _drawn([Ring(ring.class_id, read(ring.points)) for ring in simple], mask.shape, kind)
        bad = [class_id for class_id in classes if _iou(drawn == class_id, mask == class_id) < LEAST_IOU]
        if not bad or min(choice.values()) == EXACT:
            return simple, bad
        if all(choice[class_id] == EXACT for class_id in bad):  # it is their neighbours that cover them
            choice = dict.fromkeys(choice, EXACT)
        else:
            choice |= {class_id: min(EXACT, choice[class_id] + 1) for class_id in (0, *bad)}


def _rings(inside: np.ndarray, class_id: int, kind: str) -> list[Ring]:
    """Returns the exact outlines of a region, bool [H,W], and of its holes."""
    padded = np.pad(inside, 1).astype(np.float64)
    generator = contourpy.contour_generator(z=padded, fill_type=contourpy.FillType.OuterOffset)
    polygons, offsets = generator.filled(LEVELS[kind], 2.0)  # type: ignore[misc]
    shift = CENTRE[kind] - 1
    found = []
    for points, starts in zip(polygons, offsets, strict=True):
        for number, (start, stop) in enumerate(itertools.pairwise(starts)):
            corners = points[start : stop - 1] + shift
            corners = corners.round() if kind == "labelme" else corners  # the centres of the outermost pixels
            found.append(Ring(0 if number else class_id, corners, is_hole=number > 0))
    return found


def simplified(points: np.ndarray, tolerance: float) -> np.ndarray:
    """Leaves out points of a closed outline, so that no part moves by more than `tolerance` pixels (Ramer 1972, Douglas
    and Peucker 1973)."""
    if tolerance <= 0 or len(points) < 5:
        return points
    # Two points far from each other stay: each half is an open line.
    far = int(((points - points[0]) ** 2).sum(axis=1).argmax())
    closed = np.vstack([points, points[:1]])
    kept = np.zeros(len(closed), bool)
    kept[[0, far, len(closed) - 1]] = True
    waiting = [(0, far), (far, len(closed) - 1)]
    while waiting:
        start, stop = waiting.pop()
        if stop - start < 2:
            continue
        distances = _distances(closed[start + 1 : stop], closed[start], closed[stop])
        farthest = int(distances.argmax())
        if distances[farthest] > tolerance:
            middle = start + 1 + farthest
            kept[middle] = True
            waiting += [(start, middle), (middle, stop)]
    few = closed[:-1][kept[:-1]]
    return few if len(few) > 2 else points


def _distances(points: np.ndarray, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    along = stop - start
    length = float(np.hypot(*along))
    if not length:
        return np.hypot(*(points - start).T)
    return np.abs(along[0] * (points[:, 1] - start[1]) - along[1] * (points[:, 0] - start[0])) / length


def _area(points: np.ndarray) -> float:
    x, y = points.T
    return float((x * np.roll(y, -1) - y * np.roll(x, -1)).sum() / 2)


def _drawn(rings: Sequence[Ring], size_hw: tuple[int, ...], kind: str) -> np.ndarray:
    """Draws outlines as the reader of their format does."""
    mask = np.zeros(size_hw, np.uint8)
    for ring in rings:
        data = ["polygon", ring.points.tolist()] if kind == "labelme" else [ring.points.reshape(-1).tolist()]
        mask[region(kind, data, (size_hw[0], size_hw[1]))] = ring.class_id
    return mask


def _iou(one: np.ndarray, other: np.ndarray) -> float:
    union = int((one | other).sum())
    return int((one & other).sum()) / union if union else 1.0
