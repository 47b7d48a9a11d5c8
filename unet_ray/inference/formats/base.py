"""What an output format is, and what it is given of each image.

To add a format, write its class in a file of this folder and name it in `registry.FORMATS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from unet_ray.data import masks, pictures, run_lengths, storage
from unet_ray.data.chunks import Chunk, readable
from unet_ray.data.imaging import Source
from unet_ray.inference.ledger import Ledger, SideTable
from unet_ray.inference.reader import Reader
from unet_ray.inference.segmenter import WholeImage
from unet_ray.models.checkpoint import ModelCard


@dataclass(frozen=True)
class ImageResult:
    """One segmented image, as the formats write it. What several of them need is computed once."""

    out: str
    """The output folder."""
    image: WholeImage
    """The mask, its confidence, perhaps the probabilities."""
    output: str
    """Path of the mask below a format's folder, as the file system has it; it ends with `.png`."""
    chunk: Chunk
    row: int
    """Of the chunk."""
    num_classes: int
    reader: Reader

    @property
    def mask(self) -> np.ndarray:
        """Class ids, uint8 [H,W]."""
        return self.image.mask

    @property
    def name(self) -> str:
        """The image's path below its input."""
        return readable(self.chunk["name"][self.row])

    @property
    def readable_output(self) -> str:
        return readable(self.chunk["output"][self.row])

    @cached_property
    def pixels(self) -> list[int]:
        """How many pixels each class id has."""
        return masks.pixel_counts(self.mask, max(2, self.num_classes))

    @cached_property
    def png(self) -> bytes:
        return pictures.encode_png(self.mask, self.num_classes)

    @cached_property
    def regions(self) -> list[dict[str, Any]]:
        """COCO's run lengths: `class_id`, `area`, `bbox`, `counts` of each class that occurs; of one class, the
        foreground alone."""
        return [
            {
                "class_id": class_id,
                "area": self.pixels[class_id],
                **run_lengths.coco_region(self.mask == class_id),
            }
            for class_id in range(int(self.num_classes == 1), len(self.pixels))
            if self.pixels[class_id]
        ]

    def write_file(self, name: str, data: bytes) -> None:
        """Writes a file; `name`: its path below the output folder."""
        storage.write_bytes(location(self.out, name), data)

    def source(self) -> Source | str:
        """Reads the image again: at its own size it is kept nowhere. Returns its file, or why there is none."""
        row = {name: column[self.row : self.row + 1] for name, column in self.chunk.items()}
        return next(self.reader.encoded(row))


class OutputFormat(ABC):
    """A format that masks are written in.

    Instances are made once per prediction and copied to the processes that write.
    """

    owned_names: ClassVar[tuple[str, ...]] = ()
    """Files and folders below the output folder that this format alone writes: `--overwrite` removes them."""
    wants_probabilities: ClassVar[bool] = False
    """Whether `ImageResult.image.probabilities` must be there."""
    table: SideTable | None = None
    """The Parquet files that it fills beside the manifest."""

    def __init__(self, card: ModelCard, formats: Sequence[str]) -> None:  # noqa: ARG002 - subclasses use it
        """`formats`: the names of all formats of this prediction. Raises UserError if it can't hold such masks."""
        self.card = card

    @abstractmethod
    def write(self, result: ImageResult) -> dict[str, Any]:
        """Writes the files of one image. Returns columns of its row: of `table`, or `output` of the manifest."""

    def files(self, output: str) -> list[str]:  # noqa: ARG002 - subclasses use it
        """Returns the files below the output folder that `write` makes for an image whose mask is named `output`.

        They are deleted when the image has changed and can't be segmented any more.
        """
        return []

    def finish(self, ledger: Ledger) -> None:  # noqa: B027 - most have nothing to do
        """Writes what is one file for all images, from the complete ledger."""


def location(out: str, name: str) -> str:
    """Returns where a file lies whose path below the output folder is `name`."""
    return storage.join(out, *name.split("/"))
