"""Names the images of all inputs, and their masks."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from unet_ray.data.inputs import ImageFile, iter_images, root_name


def images_of(locations: Sequence[str]) -> Iterator[ImageFile]:
    """Yields the images of all inputs. With several inputs, each name begins with the name of its input folder."""
    used: Counter[str] = Counter()
    for location in locations:
        prefix = ""
        if len(locations) > 1:
            base = root_name(location)
            used[base] += 1
            prefix = f"{base}/" if used[base] == 1 else f"{base}-{used[base]}/"
        for image in iter_images(location):
            yield dataclasses.replace(image, name=prefix + image.name) if prefix else image


@dataclass(frozen=True, slots=True)
class Naming:
    """Proposes an endless series of paths for the mask of an image; the first unused one is taken."""

    template: str
    """`predict --name`."""

    def __call__(self, image: ImageFile) -> Iterator[str]:
        relpath, _, name = image.name.rpartition("/")
        stem, ext = os.path.splitext(name)  # noqa: PTH122 - by the million
        path = self._path(relpath, stem, name, ext)
        yield path
        # If images differ only in the extension, the later ones keep it in the name of their mask.
        yield self._path(relpath, name, name, ext)
        start, dot, end = path.rpartition(".")
        for number in itertools.count(2):
            yield f"{start}-{number}{dot}{end}"

    def _path(self, relpath: str, stem: str, name: str, ext: str) -> str:
        path = self.template.format(relpath=relpath, stem=stem, name=name, ext=ext.lstrip("."))
        # Masks must stay below the output folder, also if an odd listing contains `..`.
        parts = [part for part in path.split("/") if part not in ("", ".", "..")]
        return "/".join(parts) + ("" if path.endswith(".png") else ".png")
