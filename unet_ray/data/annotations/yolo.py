"""Reads YOLO's segmentation labels: a text file for each image, and `data.yaml` with the names of the classes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

import yaml

from unet_ray.config import UserError
from unet_ray.data import lists, storage
from unet_ray.data.annotations.drawing import Annotated, Shape

SUFFIX = ".txt"
NUMBER = r"-?(?:\d+(?:\.\d+)?|\.\d+)(?:[eE]-?\d+)?"
BEGINNING = re.compile(rf"\A\s*\d+(?:[ \t]+{NUMBER}){{4,}}[ \t]*$", re.MULTILINE)
YAML = ("data.yaml", "dataset.yaml", "data.yml", "dataset.yml")
LEVELS = 4
"""How many folders above the labels data.yaml may be."""


def classes(location: str) -> list[str] | None:
    """Returns the names of data.yaml above a label file; None if there is none."""
    folder = storage.parent(location)
    for _ in range(LEVELS):
        for name in YAML:
            place = storage.join(folder, name)
            [(size, mtime_ns)] = storage.sizes_and_times([place])
            if size >= 0:
                return _names(place, mtime_ns)
        folder = storage.parent(folder)
    return None


@lru_cache(maxsize=8)
def _names(place: str, _mtime_ns: int) -> list[str]:
    """Returns the names in a data.yaml. They are read once, not for each image."""
    try:
        names = yaml.safe_load(storage.read_bytes(place))["names"]
        return [str(names[key]) for key in sorted(names)] if isinstance(names, dict) else [str(name) for name in names]
    except (yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{place}: no names of classes in it: {str(error)[:80]}") from None


def read(location: str) -> Iterator[Annotated]:
    """Yields the image of one file; an empty file is an image without objects. Coordinates are shares of its size."""
    names = classes(location)
    shapes = []
    for number, line in enumerate(lists.decoded(storage.read_bytes(location)).splitlines(), 1):
        words = line.split()
        if not words:
            continue
        try:
            label, values = int(words[0]), [float(word) for word in words[1:]]
        except ValueError:
            raise UserError(f"{location}, line {number}: a class number and coordinates are needed") from None
        if len(values) < 6:
            raise UserError(f"{location}, line {number}: a box, and no polygon: export segmentation labels")
        name = names[label] if names is not None and 0 <= label < len(names) else str(label)
        shapes.append(Shape(name, "shares", values))
    yield Annotated(location.rpartition("/")[2].rpartition(".")[0], None, shapes)
