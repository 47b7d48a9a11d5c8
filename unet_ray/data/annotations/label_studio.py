"""Reads Label Studio's JSON export: polygons, brushes, rectangles and ellipses."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

from unet_ray.data import storage
from unet_ray.data.annotations.drawing import Annotated, Shape, ellipse, rectangle

SUFFIX = ".json"
BEGINNING = re.compile(r'"(annotations|completions|predictions)"\s*:\s*\[[\s\S]*"(result|was_cancelled)"\s*:')
UPLOAD = re.compile(r"^[0-9a-f]{8}-")
"""Label Studio puts this in front of the names of files that were uploaded."""


def classes(location: str) -> None:
    """An export has no list of labels."""


def read(location: str) -> Iterator[Annotated]:
    """Yields the tasks of the export that have an annotation: the last one that was not cancelled, or else the last
    prediction."""
    tasks = json.loads(storage.read_bytes(location))
    for task in tasks if isinstance(tasks, list) else [tasks]:
        done = [each for each in task.get("annotations") or [] if not each.get("was_cancelled")]
        if results := (done or task.get("predictions") or [])[-1:]:
            shapes, size = _shapes(results[0].get("result") or [])
            yield Annotated(_name(task["data"]), size, shapes)


def _name(data: dict[str, Any]) -> str:
    """Returns the path of a task's image."""
    value = data.get("image") or next(each for each in data.values() if isinstance(each, str))
    parts = urlparse(str(value))
    path = parse_qs(parts.query).get("d", [parts.path])[0]
    folder, _, name = unquote(path).rpartition("/")
    return f"{folder}/{UPLOAD.sub('', name)}".lstrip("/")


def _shapes(results: list[dict[str, Any]]) -> tuple[list[Shape], tuple[int, int] | None]:
    shapes, size = [], None
    for result in results:
        value = result.get("value") or {}
        labels = next((each for name, each in value.items() if name.endswith("labels") and each), None)
        if labels is None:
            continue
        if result.get("image_rotation"):
            raise ValueError("an image that was turned in Label Studio: turn the file itself")
        width, height = int(result["original_width"]), int(result["original_height"])
        size = (height, width)
        if shape := _shape(str(labels[0]), value, width / 100, height / 100):
            shapes.append(shape)
    return shapes, size


def _shape(label: str, value: dict[str, Any], x: float, y: float) -> Shape | None:
    """`x`, `y`: pixels of a percent."""
    if "points" in value:
        return Shape(label, "polygons", [[each for px, py in value["points"] for each in (px * x, py * y)]])
    if value.get("format") == "rle" or "rle" in value:
        return Shape(label, "brush", value["rle"])
    if "radiusX" in value:
        radii = (value["radiusX"] * x, value["radiusY"] * y)
        return Shape(label, "polygons", [ellipse(value["x"] * x, value["y"] * y, *radii, value.get("rotation", 0))])
    if "width" in value:
        left, top = value["x"] * x, value["y"] * y
        right, bottom = left + value["width"] * x, top + value["height"] * y
        return Shape(label, "polygons", [rectangle(left, top, right, bottom, value.get("rotation", 0), (left, top))])
    return None
