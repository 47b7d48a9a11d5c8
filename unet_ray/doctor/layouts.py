"""Finds out how the images and masks of a data set belong together: which folders, and which option pairs their names.

Every way is tried with the code that a training uses (`data.pairs`). So what is printed works.
"""

from __future__ import annotations

import itertools
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from unet_ray.config import DataConfig, UserError, locations
from unet_ray.data import mask_files, storage
from unet_ray.data.inputs import ImageFile, evenly, find_images
from unet_ray.data.pairs import Matches, list_pair_files, match_pairs

_WORDS = (
    r"masks?|msk|labels?|labelids|seg|segmentation|gt|gtfine|annot[a-z]*|truth|targets?|matte|binary|manual1?|1stho"
)
_SPACE = r"[_\-. ]+"
MASK_WORD = re.compile(rf"^(({_WORDS}|m){_SPACE}|mask)+|({_SPACE}({_WORDS}|m|l)|mask)+$", re.IGNORECASE)
"""Words at the start or end of a name by which a mask is known."""
MASK_FOLDER = re.compile(rf"mask|label|annot|truth|segmentation|(^|{_SPACE})({_WORDS})", re.IGNORECASE)
SECOND_CHOICE = re.compile(r"instance|object|colou?r|panoptic|border|edge|contour|skeleton", re.IGNORECASE)
"""Masks of this name are for something else, if there are others."""
SEPARATORS = "_-. "
SAMPLE, RULES, TRIED = 300, 6, 12
"""Names that rules are derived from; rules of each kind that are tried; folders of masks that are tried."""
ENOUGH = 0.9
"""If this share of the images or masks pairs, no other way is looked for."""


@dataclass(frozen=True, slots=True)
class Way:
    """The options that say which images and masks there are, and how they belong together."""

    images: str | tuple[str, ...]
    """A folder or glob, or several, as `DataConfig.images`."""
    masks: str | tuple[str, ...]
    match: str | None = None
    several: str = "refuse"
    classes: tuple[str, ...] = ()
    """Of annotations, if there are several."""
    by_area: bool = False
    """Of annotations that overlap, the smaller one is seen."""

    def files(self) -> tuple[list[ImageFile], list[ImageFile], bool]:
        """Returns images, masks and whether they are in one folder; no files where there are none."""
        try:
            return list_pair_files(DataConfig(images=self.images, masks=self.masks))
        except UserError:
            return [], [], False


@dataclass(frozen=True, slots=True)
class Found:
    """A way that was tried."""

    way: Way
    images: list[ImageFile]
    masks: list[ImageFile]
    matches: Matches
    order: int = 0
    """Place of its rule among those that were tried, the most exact first."""

    @property
    def good(self) -> bool:
        """Whether nearly all images or nearly all masks pair."""
        fewer = min(len(self.images), self.sets)
        return bool(self.matches.pairs) and len(self.matches.pairs) >= ENOUGH * fewer

    @property
    def sets(self) -> int:
        """Number of images that the masks are for, if each has as many as those that pair."""
        used = len(self.masks) - len(self.matches.orphans)
        return round(len(self.masks) * len(self.matches.pairs) / used) if used else len(self.masks)

    def rank(self) -> tuple[float, ...]:
        """Orders ways: the most pairs, then names that are meant for classes, then the fewest options."""
        way = self.way
        files = [file for pair in self.matches.pairs[:3] for file in (pair.image, *mask_files.files_of(pair.mask))]
        places = [*locations(way.images), *locations(way.masks)]
        names = [*places, *(PurePosixPath(file).name for file in files)]
        second = any(SECOND_CHOICE.search(name) for name in names)
        options = (way.match is not None) + (way.several != "refuse") + sum("*" in place for place in places)
        return (len(self.matches.pairs), -second, way.several == "classes", -options, -self.order)


def best_way(images_at: str, masks_at: str | None, match: str | None = None) -> Found | None:
    """Returns the way that pairs the most images. None: `masks_at` is None, and no masks are among the images.

    `match`: the rule for names that was given; None: it is looked for.
    """
    ways = _ways(images_at, masks_at)
    if not ways:
        return None
    tried: list[Found] = []
    for way in ways[:TRIED]:
        files = way.files()
        tried += _tried(way, *files, match)
        if tried and way == ways[0] and tried[-1].good and tried[-1].way.match is None and masks_at is not None:
            break  # as given it works
    return max(tried, key=Found.rank) if tried else None


