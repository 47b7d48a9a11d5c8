"""Reads run lengths in tables: Kaggle's CSV, and our own `submission.csv`."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator

from unet_ray.config import UserError
from unet_ray.data import lists, storage
from unet_ray.data.annotations.drawing import Annotated, Shape

SUFFIX = ".csv"
BEGINNING = re.compile(r"^[^\n]*(EncodedPixels|rle_mask|\brle\b)[^\n]*$", re.IGNORECASE | re.MULTILINE)
RUNS = ("encodedpixels", "rle_mask", "rle", "annotation")
IMAGES = ("imageid", "img", "image", "image_id", "id", "filename", "file_name")
CLASSES = ("classid", "class_id", "class", "label", "category")
FOREGROUND = "foreground"
BY_ROWS = "rle_mask"
"""Carvana's column, the only known challenge whose runs go along the rows."""


def classes(location: str) -> list[str] | None:
    """Returns the classes of the table, in their order; None if it has no column of them."""
    found = sorted({label for _, label, _ in _rows(location)}, key=lambda label: (len(label), label))
    return found if found != [FOREGROUND] else None


def order_of(location: str, given: str | None) -> str:
    """Returns the order of the runs: `columns` or `rows`. `given`: by `--rle-order`."""
    if given is not None:
        return given
    return "rows" if BY_ROWS in _header(location) else "columns"


def read(location: str, order: str | None = None) -> Iterator[Annotated]:
    """Yields the images of the table; one without runs is empty."""
    along = order_of(location, order)
    images: dict[str, list[Shape]] = {}
    for name, label, runs in _rows(location):
        shapes = images.setdefault(name, [])
        if runs:
            shapes.append(Shape(label, "runs", [along, runs]))
    for name, shapes in images.items():
        yield Annotated(name, None, shapes)


def _header(location: str) -> list[str]:
    first = lists.decoded(storage.read_bytes(location)).partition("\n")[0]
    return [cell.strip().lower() for cell in next(csv.reader([first]))]


def _rows(location: str) -> Iterator[tuple[str, str, str]]:
    """Yields (image, class, runs)."""
    csv.field_size_limit(2**27)
    header = _header(location)
    image, runs = (next((name for name in names if name in header), None) for names in (IMAGES, RUNS))
    label = next((name for name in CLASSES if name in header), None)
    joined = False
    if image is None or runs is None:
        combined = next((name for name in header if "image" in name), None)
        if combined is None or runs is None:
            raise UserError(f"{location}: no column of images (ImageId) or of run lengths (EncodedPixels)")
        image = combined
        joined = "class" in combined or "label" in combined  # `Image_Label` of Kaggle's clouds: name_class
    place_image, place_runs = header.index(image), header.index(runs)
    place_label = None if label is None else header.index(label)
    reader = csv.reader(io.StringIO(lists.decoded(storage.read_bytes(location)), newline=""))
    next(reader)
    for row in reader:
        if len(row) <= max(place_image, place_runs):
            continue
        name, text = row[place_image].strip(), row[place_runs].strip()
        kind = FOREGROUND if place_label is None else row[place_label].strip() or FOREGROUND
        if joined:
            name, _, kind = name.rpartition("_")
        yield name, kind, "" if text.lower() in ("", "nan", "-1") else text
