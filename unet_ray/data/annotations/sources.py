"""Recognises annotations by their content, and pairs them with their images."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from unet_ray.config import IGNORE, DataConfig, UserError, locations
from unet_ray.data import lists, storage
from unet_ray.data.annotations import coco, cvat, label_studio, labelme, masks_table, run_lengths, via, yolo
from unet_ray.data.annotations.covered import covered
from unet_ray.data.annotations.drawing import Annotated, drawn, stored
from unet_ray.data.inputs import ImageFile, listing

log = logging.getLogger("unet_ray")

READERS: dict[str, Any] = {
    "labelme's JSON": labelme,
    "Label Studio's JSON": label_studio,
    "VIA's JSON": via,
    "COCO's JSON": coco,
    "CVAT's XML": cvat,
    "run lengths in a table": run_lengths,
    "YOLO's polygons": yolo,
}
"""Name -> module with `SUFFIX`, `BEGINNING`, `classes` and `read`; the first that recognises a file reads it."""
FILE_EACH = ("labelme's JSON", "YOLO's polygons")
"""Formats that have a file for each image."""
TABLE, MASKS = "a table of run lengths", "a table of masks"
BACKGROUND = frozenset({"background", "_background_"})
LEFT_OUT = "__ignore__"
"""labelme's own name for what is to be left out; it is drawn as `IGNORE`."""
START = 2**16
"""Bytes of a file by which it is recognised."""
LOOKED_AT = 50
"""Files of a folder that are looked at."""
NO_LABELS = frozenset({"classes", "train", "val", "valid", "test", "labels", "notes", "readme", "requirements"})
"""Stems of text files that lie among YOLO's labels and are none."""


@dataclass(frozen=True, slots=True)
class Source:
    """Annotations that were recognised."""

    kind: str
    location: str
    """As it was given."""
    files: tuple[str, ...]

    @property
    def reader(self) -> ModuleType:
        """The module that reads it."""
        return masks_table if self.kind in (TABLE, MASKS) else READERS[self.kind]


def recognised(location: str) -> Source | None:
    """Returns the annotations that a file is, or that lie in a folder and below it; None if there are none."""
    location = storage.absolute(location)
    if storage.split_options(location)[0].endswith(".parquet"):
        return _of_table(location)
    if not storage.is_folder(location):
        kind = _kind(location) if storage.exists(location) else None
        return None if kind is None else Source(kind, location, (location,))
    found = list(_candidates(location))
    kind = next((kind for file in found[:LOOKED_AT] if (kind := _kind(file)) is not None), None)
    if kind is None:
        return None
    suffix = READERS[kind].SUFFIX
    files = [file for file in found if storage.split_options(file)[0].lower().endswith(suffix)]
    if kind in FILE_EACH:
        files = [file for file in files if _stem(file).lower() not in NO_LABELS]
    else:
        files = [file for file in files if _kind(file) == kind]
    return Source(kind, location, tuple(files))


def _of_table(location: str) -> Source | None:
    try:
        names = set(masks_table.columns(location))
    except (OSError, ValueError, IndexError):
        return None
    kind = TABLE if {"path", "class_id", "counts"} <= names else MASKS if {"path", "mask"} <= names else None
    return None if kind is None else Source(kind, location, tuple(masks_table.files(location)))


def _candidates(folder: str) -> Iterator[str]:
    """Yields the files of a folder that may be annotations, by name."""
    suffixes = tuple({reader.SUFFIX for reader in READERS.values()})
    base, options = storage.split_options(folder)
    inner = storage.resolve(folder)[1].rstrip("/")
    names = sorted(entry.path.removeprefix(inner).lstrip("/") for entry in storage.list_files(folder))
    for name in names:
        hidden = any(part.startswith(".") for part in name.split("/"))
        if name.lower().endswith(suffixes) and not hidden:
            yield f"{base.rstrip('/')}/{name}{options}"


