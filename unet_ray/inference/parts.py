"""Divides a prediction into parts that run at the same time, each a command of its own: `predict --part 2/3`.

An image belongs to the part that a hash of its mask's path gives. So no two parts have an image, or a mask's path, in
common. Each part has shards of the ledger, a lock and a record (`output_folder.Record`) of its own. The manifest is one
folder of shards, so nothing is to be merged afterwards.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from unet_ray.config import UserError
from unet_ray.data.inputs import ImageFile

Proposals = Callable[[ImageFile], Iterator[str]]
"""Proposes paths for an image's mask, see `naming.Naming`."""


@dataclass(frozen=True, slots=True)
class Part:
    """One of several parts of a prediction; `WHOLE` is the only one."""

    number: int
    """From 1 to `of`."""
    of: int

    @classmethod
    def parse(cls, text: str | None) -> Part:
        """Reads `2/3`; None is the whole. Raises UserError."""
        if text is None:
            return WHOLE
        found = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise UserError(f"--part {text!r}: which part of how many, such as 1/3, 2/3 and 3/3")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def shard(self, place: int) -> int:
        """Returns the number of this part's shard at this place."""
        return self.number - 1 + place * self.of

    def has_shard(self, shard: int) -> bool:
        return shard % self.of == self.number - 1

    def has_mask(self, path: str) -> bool:
        digest = hashlib.blake2b(os.fsencode(path), digest_size=8).digest()
        return int.from_bytes(digest, "little") % self.of == self.number - 1

    def share(self, images: Iterable[ImageFile], naming: Proposals) -> tuple[Iterable[ImageFile], Proposals]:
        """Returns this part's images, and the proposals for their masks that no other part makes."""
        if self == WHOLE:
            return images, naming
        mine = (image for image in images if self.has_mask(next(naming(image))))
        return mine, lambda image: filter(self.has_mask, naming(image))


WHOLE = Part(1, 1)
