"""Which mask belongs to which image, and which names would pair those that are left over."""

from __future__ import annotations

import itertools
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from unet_ray.config import UserError
from unet_ray.data import storage
from unet_ray.data.inputs import EXTENSIONS, ImageFile, find_images
from unet_ray.data.pairs import MASK_SUFFIX, Pair, match_pairs
from unet_ray.doctor.pixels import gray_levels
from unet_ray.doctor.report import Finding, error, note
from unet_ray.doctor.words import counts, number

_WORDS = (
    r"masks?|msk|labels?|labelids|seg|segmentation|gt|gtfine|annot[a-z]*|truth|targets?|matte|binary|manual1?|1stho"
)
_SPACE = r"[_\-. ]+"
MASK_WORD = re.compile(rf"^(({_WORDS}|m){_SPACE}|mask)+|({_SPACE}({_WORDS}|m|l)|mask)+$", re.IGNORECASE)
IMAGE_WORD = re.compile(
    rf"^((image|img|im){_SPACE}|image)|({_SPACE}(image|img|im|leftimg8bit|sat|rgb)|image)$", re.IGNORECASE
)
"""At the start or the end of a name: what a mask and its image may differ by."""
MASK_FOLDER = re.compile(rf"mask|label|annot|(^|{_SPACE})({_WORDS})", re.IGNORECASE)
NOT_MISSED = frozenset(
    {"", ".txt", ".md", ".csv", ".db", ".ini", ".lock", ".log", ".html", ".pdf", ".yml", ".yaml", ".py"}
)
"""Extensions of files beside images that are no images."""


@dataclass(frozen=True, slots=True)
class Listing:
    """What is in the folders, taken the way it was meant."""

    images_at: str
    masks_at: str | None
    images: list[ImageFile]
    masks: list[ImageFile]
    pairs: list[Pair]
    """Sorted by key; also those that other names would make."""
    findings: list[Finding]


def listing(images_at: str, masks_at: str | None) -> Listing:
    """Lists and pairs. `masks_at` None: as `examine` says. Raises UserError if there is no such folder."""
    images_at, masks_at = storage.absolute(images_at), None if masks_at is None else storage.absolute(masks_at)
    findings: list[Finding] = []
    images = _listed(images_at)
    if masks_at is None and any(image.key.endswith(MASK_SUFFIX) for image in images):
        masks_at = images_at
    inside = _two_folders(images) if masks_at in (None, images_at) else None
    if inside is not None:
        text = f"{images_at} holds images in {inside[0]}/ and masks in {inside[1]}/"
        images_at, masks_at = (storage.join(images_at, name) for name in inside)
        images = _listed(images_at)
        remedy = f"give both: {_flags(images_at, masks_at)}; the rest of this report is about them"
        findings += error("one-folder-holds-both", text, remedy)
    one_folder = images_at == masks_at
    masks = images if one_folder else [] if masks_at is None else _listed(masks_at)
    if masks_at is not None and not one_folder and _swapped(images, masks):
        images_at, masks_at, images, masks = masks_at, images_at, masks, images
        text = "--images and --masks look swapped: one has the photographs, the other the masks"
        remedy = f"give them the other way: {_flags(images_at, masks_at)}; the rest of this report takes them so"
        findings += error("folders-swapped", text, remedy)
    for location, files in ((images_at, images), (masks_at, masks)):
        if location is not None and not files:
            remedy = f"kinds: {', '.join(sorted(EXTENSIONS))}; convert others, or name another folder"
            findings += error("no-images", f"{location}: no file of a kind that can be read", remedy)
    findings += _passed_over({images_at, masks_at or images_at})
    if masks_at is None:
        text = "no folder of masks was given: only the images are examined"
        findings += note("no-masks", text, "for training add --masks DIR")
        return Listing(images_at, None, images, [], [], findings)
    return _paired(Listing(images_at, masks_at, images, masks, [], findings), one_folder=one_folder)


def _listed(location: str) -> list[ImageFile]:
    """The images of a folder, none where it has none. Raises UserError if there is no such folder."""
    try:
        return find_images(location)
    except UserError:
        if storage.exists(location) and storage.is_folder(location):
            return []
        raise


def _flags(images_at: str, masks_at: str) -> str:
    images_at, masks_at = (shlex.quote(storage.without_secrets(location)) for location in (images_at, masks_at))
    return f"--images {images_at} --masks {masks_at}"


def _two_folders(images: Sequence[ImageFile]) -> tuple[str, str] | None:
    """The subfolder of images and that of masks, if that is what the only two look like."""
    tops = {image.name.partition("/")[0] if "/" in image.name else "" for image in images}
    if len(tops) != 2 or "" in tops:
        return None
    first, second = sorted(tops, key=lambda name: MASK_FOLDER.search(name) is not None)
    return (first, second) if MASK_FOLDER.search(second) and not MASK_FOLDER.search(first) else None


def _swapped(images: Sequence[ImageFile], masks: Sequence[ImageFile]) -> bool:
    """Whether the names match the other way round, or the first pairs have few values where photographs should be and
    many where masks should be."""
    straight, crossed = match_pairs(images, masks).pairs, match_pairs(masks, images).pairs
    if len(crossed) > 2 * len(straight) and len(crossed) >= len(masks) / 2:
        return True
    votes = [(gray_levels(pair.image), gray_levels(pair.mask)) for pair in straight[:4]]
    return bool(votes) and all(0 < image <= 16 and mask > 64 for image, mask in votes)


