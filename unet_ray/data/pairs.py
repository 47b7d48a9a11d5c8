"""Matches images with their masks by name."""

from __future__ import annotations

import logging
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath

from unet_ray.config import DataConfig, UserError, locations, shown_locations
from unet_ray.data import mask_files, pair_lists, storage
from unet_ray.data.annotations import sources
from unet_ray.data.inputs import ImageFile, find_images, is_one_file, listing, without_pattern

log = logging.getLogger("unet_ray")

MASK_SUFFIX = "_mask"


@dataclass(frozen=True, slots=True)
class Pair:
    """One image and its mask."""

    key: str
    image: str
    mask: str
    """A file, or several, see `mask_files`."""


@dataclass(frozen=True, slots=True)
class Matches:
    """Pairs of images and masks, and the files that can't be paired."""

    pairs: list[Pair]
    """Images with a mask and a key that no other image has, sorted by key."""
    twice: list[str]
    """Names that several images share, so that their masks can't be told apart."""
    ambiguous: dict[str, list[str]]
    """Key of an image with several masks, if those are refused, or in one folder of a class -> their paths."""
    missing: list[ImageFile]
    """Images without a mask."""
    orphans: list[ImageFile]
    """Masks without an image."""
    classes: list[str] = field(default_factory=list)
    """With `several_masks: classes`, the folders that are classes, in the order of the class ids."""


# --- which files there are ---


PAGES_ARE_CHANNELS = 5
"""Networks of so many channels take the pages of a TIFF as channels; with fewer, each page is an image."""


def list_pair_files(data: DataConfig, channels: int = 3) -> tuple[list[ImageFile], list[ImageFile], bool]:
    """Lists the images and the masks, and tells whether both are in one folder. Raises UserError.

    A key begins where the folders differ: with several folders it begins with the part of their paths in which they
    differ, and of a glob it is what the stars stand for, and the path below.
    """
    images, masks = locations(data.images), locations(data.masks)
    if set(images) == set(masks):
        found = _listed(images, _prefixes(images), channels)
        return found, found, True
    prefixes = _prefixes(images)
    found_images = _listed(images, prefixes, channels)
    found_masks = _listed(masks, prefixes if len(masks) == len(images) else [""] * len(masks), 1)
    are_masks = {mask.path for mask in found_masks}
    # Globs such as `*.png` and `*_mask.png` may overlap.
    rest = [image for image in found_images if image.path not in are_masks]
    return (rest or found_images), found_masks, False


def _listed(folders: Sequence[str], prefixes: Sequence[str], channels: int) -> list[ImageFile]:
    files: list[ImageFile] = []
    for location, prefix in zip(folders, prefixes, strict=True):
        for image in find_images(location, pages=channels < PAGES_ARE_CHANNELS):
            key = prefix + _without_stack(location, without_pattern(location, image.key))
            files.append(replace(image, key=key, name=prefix + image.name))
    return sorted(files, key=lambda image: image.name)


def _without_stack(location: str, key: str) -> str:
    """Returns the key without the name of the file that holds its page, if that is the only file."""
    stem, _, page = key.rpartition("/")
    return page if stem and is_one_file(location) else key


def _prefixes(folders: Sequence[str]) -> list[str]:
    """Returns the beginning of the keys in each folder: the part of its path that tells it from the others."""
    if len(folders) == 1:
        return [""]
    paths = [PurePosixPath(storage.split_options(storage.absolute(folder))[0]).parts for folder in folders]
    ahead = len(posixpath.commonprefix(paths))
    behind = len(posixpath.commonprefix([path[ahead:][::-1] for path in paths]))
    parts = ["/".join(path[ahead : len(path) - behind]) for path in paths]
    if len(set(parts)) < len(parts) or "" in parts:
        parts = [str(number) for number in range(1, len(paths) + 1)]
    return [f"{part}/" for part in parts]


# --- which belong together ---

NameOf = Callable[[ImageFile], str | None]
"""Returns the text by which an image or a mask is matched; None: it has none."""


