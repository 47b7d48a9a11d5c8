"""Writes `labelme`: a JSON file for each image, to correct its polygons in labelme."""

from __future__ import annotations

import base64
import io
import json
import os
from typing import Any

import numpy as np
from PIL import Image

from unet_ray.data import imaging, pages, polygons, storage, video
from unet_ray.inference.formats.base import ImageResult, OutputFormat, class_names
from unet_ray.models.checkpoint import ModelCard

FOLDER = "labelme"
VERSION = "5.4.1"
BACKGROUND = "_background_"
"""labelme's own name for what is no object; a hole is drawn with it."""


class Labelme(OutputFormat):
    """Writes `labelme/…json`: polygons that give the mask back with an IoU of 0.99 or more for each class, when labelme
    draws them. A class for which none do is written as labelme's `mask`."""

    owned_names = (FOLDER,)

    def write(self, result: ImageResult) -> dict[str, Any]:
        [name] = self.files(result.output)
        place = storage.join(result.out, *name.split("/"))
        location = os.fsdecode(result.chunk["path"][result.row])
        image = pages.file_of(location)
        height, width = result.mask.shape
        file = {
            "version": VERSION,
            "flags": {},
            "shapes": _shapes(result.mask, self.card),
            "imagePath": _relative(image, place),
            "imageData": _frame(location) if video.is_video(image) else None,
            "imageHeight": height,
            "imageWidth": width,
        }
        result.write_file(name, (json.dumps(file, indent=1) + "\n").encode())
        return {}

    def files(self, output: str) -> list[str]:
        return [f"{FOLDER}/{output.rpartition('.')[0]}.json"]


def _frame(location: str) -> str:
    """Returns a frame of a video as labelme stores an image in its file: PNG in base64."""
    stream = io.BytesIO()
    with Image.open(io.BytesIO(imaging.read_file(location))) as image:
        image.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def _relative(image: str, place: str) -> str:
    """Returns the image's path from the folder of the JSON file; of a URI its name."""
    if storage.is_uri(image) or storage.is_uri(place):
        return storage.split_options(image)[0].rpartition("/")[2]
    return os.path.relpath(image, os.path.dirname(place)).encode("utf-8", "replace").decode()  # noqa: PTH120 - may be no UTF-8


def _shapes(mask: np.ndarray, card: ModelCard) -> list[dict[str, Any]]:
    names = class_names(card)
    rings, bad = polygons.outlined(mask, "labelme")
    shapes = [
        _shape(names[ring.class_id] if ring.class_id else BACKGROUND, "polygon", ring.points.tolist())
        for ring in rings
        if ring.class_id not in bad
    ]
    return shapes + [_exact(mask == class_id, names[class_id]) for class_id in bad]


def _exact(inside: np.ndarray, name: str) -> dict[str, Any]:
    """Returns a shape with the pixels themselves: a PNG of their box."""
    rows, columns = (np.flatnonzero(inside.any(axis=axis)) for axis in (1, 0))
    box = inside[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    stream = io.BytesIO()
    Image.fromarray(box.astype(np.uint8) * np.uint8(255)).save(stream, "PNG")
    corners = [[int(columns[0]), int(rows[0])], [int(columns[-1]), int(rows[-1])]]
    return {**_shape(name, "mask", corners), "mask": base64.b64encode(stream.getvalue()).decode()}


def _shape(name: str, kind: str, points: list) -> dict[str, Any]:
    return {"label": name, "points": points, "group_id": None, "description": "", "shape_type": kind, "flags": {}}
