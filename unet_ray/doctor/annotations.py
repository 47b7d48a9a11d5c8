"""Recognises annotations, polygons and run lengths, by their content. They are not read as masks yet."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from unet_ray.data import lists, storage
from unet_ray.doctor.report import Finding, error

BEGINNING = 2**16
"""Bytes of a file by which it is recognised."""
FILES = 50
"""Files of a folder that are looked at."""
KINDS = {
    "COCO's JSON": (".json", re.compile(r'"(images|annotations|categories)"\s*:\s*\[')),
    "labelme's JSON": (".json", re.compile(r'"shapes"\s*:\s*\[')),
    "CVAT's XML": (".xml", re.compile(r"<annotations>[\s\S]*<(image|meta|version)\b")),
    "run lengths in a table": (".csv", re.compile(r"^[^\n]*(EncodedPixels|rle_mask|\brle\b)[^\n]*$", re.I | re.M)),
    "YOLO's polygons": (".txt", re.compile(r"\A\s*\d+( +[01]?\.\d+){6,}\s*$", re.M)),
}
"""Name -> extension, and what its beginning has."""


def find_annotations(images_at: str, masks_at: str | None) -> list[Finding]:
    """Finds annotations where masks were looked for."""
    for location in dict.fromkeys((masks_at or images_at, images_at)):
        for path in _files(location):
            kind = _kind(path)
            if kind is not None:
                text = f"{storage.without_secrets(location)} holds {kind} ({path.name}), and no masks"
                remedy = (
                    "annotations are not read as masks yet: draw them as PNG masks of class ids with their own tool"
                )
                return error("annotations-instead-of-masks", text, remedy)
    return []


def _files(location: str) -> Iterator[Path]:
    path = Path(location)
    if path.is_file():
        yield path
    elif not storage.is_uri(location) and path.is_dir():
        endings = {extension for extension, _ in KINDS.values()}
        found = (file for file in sorted(path.rglob("*")) if file.suffix.lower() in endings and file.is_file())
        yield from itertools.islice(found, FILES)


def _kind(path: Path) -> str | None:
    try:
        with path.open("rb") as stream:
            text = lists.decoded(stream.read(BEGINNING))
    except OSError:
        return None
    return next((kind for kind, (end, has) in KINDS.items() if path.suffix.lower() == end and has.search(text)), None)