def _ways(images_at: str, masks_at: str | None) -> list[Way]:
    """Returns the folders and globs that may be the images and the masks: those that were given first."""
    if masks_at is not None and masks_at != images_at:
        given = [Way(images_at, masks_at)]
        return given if storage.is_uri(images_at) else [*given, *_inside(images_at, masks_at)]
    ways = [Way(images_at, images_at)] if masks_at is not None else []
    try:
        files = find_images(images_at)
    except UserError:
        return ways
    if any(image.key.endswith("_mask") for image in files):
        ways = [Way(images_at, images_at)]
    return list(dict.fromkeys([*ways, *_of_folders(images_at, files), *_of_names(images_at, files)]))


def _inside(images_at: str, masks_at: str) -> Iterator[Way]:
    """Yields ways in which one of two folders is divided further, as `masks/SegmentationClass` is."""
    folder = Path(masks_at)
    for inner in sorted(folder.iterdir()) if folder.is_dir() else ():
        if inner.is_dir():
            yield Way(images_at, str(inner))


def _of_folders(root: str, files: Sequence[ImageFile]) -> Iterator[Way]:
    """Yields ways in which folders of one name, at one depth, hold the masks, as `train/masks` and `masks/train`."""
    levels = [file.name.split("/")[:-1] for file in files]
    for depth in range(min(map(len, levels), default=0)):
        names = {level[depth] for level in levels}
        masks = [name for name in sorted(names) if MASK_FOLDER.search(name)]
        images = [name for name in sorted(names) if name not in masks]
        above = storage.join(root, *["*"] * depth) if depth else root
        if partners := _partners(images, masks):
            several_images, several_masks = (tuple(storage.join(above, name) for name in side) for side in partners)
            yield Way(several_images, several_masks)
        for image, mask in itertools.product(images, masks):
            yield Way(storage.join(above, image), storage.join(above, mask))


def _partners(images: Sequence[str], masks: Sequence[str]) -> tuple[list[str], list[str]] | None:
    """Returns folders of images, and in the same order those of their masks, if there are several whose names differ in
    the same way, as `train`, `trainannot` and `val`, `valannot` do."""
    for ending in sorted({mask.removeprefix(image) for image in images for mask in masks if mask.startswith(image)}):
        found = [image for image in images if image + ending in masks]
        if len(found) > 1:
            return found, [image + ending for image in found]
    for beginning in sorted({mask.removesuffix(image) for image in images for mask in masks if mask.endswith(image)}):
        found = [image for image in images if beginning + image in masks]
        if len(found) > 1:
            return found, [beginning + image for image in found]
    return None


def _of_names(root: str, files: Sequence[ImageFile]) -> Iterator[Way]:
    """Yields ways in which masks lie beside their images, and have a name that ends otherwise: `5_sat`, `5_mask`."""
    parts = [(file.name.rpartition("/")[2].rpartition(".")[0], file.name.rpartition(".")[2]) for file in files]
    masks = [(stem, ext) for stem, ext in parts if MASK_WORD.search(stem)]
    images = [(stem, ext) for stem, ext in parts if not MASK_WORD.search(stem)]
    if not masks or not images:
        return
    anywhere = storage.join(root, "**") if any("/" in file.name for file in files) else root
    suffixes = _suffixes([stem for stem, _ in images], [stem for stem, _ in masks])
    kinds = [Counter(ext for _, ext in side).most_common(1)[0][0] for side in (images, masks)]
    for image_end, mask_end in suffixes:
        patterns = (f"*{image_end}.{kinds[0]}", f"*{mask_end}.{kinds[1]}")
        one, other = (storage.join(anywhere, pattern) for pattern in patterns)
        yield Way(one, other)


