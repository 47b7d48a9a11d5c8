"""Names the images of all inputs, and their masks."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from unet_ray.data import storage
from unet_ray.data.inputs import Choice, ImageFile, common_folder, is_one_file, iter_files, iter_images, root_name
from unet_ray.data.pairs import PAGES_ARE_CHANNELS


def images_of(
    locations: Sequence[str], column: str | None = None, choice: Choice | None = None, channels: int = 3
) -> Iterator[ImageFile]:
    """Yields the images of all inputs, see `iter_images`. Images that are named one by one are one input. With several
    inputs, each name begins with the name of its input folder."""
    files, others = _apart(locations)
    pages = channels < PAGES_ARE_CHANNELS
    inputs = [
        (root_name(location), iter_images(location, column, pages=pages, frames=True, choice=choice))
        for location in others
    ]
    if files:
        inputs.append((root_name(common_folder(files)), iter_files(files, pages=pages, frames=True)))
    used: Counter[str] = Counter()
    for base, images in inputs:
        used[base] += 1
        prefix = "" if len(inputs) == 1 else f"{base}/" if used[base] == 1 else f"{base}-{used[base]}/"
        for image in images:
            yield dataclasses.replace(image, name=prefix + image.name) if prefix else image


def shown(locations: Sequence[str]) -> list[str]:
    """Returns the inputs as the settings record them: `FOLDER/*` for all images that are named one by one, so that one
    more of them is no other input."""
    files, others = _apart(locations)
    named = [storage.join(common_folder(files), "*")] if files else []
    return [storage.without_secrets(storage.absolute(location)) for location in [*others, *named]]


def _apart(locations: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the images that are named one by one, and the other inputs."""
    files = [location for location in locations if is_one_file(location)]
    named = set(files)
    return files, [location for location in locations if location not in named]


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
