"""Reads CVAT for images 1.1: one XML file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from xml.etree import ElementTree

from unet_ray.data import lists, storage
from unet_ray.data.annotations.drawing import Annotated, Shape, ellipse, rectangle

SUFFIX = ".xml"
BEGINNING = re.compile(r"<annotations>[\s\S]*<(image|meta|version)\b")


def classes(location: str) -> list[str]:
    """Returns the labels of the task, in their order."""
    return [label for root in _roots(location) for name in root.iter("label") if (label := name.findtext("name"))]


def read(location: str) -> Iterator[Annotated]:
    """Yields the images of the file. Shapes of a higher `z_order` are drawn later; tracks and lines are no masks."""
    for root in _roots(location):
        for image in root.iter("image"):
            size = (int(image.get("height", 0)), int(image.get("width", 0)))
            layers = sorted(enumerate(image), key=lambda each: (int(each[1].get("z_order", 0)), each[0]))
            shapes = [shape for _, element in layers if (shape := _shape(element)) is not None]
            yield Annotated(image.get("name", ""), size if min(size) else None, shapes)


def _shape(element: ElementTree.Element) -> Shape | None:
    label = element.get("label", "")

    def numbers(*names: str) -> list[float]:
        return [float(element.get(name, 0)) for name in names]

    if element.tag == "polygon":
        points = [float(each) for point in element.get("points", "").split(";") for each in point.split(",")]
        return Shape(label, "polygons", [points])
    if element.tag == "box":
        left, top, right, bottom, degrees = numbers("xtl", "ytl", "xbr", "ybr", "rotation")
        centre = ((left + right) / 2, (top + bottom) / 2)
        return Shape(label, "polygons", [rectangle(left, top, right, bottom, degrees, centre)])
    if element.tag == "ellipse":
        x, y, radius_x, radius_y, degrees = numbers("cx", "cy", "rx", "ry", "rotation")
        return Shape(label, "polygons", [ellipse(x, y, radius_x, radius_y, degrees)])
    if element.tag == "mask":
        runs = [int(each) for each in element.get("rle", "").split(",")]
        return Shape(label, "box_runs", [*map(int, numbers("left", "top", "width", "height")), runs])
    return None


def _roots(location: str) -> Iterator[ElementTree.Element]:
    """Yields the root. Raises ValueError for XML that is damaged, or that declares entities, which may be a bomb."""
    data = storage.read_bytes(location)
    if b"<!DOCTYPE" in data or b"<!ENTITY" in data:
        raise ValueError("XML with a DOCTYPE or entities is not read")
    try:
        yield ElementTree.fromstring(lists.decoded(data))
    except ElementTree.ParseError as error:
        raise ValueError(str(error)) from None