def _paired(found: Listing, *, one_folder: bool) -> Listing:
    """The listing with its pairs and what can't be paired; in one folder, images and masks are told apart."""
    images, masks = found.images, found.masks
    matches = match_pairs(images, masks, one_folder=one_folder)
    missing, orphans = matches.missing, matches.orphans
    if one_folder:
        sides = ([i for i in missing if bool(MASK_WORD.search(_last(i.key))) == mask] for mask in (False, True))
        renamed, code = _other_names(*sides)
    else:
        renamed, code = _other_names(missing, orphans)
    findings = list(found.findings)
    if renamed:
        image, mask = renamed[0]
        text = f"{number(renamed, 'mask')} named otherwise than the image ({mask.name} for {image.name})"
        remedy = f"{_rule(image, mask)}; the rest of this report takes them as pairs"
        findings += error(code, text, remedy, [mask.name for _, mask in renamed])
    taken = {file.path for both in renamed for file in both}
    missing, orphans = ([file for file in files if file.path not in taken] for files in (missing, orphans))
    pairs = [*matches.pairs, *(Pair(image.key, image.path, mask.path) for image, mask in renamed)]
    pairs.sort(key=lambda pair: pair.key)
    two = {path for paths in matches.ambiguous.values() for path in paths}
    if one_folder:
        own = two | {pair.mask for pair in pairs} | {mask.path for mask in orphans}
        masks, images = ([file for file in images if (file.path in own) == wanted] for wanted in (True, False))
    twice = set(matches.twice)
    text = f"{number(twice, 'name')} with two images, but for the extension"
    remedy = "rename or remove one of each: their masks can't be told apart"
    findings += error("two-images-of-one-name", text, remedy, [i.name for i in images if i.key in twice])
    text = f"{number(matches.ambiguous, 'image')} with two masks"
    remedy = f"keep one each: an image x.jpg has x.png or x{MASK_SUFFIX}.png"
    findings += error("two-masks-for-one-image", text, remedy, [mask.name for mask in masks if mask.path in two])
    text = f"{number(missing, 'image')} of {len(images)} without a mask"
    remedy = f"add the masks (the image's path and stem, with or without {MASK_SUFFIX}), or move the images elsewhere"
    findings += error("image-without-mask", text, remedy, [image.name for image in missing])
    text = f"{number(orphans, 'mask')} of {len(masks)} without an image"
    remedy = "add the images, or move the masks elsewhere"
    findings += error("mask-without-image", text, remedy, [mask.name for mask in orphans])
    if pairs and all(PurePosixPath(pair.mask).stem.endswith(MASK_SUFFIX) for pair in pairs):
        text = f"masks are named after their images with {MASK_SUFFIX} at the end"
        findings += note("masks-with-suffix", text, "nothing to do: they are paired so")
    return replace(found, images=images, masks=masks, pairs=pairs, findings=findings)


def _other_names(
    images: Sequence[ImageFile], masks: Sequence[ImageFile]
) -> tuple[list[tuple[ImageFile, ImageFile]], str]:
    """Pairs that other names would make of images and masks without a partner, and the finding's code: by known words
    or by what all names begin and end with, in the same folders or in any. No pairs if that pairs less than half."""
    ways: tuple[Callable[[Sequence[str], re.Pattern[str]], list[str]], ...] = (_without_words, _without_what_is_common)
    for way, anywhere in itertools.product(ways, (False, True)):
        sides = []
        for files, word in ((images, IMAGE_WORD), (masks, MASK_WORD)):
            names = way([_last(file.key) if anywhere else file.key for file in files], word)
            single = {name for name, count in Counter(names).items() if count == 1 and name}
            sides.append({name: file for name, file in zip(names, files, strict=True) if name in single})
        pairs = [(image, sides[1][name]) for name, image in sides[0].items() if name in sides[1]]
        if pairs and 2 * len(pairs) >= min(len(images), len(masks)):
            return pairs, "masks-in-other-folders" if anywhere else "masks-named-otherwise"
    return [], ""


def _without_words(names: Sequence[str], word: re.Pattern[str]) -> list[str]:
    parts = [name.rpartition("/") for name in names]
    return [(head + slash + word.sub("", stem)).lower() for head, slash, stem in parts]


def _without_what_is_common(names: Sequence[str], _word: re.Pattern[str]) -> list[str]:
    """The names without what all begin and end with, numbers without zeros in front."""

    def start(names: Sequence[str]) -> int:
        alike = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
        return len("".join(letters[0] for letters in alike).rstrip("0123456789"))  # digits belong to what differs

    first, last = start(names), start([name[::-1] for name in names])
    return [re.sub(r"^0+(?=\d+$)", "", name[first : len(name) - last]) for name in names]


def _last(key: str) -> str:
    return PurePosixPath(key).name


def _rule(image: ImageFile, mask: ImageFile) -> str:
    """What to do, from the first that are renamed."""
    ours, theirs = _last(image.key), _last(mask.key)
    if ours == theirs:
        return "give masks the same folders below --masks as their images have below --images"
    if theirs.startswith(ours):
        return f"rename masks: {theirs[len(ours) :]!r} at the end becomes {MASK_SUFFIX!r}, or nothing"
    if theirs.endswith(ours):
        return f"rename masks: {theirs[: -len(ours)]!r} at the start becomes nothing"
    return f"rename masks: the image's whole name, with or without {MASK_SUFFIX}"


def _passed_over(locations: Iterable[str]) -> list[Finding]:
    """Files of kinds that are not read, in local folders."""
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
    text = f"{sum(numbers.values())} files are passed over ({counts(numbers)})"
    remedy = f"convert them to one of {', '.join(sorted(EXTENSIONS))}, volumes (.nii) by `unet-ray slices`"
    return note("files-passed-over", text, remedy, [names[0] for names in kinds.values()])