def _kind(file: str) -> str | None:
    try:
        text = lists.decoded(storage.read_at_most(file, START))
    except OSError:
        return None
    name = storage.split_options(file)[0].lower()
    return next(
        (kind for kind, reader in READERS.items() if name.endswith(reader.SUFFIX) and reader.BEGINNING.search(text)),
        None,
    )


def _stem(file: str) -> str:
    return storage.split_options(file)[0].rpartition("/")[2].rpartition(".")[0]


def class_names(source: Source) -> tuple[list[str], bool]:
    """Returns the names of the classes, and whether the format lists them; otherwise they are those that occur."""
    if source.kind == MASKS:
        return [], False
    listed: dict[str, None] = {}
    for file in source.files[:1] if source.kind in FILE_EACH else source.files:
        with _as_one_line(source, file):
            listed |= dict.fromkeys(source.reader.classes(file) or ())
    if listed:
        return list(listed), True
    found = {shape.label for _, annotated in read(source) for shape in annotated.shapes}
    return sorted(found - {LEFT_OUT}), False


def only_class(data: DataConfig) -> tuple[str, ...]:
    """Returns the names for `DataConfig.classes` if all annotations are of one class, and so name the foreground;
    otherwise none."""
    found = (recognised(location) for location in locations(data.masks))
    names = {name for source in found if source is not None for name in class_names(source)[0]}
    names = {name for name in names if name.lower() not in BACKGROUND}
    return ("background", *names) if len(names) == 1 else ()


def read(source: Source, rle_order: str | None = None) -> Iterator[tuple[str, Annotated]]:
    """Yields (file, annotated image). Raises UserError for a file that can't be read."""
    if source.kind == TABLE:
        for annotated in masks_table.read(source.location):
            yield source.files[0], annotated
        return
    for file in source.files:
        options = (rle_order,) if source.reader is run_lengths else ()
        with _as_one_line(source, file):
            for annotated in source.reader.read(file, *options):
                yield file, annotated


