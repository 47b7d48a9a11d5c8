"""Reads COCO's JSON (instances): polygons, run lengths, crowds. A block of the file at a time is in memory.

A mask drawn from a large file keeps only the places of its annotations: the worker that draws it reads them again.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Iterator
from typing import Any

from unet_ray.data import storage
from unet_ray.data.annotations import json_items
from unet_ray.data.annotations.drawing import Annotated, Shape, of_coco

SUFFIX = ".json"
BEGINNING = re.compile(r'"(images|annotations|categories)"\s*:\s*\[')


LARGE = 2**26
"""Bytes of a file whose shapes are not kept in memory."""


def classes(location: str) -> list[str]:
    """Returns the names of the categories, in the order of their ids."""
    found = sorted((int(each["id"]), str(each["name"])) for each in _items(location, "categories"))
    return [name for _, name in found]


def read(location: str) -> Iterator[Annotated]:
    """Yields the images of the file. Those without an annotation are empty. Crowds are drawn as their class is."""
    names = {each["id"]: str(each["name"]) for each in _items(location, "categories")}
    shapes = _places(location, names) if storage.sizes_and_times([location])[0][0] > LARGE else _texts(location, names)
    for each in _items(location, "images"):
        size = (int(each["height"]), int(each["width"])) if each.get("height") and each.get("width") else None
        yield Annotated(str(each["file_name"]), size, shapes(each["id"]))


def _texts(location: str, names: dict[Any, str]) -> Callable[[Any], list[Shape]]:
    """Reads all annotations. Returns a function that gives those of an image."""
    found: dict[Any, list[bytes]] = {}
    for each in _items(location, "annotations"):
        if (shape := of_coco(each)) is not None:
            # As text, a shape takes a tenth of the memory of its lists of numbers.
            text = json.dumps((_label(each.get("category_id"), names), *shape)).encode()
            found.setdefault(each.get("image_id"), []).append(text)
    return lambda image_id: [Shape(*json.loads(text)) for text in found.pop(image_id, [])]


def _places(location: str, names: dict[Any, str]) -> Callable[[Any], list[Shape]]:
    """Finds all annotations. Returns a function that gives those of an image: 24 bytes in memory for each."""
    found: dict[Any, array] = {}
    labels: dict[str, int] = {}
    with storage.reading(location) as stream:
        for place, text in json_items.items(stream, "annotations"):
            each = json.loads(text)
            if of_coco(each) is not None:
                label = labels.setdefault(_label(each.get("category_id"), names), len(labels))
                found.setdefault(each.get("image_id"), array("q")).extend((label, place, len(text)))
    known = list(labels)

    def of(image_id: Any) -> list[Shape]:
        numbers = iter(found.pop(image_id, ()))
        triples = zip(numbers, numbers, numbers, strict=True)
        return [Shape(known[label], "at", [place, length]) for label, place, length in triples]

    return of


def _label(category_id: Any, names: dict[Any, str]) -> str:
    return names.get(category_id, f"category {category_id}")


def _items(location: str, name: str) -> Iterator[dict[str, Any]]:
    with storage.reading(location) as stream:
        for _, text in json_items.items(stream, name):
            yield json.loads(text)
