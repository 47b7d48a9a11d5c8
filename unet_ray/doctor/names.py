"""Lists and pairs the files of a data set; recognises rules of names that would pair the rest."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from unet_ray.config import UserError, shown_locations
from unet_ray.data import mask_files, pair_lists, storage
from unet_ray.data.annotations import sources
from unet_ray.data.annotations.drawing import split_drawn
from unet_ray.data.annotations.sources import Source
from unet_ray.data.inputs import EXTENSIONS, ImageFile, find_images
from unet_ray.data.pair_lists import is_pair_list
from unet_ray.data.pairs import MASK_SUFFIX, Pair, match_pairs, matches_of
from unet_ray.doctor.annotations import find_annotations, pair_annotations
from unet_ray.doctor.layouts import Found, Way, best_way
from unet_ray.doctor.pixels import gray_levels
from unet_ray.doctor.report import Finding, error, note, warning
from unet_ray.doctor.words import counts, number

NOT_MISSED = frozenset(
    {"", ".txt", ".md", ".csv", ".db", ".ini", ".lock", ".log", ".html", ".pdf", ".yml", ".yaml", ".py"}
)
"""Extensions of files beside images that nobody expects to be read."""


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a data set, and the way in which images and masks belong together."""

    way: Way
    """`Way.masks` is empty if there are no masks."""
    images: list[ImageFile]
    masks: list[ImageFile]
    pairs: list[Pair]
    """Sorted by key."""
    classes: list[str]
    """Folders of masks that are classes, in their order."""
    findings: list[Finding]


def listing(images_at: str, masks_at: str | None, match: str | None = None) -> Listing:
    """Lists the files and pairs them. `masks_at` None: see `examine`. Raises UserError if there is no such folder."""
    images_at, masks_at = storage.absolute(images_at), None if masks_at is None else storage.absolute(masks_at)
    if masks_at is not None and not storage.is_folder(masks_at) and (source := sources.recognised(masks_at)):
        return _annotated(images_at, source, _listed(images_at))
    if masks_at in (None, images_at) and is_pair_list(images_at):
        return _of_list(images_at)
    given = {location: _listed(location) for location in dict.fromkeys((images_at, masks_at or images_at))}
    empty = [location for location, files in given.items() if not files]
    findings = [
        finding
        for location in empty
        for finding in error(
            "no-images",
            f"{location}: no file of a kind that can be read",
            f"kinds: {', '.join(sorted(EXTENSIONS))}; convert others, or name another folder",
        )
    ]
    findings += _skipped(set(given))
    found = None if empty else best_way(images_at, masks_at, match)
    if found is not None and masks_at not in (None, images_at) and _swapped(found):
        text = "--images and --masks look swapped: one has the photographs, the other the masks"
        findings += warning("folders-swapped", text, "the command below has them the right way round")
        found = best_way(str(masks_at), images_at, match)
    if (found is None or not found.matches.pairs) and (source := find_annotations(images_at, masks_at)):
        return _annotated(images_at, source, given[images_at])
    if found is None or (not found.matches.pairs and masks_at is None):
        text = "no masks are among the images: only the images are examined"
        findings += note("no-masks", text, "for training add --masks DIR") if masks_at is None else []
        return Listing(Way(images_at, masks_at or ""), given[images_at], [], [], [], findings)
    findings += [*_of_way(found, images_at, masks_at), *_of_files(found)]
    return Listing(found.way, found.images, found.masks, found.matches.pairs, found.matches.classes, findings)


def _annotated(images_at: str, source: Source, images: list[ImageFile]) -> Listing:
    """Pairs images with annotations."""
    found, findings = pair_annotations(images_at, source, images)
    findings += _of_files(found)
    return Listing(found.way, found.images, found.masks, found.matches.pairs, [], findings)


def _of_list(location: str) -> Listing:
    """Lists the files of a list of pairs. Raises UserError."""
    rows = pair_lists.read(location)
    images = list({row.image.path: row.image for row in rows}.values())
    masks = list({row.mask.path: row.mask for row in rows if row.mask is not None}.values())
    matches = matches_of(rows, "refuse")
    way = Way(location, location)
    if matches.ambiguous:
        way, matches = replace(way, several="union"), matches_of(rows, "union")
    found = Found(way, images, masks, matches)
    findings = [*_of_way(found, location, location), *_of_files(found)]
    return Listing(way, images, masks, matches.pairs, [], findings)