@contextmanager
def _as_one_line(source: Source, file: str) -> Iterator[None]:
    """Turns what a reader raises for a file that is damaged, or of another form, into UserError."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, RecursionError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"{file}: {source.kind} that can't be read ({reason}): export it again") from None


# --- which image each belongs to ---


class Names:
    """Finds images by the names that annotations have for them."""

    def __init__(self, images: Iterable[ImageFile]) -> None:
        self.by_tail: dict[str, list[ImageFile]] = {}
        for image in images:
            for tail in _tails(image.key):
                self.by_tail.setdefault(tail, []).append(image)

    def find(self, *names: str) -> ImageFile | None:
        """Returns the only image whose path ends as one of these names does, the longest end first."""
        for name in names:
            for tail in _tails(name):
                found = self.by_tail.get(tail, [])
                if len(found) == 1:
                    return found[0]
        return None


def _tails(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[start:]) for start in range(len(parts))]


def _names_of(source: Source, file: str, annotated: Annotated) -> list[str]:
    """Returns the names by which an image may be found, without extensions: the likeliest first."""
    here = storage.split_options(file)[0].removeprefix(storage.split_options(source.location)[0]).strip("/")
    folder = here.rpartition("/")[0]
    own = re.sub(r"\.[A-Za-z0-9]{2,5}$", "", annotated.name.replace("\\", "/")).lstrip("/")
    if source.kind in FILE_EACH:
        return [here.rpartition(".")[0] or _stem(file), own]
    return [f"{folder}/{own}".lstrip("/"), own]


@dataclass(slots=True)
class Paired:
    """Annotations and their images."""

    masks: dict[str, str]
    """Path of an image -> location of its mask."""
    orphans: list[str]
    """Names of annotated images that are not there."""
    labels: Counter[str]
    """Label -> shapes."""
    covered: int = 0
    """Shapes that later ones of another class cover; not counted if the smaller shape is seen."""


def paired(source: Source, images: Sequence[ImageFile], data: DataConfig, *, say: bool = False) -> Paired:
    """Finds the image of each annotated one. Raises UserError for classes that are not there, or an image that is
    annotated in two ways."""
    if source.kind == MASKS:
        return _of_masks(source, images)
    ids = _ids(source, data)
    names = Names(images)
    found = Paired({}, [], Counter())
    for file, annotated in read(source, data.rle_order):
        image = names.find(*_names_of(source, file, annotated))
        if image is None:
            found.orphans.append(annotated.name)
            continue
        if image.path not in found.masks:  # an export may hold the same file twice
            found.labels.update(shape.label for shape in annotated.shapes)
        of_labels = ids or _as_foreground(annotated)
        if data.overlap_order == "later" and image.path not in found.masks:
            found.covered += covered(annotated.shapes, of_labels)
        mask = drawn(file, annotated, of_labels, image.path, by_area=data.overlap_order == "area")
        before = found.masks.setdefault(image.path, mask)
        if before.partition("#")[2] != mask.partition("#")[2]:
            raise UserError(f"{file}: {annotated.name} is annotated twice, in two ways: remove one")
    _check_labels(source, found.labels, ids)
    if say:
        _say(source, found, ids, data)
    return found


def _of_masks(source: Source, images: Sequence[ImageFile]) -> Paired:
    names, found = Names(images), Paired({}, [], Counter())
    for file in source.files:
        for row, path in enumerate(masks_table.paths(file)):
            image = names.find(path.rpartition(".")[0])
            if image is None:
                found.orphans.append(path)
            else:
                found.masks[image.path] = stored(file, row, "mask")
    return found


def _ids(source: Source, data: DataConfig) -> dict[str, int]:
    """Returns the class id of each label; empty: all are the foreground. Raises UserError for an unknown class."""
    if not data.classes:
        return {}
    names, listed = class_names(source)
    if data.classes[0].lower() not in BACKGROUND:
        raise UserError(
            f"{source.location}: data.classes begins with {data.classes[0]!r}, and annotations leave a background: "
            f"pick classes with --classes {','.join(names)}"
        )
    unknown = [name for name in data.classes[1:] if name not in names]
    if unknown and (listed or len(unknown) == len(data.classes) - 1):
        raise UserError(f"{source.location}: no class {listing(unknown, 3)}: there are {', '.join(names) or 'none'}")
    return {name: k for k, name in enumerate(data.classes)} | dict.fromkeys(BACKGROUND, 0) | {LEFT_OUT: IGNORE}


def _as_foreground(annotated: Annotated) -> dict[str, int]:
    """Returns the class id of each label of an image if all are the foreground."""
    labels = {shape.label for shape in annotated.shapes}
    return {label: int(label.lower() not in BACKGROUND) for label in labels} | {LEFT_OUT: IGNORE}


def _check_labels(source: Source, labels: Counter[str], ids: dict[str, int]) -> None:
    if ids and labels and not labels.keys() & ids.keys():
        raise UserError(f"{source.location}: no shape of these classes: there are {', '.join(sorted(labels))}")


def _say(source: Source, found: Paired, ids: dict[str, int], data: DataConfig) -> None:
    kept = {label: count for label, count in found.labels.items() if not ids or label in ids}
    shown = ", ".join(f"{count} {label}" for label, count in sorted(kept.items(), key=lambda each: -each[1])[:8])
    log.warning("%s: masks are drawn from %s: %s", source.location, source.kind, shown or "no shape")
    if left := {label: count for label, count in found.labels.items() if label not in kept}:
        shown = ", ".join(f"{count} {label}" for label, count in left.items())
        log.warning("%s: shapes of other classes are left out: %s", source.location, shown)
    if found.covered:
        text = "%s: %d shapes lie under later ones of another class: --overlap-order area shows the smaller of two"
        log.warning(text, source.location, found.covered)
    if source.reader is run_lengths:
        order = run_lengths.order_of(source.files[0], data.rle_order)
        log.warning("%s: run lengths go along the %s (--rle-order says otherwise)", source.location, order)