def match_pairs(
    images: Sequence[ImageFile],
    masks: Sequence[ImageFile],
    *,
    one_folder: bool = False,
    match: str | None = None,
    several: str = "refuse",
) -> Matches:
    """Matches images and masks by name, see `find_pairs`. In one folder, names of masks end in `MASK_SUFFIX`."""
    if one_folder:
        images = [image for image in images if not image.key.endswith(MASK_SUFFIX)]
        masks = [mask for mask in masks if mask.key.endswith(MASK_SUFFIX)]
    name_of: NameOf = (lambda file: file.key) if match is None else _matcher(match)
    by_name: dict[str, list[ImageFile]] = {}
    missing = []
    for image in images:
        if (name := name_of(image)) is None:
            missing.append(image)
        else:
            by_name.setdefault(name, []).append(image)
    masks_of, orphans = _masks_by_name(masks, by_name, name_of, match)
    twice = [name for name, several_images in by_name.items() if len(several_images) > 1]
    folders = sorted({_folder(mask) for found in masks_of.values() for mask in found}) if several == "classes" else []
    pairs, ambiguous = [], {}
    for name, (image, *others) in by_name.items():
        found = masks_of.get(name)
        if found is None:
            missing += [image, *others]
        elif len(found) > 1 and (several == "refuse" or (folders and len(set(map(_folder, found))) < len(found))):
            ambiguous[image.key] = [mask.path for mask in found]
        elif not others:
            pairs.append(Pair(image.key, image.path, _location(found, folders)))
    pairs.sort(key=lambda pair: pair.key)
    return Matches(pairs, twice, ambiguous, sorted(missing, key=lambda image: image.name), orphans, folders)


def _matcher(pattern: str) -> NameOf:
    compiled = re.compile(pattern)

    def text(file: ImageFile) -> str | None:
        found = compiled.search(file.key)
        return None if found is None else found[1 if compiled.groups else 0]

    return text


def _masks_by_name(
    masks: Iterable[ImageFile], names: dict[str, list[ImageFile]], name_of: NameOf, match: str | None
) -> tuple[dict[str, list[ImageFile]], list[ImageFile]]:
    """Returns name of an image -> its masks, and the masks without an image."""
    masks_of: dict[str, list[ImageFile]] = {}
    orphans = []
    for mask in masks:
        # Try the whole name first: x_mask.png belongs to an image x_mask.jpg if there is one, otherwise to x.jpg.
        own = name_of(mask)
        tried = [own] if match is not None else [mask.key, mask.key.removesuffix(MASK_SUFFIX)]
        name = next((each for each in tried if each is not None and each in names), None)
        if name is None:
            orphans.append(mask)
        else:
            masks_of.setdefault(name, []).append(mask)
    return masks_of, orphans


def _folder(mask: ImageFile) -> str:
    return mask.name.rpartition("/")[0]


def _location(masks: Sequence[ImageFile], folders: Sequence[str]) -> str:
    """Returns the location of a mask that consists of these files: in the order of the classes, or of the names."""
    if not folders:
        return mask_files.joined([mask.path for mask in sorted(masks, key=lambda mask: mask.name)])
    by_folder = {_folder(mask): mask.path for mask in masks}
    return mask_files.joined([by_folder.get(folder, "") for folder in folders])


def find_pairs(data: DataConfig, channels: int = 3, *, say: bool = False) -> list[Pair]:
    """Pairs each image with its mask, sorted by key. `channels`: of the network.

    A mask has the image's relative path and stem (`car.jpg`: `car.png` or `car_mask.gif`); both may be in one folder.
    Names match exactly: `train1` is never `train10`. With `data.match`, the text that it finds must be the same in both
    names. Images without a mask are left out, and so are masks without an image; `say` logs how many. Raises UserError
    if nothing pairs, or if it can't be told what belongs together. A list of pairs says itself which mask an image has.
    """
    found = _listed_matches(data) or _matches(data, channels, say=say)
    _refuse(found, data)
    if say:
        for files, what in ((found.missing, "images have no mask"), (found.orphans, "masks have no image")):
            if files:
                names = listing([file.name for file in files], 3)
                log.warning("%d %s: they are left out (%s)", len(files), what, names)
    return found.pairs


def _matches(data: DataConfig, channels: int, *, say: bool) -> Matches:
    """Pairs files by their names, or, if that is not possible, images with annotations."""
    files = all(map(_may_be_annotations, locations(data.masks)))
    if files and (found := _annotated_matches(data, channels, say=say)) is not None:
        return found
    try:
        images, masks, one_folder = list_pair_files(data, channels)
        found = match_pairs(images, masks, one_folder=one_folder, match=data.match, several=data.several_masks)
        if found.pairs:
            return found
    except UserError as error:
        if files or (found := _annotated_matches(data, channels, say=say)) is None:
            raise error from None
        return found
    return found if files else _annotated_matches(data, channels, say=say) or found


