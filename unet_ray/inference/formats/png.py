"""Writes `png`: a mask file for each image."""

from __future__ import annotations

from typing import Any

from unet_ray.inference.formats.base import ImageResult, OutputFormat

MASKS = "masks"


class Png(OutputFormat):
    """Writes `masks/…png`: 1 bit per pixel for one class; for more, a palette indexed by class id."""

    owned_names = (MASKS,)

    def write(self, result: ImageResult) -> dict[str, Any]:
        [name] = self.files(result.output)
        result.write_file(name, result.png)
        return {"output": f"{MASKS}/{result.output_in_manifest}"}

    def files(self, output: str) -> list[str]:
        return [f"{MASKS}/{output}"]
