"""Reads COCO's JSON (instances): polygons, run lengths, crowds. The file is streamed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import IO, Any

import ijson
import numpy as np

from unet_ray.data import storage
from unet_ray.data.annotations.drawing import Annotated, Shape

SUFFIX = ".json"
BEGINNING = re.compile(r'"(images|annotations|categories)"\s*:\s*\[')


BLOCK, DEEPEST = 2**22, 10_000
STEPS = np.zeros(256, np.int8)
STEPS[[*b"[{"]], STEPS[[*b"]}"]] = 1, -1
"""Change of the depth by a character. (A bracket in a text counts, too: names with many would be needed to matter.)"""


def classes(location: str) -> list[str]:
    """Returns the names of the categories, in the order of their ids."""
    found = sorted((int(each["id"]), str(each["name"])) for each in _items(location, "categories"))
    return [name for _, name in found]


def read(location: str) -> Iterator[Annotated]:
    """Yields the images of the file. Those without an annotation are empty. Crowds are drawn as their class is."""
    names = {each["id"]: str(each["name"]) for each in _items(location, "categories")}
    shapes: dict[Any, list[bytes]] = {}
    for each in _items(location, "annotations"):
        if (shape := _shape(each)) is not None:
            # As text, a shape takes a tenth of the memory of its lists of numbers.
            label = names.get(each.get("category_id"), f"category {each.get('category_id')}")
            shapes.setdefault(each.get("image_id"), []).append(json.dumps((label, *shape)).encode())
    for each in _items(location, "images"):
        found = [Shape(*json.loads(text)) for text in shapes.pop(each["id"], [])]
        size = (int(each["height"]), int(each["width"])) if each.get("height") and each.get("width") else None
        yield Annotated(str(each["file_name"]), size, found)


def _shape(annotation: dict[str, Any]) -> tuple[str, Any] | None:
    """Returns kind and data of an annotation; None if it is a box alone."""
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        counts = segmentation.get("counts")
        return ("rle", {"size": segmentation["size"], "counts": counts}) if counts else None
    if isinstance(segmentation, list) and segmentation:
        return "polygons", segmentation if isinstance(segmentation[0], list) else [segmentation]
    return None


def _check_depth(stream: IO[bytes]) -> None:
    """Raises ValueError for nested brackets without end, whose parsing would take for ever."""
    depth = 0
    while block := stream.read(BLOCK):
        letters = np.frombuffer(block, np.uint8)
        steps = STEPS[letters]
        if depth + int(np.cumsum(steps, dtype=np.int32).max()) > DEEPEST:
            raise ValueError("brackets nested too deeply")
        depth = max(0, depth + int(steps.sum()))


def _items(location: str, name: str) -> Iterator[dict[str, Any]]:
    with storage.reading(location) as stream:
        _check_depth(stream)
        stream.seek(0)
        try:
            yield from ijson.items(stream, f"{name}.item", use_float=True)
        except ijson.JSONError as error:
            raise ValueError(str(error)) from None