def _may_be_annotations(location: str) -> bool:
    """Returns whether a location is a file of a kind that annotations have."""
    return storage.split_options(location)[0].lower().endswith((".json", ".xml", ".csv", ".parquet"))


def _annotated_matches(data: DataConfig, channels: int, *, say: bool) -> Matches | None:
    """Returns the pairs of images and annotations; None if there are no annotations. Raises UserError."""
    found = [sources.recognised(location) for location in dict.fromkeys(locations(data.masks))]
    known = [source for source in found if source is not None]
    if not known or len(known) < len(found):
        return None
    prefixes = _prefixes(locations(data.images))
    images = _listed(locations(data.images), prefixes, channels)
    masks: dict[str, str] = {}
    orphans: list[str] = []
    for source in known:
        each = sources.paired(source, images, data, say=say)
        masks |= each.masks
        orphans += each.orphans
    return annotated_matches(images, masks, orphans)


def annotated_matches(images: Sequence[ImageFile], masks: Mapping[str, str], orphans: Iterable[str]) -> Matches:
    """Returns the pairs of images and annotations. `masks`, `orphans`: see `sources.Paired`."""
    pairs = [Pair(image.key, image.path, masks[image.path]) for image in images if image.path in masks]
    missing = [image for image in images if image.path not in masks]
    lost = [ImageFile(name, name, name, -1, 0) for name in orphans]
    return Matches(sorted(pairs, key=lambda pair: pair.key), [], {}, missing, lost)


def _listed_matches(data: DataConfig) -> Matches | None:
    """Returns the pairs of a list of pairs; None if images and masks are not one list. Raises UserError."""
    locations_of_both = {*locations(data.images), *locations(data.masks)}
    if len(locations_of_both) != 1 or not pair_lists.is_pair_list(location := locations_of_both.pop()):
        return None
    if data.match is not None:
        raise UserError(f"{location}: a list says which mask an image has: leave out --match")
    return matches_of(pair_lists.read(location), data.several_masks)


def matches_of(rows: Sequence[pair_lists.Listed], several: str) -> Matches:
    """Returns the pairs of a list: an image in several rows has several masks."""
    images = {row.image.path: row.image for row in rows}
    masks: dict[str, list[str]] = {path: [] for path in images}
    for row in rows:
        if row.mask is not None:
            masks[row.image.path].append(row.mask.path)
    missing = [image for path, image in images.items() if not masks[path]]
    counts = Counter(image.key for image in images.values())
    ambiguous = {images[path].key: found for path, found in masks.items() if len(found) > 1 and several != "union"}
    pairs = [
        Pair(image.key, path, mask_files.joined(masks[path]))
        for path, image in images.items()
        if masks[path] and counts[image.key] == 1 and image.key not in ambiguous
    ]
    pairs.sort(key=lambda pair: pair.key)
    return Matches(pairs, [key for key, count in counts.items() if count > 1], ambiguous, missing, [])


def _refuse(found: Matches, data: DataConfig) -> None:
    """Raises UserError for what can't be paired."""
    images_at, masks_at = map(shown_locations, (data.images, data.masks))
    if found.twice and data.match:
        raise UserError(
            f"{images_at}: --match {data.match!r} finds {listing(found.twice)} in more than one image: it must find "
            "what only one has"
        )
    if found.twice:
        raise UserError(
            f"{images_at}: {listing(found.twice)}: two images of the same name but for the extension, so their masks "
            "can't be told apart; rename one, or tell them apart with --match"
        )
    if found.ambiguous:
        some = list(found.ambiguous.items())[:3]
        names = "; ".join(f"{key}: {', '.join(PurePosixPath(p).name for p in paths[:4])}" for key, paths in some)
        raise UserError(
            f"{masks_at}: {len(found.ambiguous)} image(s) with several masks"
            f"{' in one folder' if data.several_masks == 'classes' else ''} ({names}): keep one each, or "
            "--set data.several_masks=union if each is an object, or classes if its folder is a class"
        )
    if not found.pairs:
        if data.match and not any(re.search(data.match, image.key) for image in found.missing):
            example = found.missing[0].name if found.missing else images_at
            raise UserError(f"--match {data.match!r} finds nothing in the names of the images, such as {example!r}")
        image, mask = (listing([file.name for file in files], 1) for files in (found.missing, found.orphans))
        raise UserError(
            f"{masks_at}: no mask belongs to an image, such as {image} and {mask or 'none'}: a mask has its image's "
            f"relative path and stem, with or without {MASK_SUFFIX}; `unet-ray doctor` with the same folders finds "
            "other rules"
        )
