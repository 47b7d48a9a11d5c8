"""Writes `overlay`: pictures with the mask drawn in, for people to look at."""

from __future__ import annotations

from typing import Any

from unet_ray.data.imaging import ImageError
from unet_ray.inference.formats.base import ImageResult, OutputFormat

FOLDER = "overlays"


class Overlays(OutputFormat):
    """Writes `overlays/…jpg`: the image, 1,024 pixels a side at most, with the mask drawn in."""

    owned_names = (FOLDER,)

    def write(self, result: ImageResult) -> dict[str, Any]:
        try:
            drawn = result.reader.overlay(result.source(), result.mask, result.num_classes)
        except ImageError:  # the image was removed or changed; its mask is written, so the row does not fail
            return {}
        [name] = self.files(result.output)
        result.write_file(name, drawn)
        return {}

    def files(self, output: str) -> list[str]:
        return [f"{FOLDER}/{output.rpartition('.')[0]}.jpg"]