def _listed(location: str) -> list[ImageFile]:
    """Lists the images of a folder, which may have none. Raises UserError if there is no such folder."""
    try:
        return find_images(location)
    except UserError:
        if storage.exists(location) and storage.is_folder(location):
            return []
        raise


def _swapped(found: Found) -> bool:
    """Returns whether images and masks are swapped.

    Either the names match only the other way round, or the first images have few gray levels and their masks many.
    """
    crossed = match_pairs(found.masks, found.images).pairs
    if found.way.match is not None and crossed and len(crossed) >= len(found.matches.pairs):
        return True
    votes = [(gray_levels(pair.image), gray_levels(pair.mask)) for pair in found.matches.pairs[:4]]
    return bool(votes) and all(0 < image <= 16 and mask > 64 for image, mask in votes)


def _of_way(found: Found, images_at: str, masks_at: str | None) -> Iterator[Finding]:
    """Says how images and masks belong together, if it is not as they were given."""
    way = found.way
    if (way.images, way.masks) not in ((images_at, masks_at), (images_at, images_at)):
        images, masks = (storage.without_secrets(shown_locations(side)) for side in (way.images, way.masks))
        yield from note("layout", f"the images are {images}, the masks {masks}", "the command below names them so")
    if way.match is not None and found.matches.pairs:
        pair = found.matches.pairs[0]
        names = f"{PurePosixPath(mask_files.first_file(pair.mask)).name} for {PurePosixPath(pair.image).name}"
        text = f"masks are named otherwise than their images ({names})"
        yield from note("masks-named-otherwise", text, f"--match {shlex.quote(way.match)} pairs them")
    if way.several == "union":
        text = f"{len(found.masks)} masks for {len(found.images)} images: each is an object"
        yield from note("several-masks", text, "--set data.several_masks=union makes one mask of them")
    if way.several == "classes":
        text = f"the folders of the masks are classes: {', '.join(found.matches.classes)}"
        yield from note("folders-are-classes", text, "--set data.several_masks=classes makes one mask of them")


def _of_files(found: Found) -> Iterator[Finding]:
    """Finds files that can't be paired."""
    matches = found.matches
    text = f"{number(matches.twice, 'name')} with two images that differ only in the extension"
    remedy = "rename or remove one of each: their masks can't be told apart"
    twice = set(matches.twice)
    yield from error("two-images-of-one-name", text, remedy, [i.name for i in found.images if i.key in twice])
    ambiguous = {path for paths in matches.ambiguous.values() for path in paths}
    text = f"{number(matches.ambiguous, 'image')} with two masks"
    remedy = f"keep one each (an image x.jpg has x.png or x{MASK_SUFFIX}.png), or --set data.several_masks=union"
    yield from error("two-masks-for-one-image", text, remedy, [m.name for m in found.masks if m.path in ambiguous])
    level = note if matches.pairs else error
    text = f"{number(matches.missing, 'image')} of {len(found.images)} without a mask"
    drawn = bool(found.masks) and split_drawn(found.masks[0].path) is not None
    remedy = "left out in training"
    if not drawn:
        remedy += f"; if it has one: the image's path and stem, with or without {MASK_SUFFIX}"
    yield from level("image-without-mask", text, remedy, [image.name for image in matches.missing])
    count = len(found.masks) + len(matches.orphans) * drawn  # annotations without an image are no masks
    text = f"{number(matches.orphans, 'mask')} of {count} without an image"
    yield from level("mask-without-image", text, "left out in training", [mask.name for mask in matches.orphans])


def _skipped(locations: Iterable[str]) -> list[Finding]:
    """Finds files in local folders whose kind is not read."""
    kinds: dict[str, list[str]] = {}
    for location in locations:
        if storage.is_uri(location) or not Path(location).is_dir():
            continue
        for folder, subfolders, files in os.walk(location):
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            for name in files:
                kind = ".nii.gz" if name.endswith(".nii.gz") else PurePosixPath(name).suffix.lower()
                if not name.startswith(".") and kind not in NOT_MISSED | EXTENSIONS:
                    kinds.setdefault(kind, []).append(str(Path(folder, name).relative_to(location)))
    numbers = {kind: len(names) for kind, names in kinds.items()}
    total = sum(numbers.values())
    text = f"{total} {'file is' if total == 1 else 'files are'} skipped ({counts(numbers)})"
    remedy = f"convert them to one of {', '.join(sorted(EXTENSIONS))}; volumes (.nii) with `unet-ray slices`"
    return note("files-passed-over", text, remedy, [names[0] for names in kinds.values()])
