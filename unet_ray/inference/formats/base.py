"""Defines what an output format does, and what it receives of each image.

To add a format, write its class in a file of this folder and name it in `registry.FORMATS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from unet_ray.data import masks, pictures, run_lengths, storage
from unet_ray.data.chunks import Chunk, readable
from unet_ray.data.imaging import Source
from unet_ray.inference.ledger import Ledger, SideTable
from unet_ray.inference.reader import Reader
from unet_ray.inference.segmenter import SegmentedMask
from unet_ray.models.checkpoint import ModelCard


@dataclass(frozen=True)
class ImageResult:
    """Gives the formats one segmented image. Values that several formats need are computed once."""

    out: str
    """The output folder."""
    segmented: SegmentedMask
    output: str
    """Path of the mask below a format's folder, in the file system's encoding (`os.fsdecode`); it ends with `.png`."""
    chunk: Chunk
    row: int
    """The image's row in the chunk."""
    num_classes: int
    reader: Reader
    written: list[str] = field(default_factory=list)
    """Locations of the files that formats have written."""

    @property
    def mask(self) -> np.ndarray:
        """Class ids, uint8 [H,W]."""
        return self.segmented.mask

    @property
    def name(self) -> str:
        """The image's path below its input, as valid UTF-8."""
        return readable(self.chunk["name"][self.row])

    @property
    def output_in_manifest(self) -> str:
        """`output` as valid UTF-8, see `chunks.readable`."""
        return readable(self.chunk["output"][self.row])

    @cached_property
    def pixels(self) -> list[int]:
        """Number of pixels per class id."""
        return masks.pixel_counts(self.mask, max(2, self.num_classes))

    @cached_property
    def png(self) -> bytes:
        """The mask as a PNG file."""
        return pictures.encode_png(self.mask, self.num_classes)

    @cached_property
    def regions(self) -> list[dict[str, Any]]:
        """COCO's run lengths: `class_id`, `area`, `bbox`, `counts` of each class in the mask. A model with one class
        gives the foreground alone."""
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
        location = output_path(self.out, name)
        storage.write_bytes(location, data)
        self.written.append(location)

    def source(self) -> Source | str:
        """Reads the image again, since no stage keeps it at its own size. Returns its file, or the reason of the
        failure."""
        row = {name: column[self.row : self.row + 1] for name, column in self.chunk.items()}
        return next(self.reader.encoded(row))


class OutputFormat(ABC):
    """Writes masks in one format.

    Instances are made once per prediction and copied to the processes that write.
    """

    owned_names: ClassVar[tuple[str, ...]] = ()
    """Files and folders below the output folder that this format alone writes: `--overwrite` removes them."""
    wants_probabilities: ClassVar[bool] = False
    """Whether `ImageResult.segmented.probabilities` is needed."""
    table: SideTable | None = None
    """The Parquet files that it fills beside the manifest. Its columns must not repeat a column of the manifest."""

    def __init__(self, card: ModelCard, formats: Sequence[str]) -> None:  # noqa: ARG002 - subclasses use it
        """Raises UserError if the format can't hold the model's masks. `formats`: all formats of this prediction."""
        self.card = card

    @abstractmethod
    def write(self, result: ImageResult) -> dict[str, Any]:
        """Writes the files of one image. Returns its columns of `table`, or `output` of the manifest, or nothing.

        Raises ImageError if the image's row must fail.
        """

    def files(self, output: str) -> list[str]:  # noqa: ARG002 - subclasses use it
        """Returns the files below the output folder that `write` makes for an image whose mask is named `output`.

        They are deleted if the image can't be segmented, since an earlier run may have left them.
        """
        return []

    def write_final(self, ledger: Ledger) -> None:  # noqa: B027 - most have nothing to do
        """Writes the one file that holds all images, once the ledger is complete.

        It may read `ledger.side_rows(self.table)`. A format without a table may read `ledger.manifest`, which has the
        path, size, pixels per class and confidence of each image, but no mask.
        """


def class_names(card: ModelCard) -> list[str]:
    """Returns the name of each class id."""
    count = card.model.num_classes
    if count == 1:
        return ["background", card.classes[1] if len(card.classes) > 1 else "foreground"]
    return list(card.classes) or [f"class {class_id}" for class_id in range(count)]


def output_path(out: str, name: str) -> str:
    """Returns the location of a file of the output folder. `name`: its path below the folder, with slashes."""
    return storage.join(out, *name.split("/"))
