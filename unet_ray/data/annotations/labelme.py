"""Reads labelme's JSON: a file for each image."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from unet_ray.data import storage
from unet_ray.data.annotations.drawing import Annotated, Shape

SUFFIX = ".json"
BEGINNING = re.compile(r'"shapes"\s*:\s*\[')


def classes(location: str) -> None:
    """labelme keeps no list of classes."""


def read(location: str) -> Iterator[Annotated]:
    """Yields the image of one file."""
    found = json.loads(storage.read_bytes(location))
    # The path is the one of the machine on which it was drawn; the name is also that of the JSON file.
    name = str(found.get("imagePath") or "").replace("\\", "/").rpartition("/")[2]
    size = (int(found["imageHeight"]), int(found["imageWidth"])) if found.get("imageHeight") else None
    yield Annotated(name, size, [_shape(each) for each in found["shapes"]])


def _shape(each: dict[str, Any]) -> Shape:
    kind = each.get("shape_type") or "polygon"
    points = [[float(x), float(y)] for x, y in each["points"]]
    if kind == "mask" and each.get("mask"):
        return Shape(str(each["label"]), "picture", [*points[0], str(each["mask"])])
    return Shape(str(each["label"]), "labelme", [kind, points])