def _tried(
    way: Way, images: list[ImageFile], masks: list[ImageFile], one_folder: bool, given: str | None
) -> Iterator[Found]:
    """Yields this way without an option, and, if that is not good, with each option that may pair the names."""
    if not images or not masks:
        return
    plain = Found(way, images, masks, match_pairs(images, masks, one_folder=one_folder))
    if given is None and (plain.good or one_folder):
        if one_folder:
            mask_paths = {mask.path for mask in masks if mask.key.endswith("_mask")}
            images, masks = ([f for f in images if (f.path in mask_paths) == wanted] for wanted in (False, True))
            plain = replace(plain, images=images, masks=masks)
        if plain.matches.pairs:
            yield plain
        return
    found = [plain] if plain.matches.pairs and given is None else []
    for order, rule in enumerate((given,) if given else (None, *_rules(images, masks))):
        for several in ("refuse", "union", "classes"):
            matches = match_pairs(images, masks, match=rule, several=several)
            if matches.twice or (several == "classes" and not _are_classes(matches)):
                continue
            if matches.pairs and (several == "refuse") == (not any("\0" in pair.mask for pair in matches.pairs)):
                found.append(Found(replace(way, match=rule, several=several), images, masks, matches, order))
    yield from found


def _are_classes(matches: Matches) -> bool:
    """Returns whether most images have masks in several folders, one in each, and the folders are the same for all."""
    if matches.ambiguous or not 1 < len(matches.classes) < 32:
        return False
    several = sum(len(mask_files.files_of(pair.mask)) > 1 for pair in matches.pairs)
    return 2 * several > len(matches.pairs)


# --- rules for names ---


def _rules(images: Sequence[ImageFile], masks: Sequence[ImageFile]) -> Iterator[str]:
    """Yields regular expressions that may find the same text in the names of an image and of its mask."""
    sides = [[file.key for file in evenly(files, SAMPLE)] for files in (images, masks)]
    stems = [[key.rpartition("/")[2] for key in keys] for keys in sides]
    for image_end, mask_end in _suffixes(*stems):
        for start in ("(.+?)", "([^/]+?)"):
            yield f"{start}{_alternatives(image_end, mask_end)}$"
    for image_end, mask_end in _suffixes(*([stem[::-1] for stem in each] for each in stems)):
        yield f"(?:^|/){_alternatives(image_end[::-1], mask_end[::-1])}([^/]+)$"
    yield "0*([0-9]+)[^0-9/]*$"
    yield "(?:^|/)[^0-9/]*0*([0-9]+)[^/]*$"
    yield r"([A-Za-z]*_?[0-9]{2,})[^/]*$"
    yield "^(.+)/"


def _alternatives(*texts: str) -> str:
    """Returns an expression for one of these texts, or nothing if one of them is empty."""
    kept = [re.escape(text) for text in dict.fromkeys(texts) if text]
    if not kept:
        return ""
    inner = "|".join(sorted(kept, key=len, reverse=True)).replace("\\-", "-").replace("\\ ", " ")
    return f"(?:{inner})" + ("?" if "" in texts else "")


def _suffixes(images: Sequence[str], masks: Sequence[str]) -> list[tuple[str, str]]:
    """Returns the most frequent (end of an image's name, end of its mask's name), for names that begin alike."""
    ordered = sorted(set(images))
    votes: Counter[tuple[str, str]] = Counter()
    for mask in evenly(sorted(set(masks)), SAMPLE):
        place = bisect_left(ordered, mask)
        near = ordered[max(0, place - 2) : place + 2]
        best = max(near, key=lambda image: len(_beginning(image, mask)), default="")
        length = len(_beginning(best, mask).rstrip(SEPARATORS))
        if length:
            votes.update(_cuts(best, mask, length))
    return [ends for ends, _ in votes.most_common(RULES)]


def _beginning(one: str, other: str) -> str:
    alike = itertools.takewhile(lambda letters: letters[0] == letters[1], zip(one, other, strict=False))
    return "".join(letter for letter, _ in alike)


def _cuts(image: str, mask: str, length: int) -> Iterable[tuple[str, str]]:
    """Returns the ends of two names whose first `length` letters are alike: from there, and, if that is within a word
    (`_manual` and `_mask` begin alike), from the separator before."""
    ends = image[length:], mask[length:]
    yield ends
    separator = max(image.rfind(mark, 0, length) for mark in SEPARATORS)
    if separator > 0 and all(end and end[0] not in SEPARATORS for end in ends):
        yield image[separator:], mask[separator:]
