"""Reads the lists of classes that data sets carry beside their masks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from unet_ray.data import lists, storage

NAMES = (
    "classes.txt", "labels.txt", "class_names.txt", "labelmap.txt", "label_colors.txt", "class_dict.csv",
    "class_dict.txt", "_classes.csv", "classes.csv", "class.txt", "colors.txt", "label_map.txt", "palette.txt",
    "codes.txt",
)  # fmt: skip
COLOUR = r"(\d{1,3})[\s,;]+(\d{1,3})[\s,;]+(\d{1,3})"
AHEAD, BEHIND = (
    re.compile(rf"^\s*(?:\d+[\s,;:]+(?={COLOUR}[\s,;:]+[^\d\s]))?{COLOUR}[\s,;:]+(\S.*?)\s*$"),
    re.compile(rf"^\s*(\S.*?)[\s,;:]+{COLOUR}(?:[:,;\s].*)?$"),
)
VALUE = re.compile(r"^\s*(\d+)[\s,;:=]+(\S.*?)\s*$")


@dataclass(slots=True)
class ClassList:
    """The names of classes, by stored value or by colour."""

    by_value: dict[int, str] = field(default_factory=dict)
    by_colour: dict[tuple[int, ...], str] = field(default_factory=dict)
    """In the order of the file."""
    file: str = ""


def class_list(folders: list[str]) -> ClassList:
    """Reads the list of classes in these folders or the folders above them, if there is one."""
    for path in _candidates(folders):
        text = lists.decoded(path.read_bytes())
        found = ClassList(file=str(path))
        for line in text.splitlines():
            _read_line(line, found)
        if found.by_colour:
            found.by_value = {}
        if found.by_colour or found.by_value:
            return found
    return ClassList()


def _candidates(folders: list[str]) -> Iterator[Path]:
    for location in folders:
        if storage.is_uri(location):
            continue
        fixed = re.split(r"[*?\[]", location)[0]
        folder = Path(location if fixed == location else fixed.rpartition("/")[0])
        places = [folder, folder.parent, folder.parent.parent]
        places += [place / "ImageSets/Segmentation" for place in places]
        if folder.is_dir():
            places += sorted(inner for inner in folder.iterdir() if inner.is_dir())[:8]
        yield from (path for place in places for name in NAMES if (path := place / name).is_file())


def _read_line(line: str, found: ClassList) -> None:
    if ahead := AHEAD.match(line):
        colour, name = ahead.groups()[3:6], ahead[7]
    elif behind := BEHIND.match(line):
        colour, name = behind.groups()[1:4], behind[1]
    else:
        if value := VALUE.match(line):
            found.by_value[int(value[1])] = value[2]
        return
    red, green, blue = map(int, colour)
    if max(red, green, blue) < 256:
        name = name.strip(',;: \t"')
        # VOC's tools write `_background_`; scores leave out `background`.
        found.by_colour[(red, green, blue)] = "background" if name.lower() == "_background_" else name
