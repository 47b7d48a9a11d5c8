"""Reads the VGG Image Annotator's JSON: a project, or its annotations alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from unet_ray.data import storage
from unet_ray.data.annotations.drawing import Annotated, Shape, ellipse, rectangle

SUFFIX = ".json"
BEGINNING = re.compile(r'"(_via_img_metadata|shape_attributes|regions)"\s*:')
REGION = "region"
"""Label of regions that have no attribute."""


def classes(location: str) -> None:
    """VIA's attributes are free."""


def read(location: str) -> Iterator[Annotated]:
    """Yields the images of the file. A region's label is the value of its first attribute."""
    found = json.loads(storage.read_bytes(location))
    for entry in (found.get("_via_img_metadata") or found).values():
        if isinstance(entry, dict) and "filename" in entry:
            regions = entry.get("regions") or []
            regions = regions.values() if isinstance(regions, dict) else regions
            shapes = [shape for region in regions if (shape := _shape(region)) is not None]
            yield Annotated(str(entry["filename"]), None, shapes)


def _shape(region: dict[str, Any]) -> Shape | None:
    form = region["shape_attributes"]
    label = next((_label(value) for value in (region.get("region_attributes") or {}).values() if value), REGION)
    kind = form.get("name")
    if kind == "polygon":
        points = [float(each) for pair in zip(form["all_points_x"], form["all_points_y"], strict=True) for each in pair]
        return Shape(label, "polygons", [points])
    if kind == "rect":
        left, top = float(form["x"]), float(form["y"])
        return Shape(label, "polygons", [rectangle(left, top, left + form["width"], top + form["height"])])
    if kind in ("circle", "ellipse"):
        radius_x, radius_y = (form["r"], form["r"]) if kind == "circle" else (form["rx"], form["ry"])
        turn = float(form.get("theta", 0)) * 180 / 3.141592653589793
        return Shape(label, "polygons", [ellipse(form["cx"], form["cy"], radius_x, radius_y, turn)])
    return None


def _label(value: Any) -> str:
    """Returns the value of an attribute; of check boxes the first one that is set."""
    if isinstance(value, dict):
        return next((str(name) for name, chosen in value.items() if chosen), REGION)
    return str(value)
