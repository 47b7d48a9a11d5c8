"""Writes `prob`: the network's probability at each pixel."""

from __future__ import annotations

from typing import Any

from unet_ray.data import pictures
from unet_ray.inference.formats.base import ImageResult, OutputFormat

FOLDER = "probabilities"


def names_of(output: str, num_classes: int) -> list[str]:
    """Returns the files with the probabilities of the mask `output`. `num_classes`: the network's own, 1 or more."""
    stem = output.rpartition(".")[0]
    names = [output] if num_classes == 1 else [f"{stem}.{class_id}.png" for class_id in range(num_classes)]
    return [f"{FOLDER}/{name}" for name in names]


class Probabilities(OutputFormat):
    """Writes `probabilities/…png`: 8-bit gray, 255 for certainty. A model with one class gives the foreground's; others
    give a file for each class (`….0.png`, `….1.png`)."""

    owned_names = (FOLDER,)
    wants_probabilities = True

    def write(self, result: ImageResult) -> dict[str, Any]:
        assert result.segmented.probabilities is not None
        for name, values in zip(self.files(result.output), result.segmented.probabilities, strict=True):
            result.write_file(name, pictures.encode_gray(values))
        return {}

    def files(self, output: str) -> list[str]:
        return names_of(output, self.card.model.num_classes)
