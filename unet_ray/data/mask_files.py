"""Names and reads the masks of an image: usually one file, sometimes several.

The location of several files is one text, joined by NUL, which no path contains: it passes through tables as any other
location does.
"""

from __future__ import annotations

from collections.abc import Sequence

from unet_ray.config import MAX_PIXELS
from unet_ray.data import pages, storage

SEPARATOR = "\0"


def joined(files: Sequence[str]) -> str:
    """Returns the location of a mask that consists of these files; an empty name stands for a file that is lacking."""
    return SEPARATOR.join(files)


def files_of(location: str) -> list[str]:
    """Returns the files of a mask, without those that are lacking."""
    return [file for file in location.split(SEPARATOR) if file]


def read(location: str) -> bytes | list[bytes | None]:
    """Reads a mask as `imaging.decode_mask` takes it. Raises OSError, ImageError."""
    if SEPARATOR not in location:
        return pages.read_file(location, MAX_PIXELS)
    return [pages.read_file(file, MAX_PIXELS) if file else None for file in location.split(SEPARATOR)]


def shown(location: str) -> str:
    """Returns the location for a message: the first file, and the number of the others."""
    first, *others = [storage.without_secrets(pages.shown(file)) for file in files_of(location)]
    return f"{first} and {len(others)} more" if others else first


def sizes_and_times(locations: Sequence[str]) -> list[list[tuple[int, int]]]:
    """Returns the sizes and modification times of the files of each mask, see `storage.sizes_and_times`."""
    files = [files_of(location) for location in locations]
    found = iter(storage.sizes_and_times([pages.file_of(file) for several in files for file in several]))
    return [[next(found) for _ in several] for several in files]


def first_file(location: str) -> str:
    """Returns the first file that there is."""
    return files_of(location)[0]
