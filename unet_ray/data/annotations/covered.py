"""Finds shapes that can't be seen because a later one of another class covers them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from unet_ray.data.annotations.drawing import Shape


def covered(shapes: Sequence[Shape], ids: Mapping[str, int]) -> int:
    """Returns how many polygons of an image lie wholly inside a later one that has another class id.

    `ids`: class id of each label; others are not drawn. Rectangles and polygons of one part are looked at.
    """
    outlines = [
        (ids[shape.label], outline)
        for shape in shapes
        if shape.label in ids and (outline := _outline(shape)) is not None
    ]
    if len({class_id for class_id, _ in outlines}) < 2:
        return 0
    classes = np.array([class_id for class_id, _ in outlines])
    low, high = (np.array([f(outline, axis=0) for _, outline in outlines]) for f in (np.min, np.max))
    count = 0
    for place, (class_id, outline) in enumerate(outlines):
        around = (low <= low[place]).all(axis=1) & (high >= high[place]).all(axis=1) & (classes != class_id)
        later = np.flatnonzero(around[place + 1 :]) + place + 1
        count += any(_inside(outline, outlines[other][1]) for other in later)
    return count


def _outline(shape: Shape) -> np.ndarray | None:
    """Returns the corners [P,2] of a polygon; None for shapes of another kind."""
    if shape.kind == "polygons" and len(shape.data) == 1:
        points = shape.data[0]
    elif shape.kind == "shares":
        points = shape.data
    elif shape.kind == "labelme" and shape.data[0] == "polygon":
        points = [each for point in shape.data[1] for each in point]
    else:
        return None
    return np.asarray(points, np.float64).reshape(-1, 2) if len(points) > 4 and len(points) % 2 == 0 else None


def _inside(points: np.ndarray, polygon: np.ndarray) -> bool:
    """Returns whether all points [P,2] lie inside a polygon [Q,2], by the even-odd rule."""
    x, y = points[:, :1], points[:, 1:]
    (x0, y0), (x1, y1) = polygon.T, np.roll(polygon, -1, axis=0).T
    crosses = (y0 > y) != (y1 > y)
    with np.errstate(divide="ignore", invalid="ignore"):
        right = x < x0 + (y - y0) * (x1 - x0) / (y1 - y0)
    return bool((np.count_nonzero(crosses & right, axis=1) % 2 == 1).all())
