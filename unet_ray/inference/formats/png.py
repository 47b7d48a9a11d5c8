"""`png`: a mask file for each image."""

from __future__ import annotations

from typing import Any

from unet_ray.inference.formats.base import ImageResult, OutputFormat

MASKS = "masks"


class Png(OutputFormat):
    """`masks/…png`: 1 bit per pixel for one class; a palette whose indices are the class ids for more."""

    owned_names = (MASKS,)

    def write(self, result: ImageResult) -> dict[str, Any]:
        [name] = self.files(result.output)
        result.write_file(name, result.png)
        return {"output": f"{MASKS}/{result.readable_output}"}

    def files(self, output: str) -> list[str]:
        return [f"{MASKS}/{output}"]
