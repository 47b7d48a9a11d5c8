"""Lists and pairs the files of a data set; recognises rules of names that would pair the rest."""

from __future__ import annotations

import itertools
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from unet_ray.config import UserError
from unet_ray.data import storage
from unet_ray.data.inputs import EXTENSIONS, ImageFile, find_images
from unet_ray.data.pairs import MASK_SUFFIX, Matches, Pair, match_pairs
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
"""Words at the start or end of a name by which a mask and its image may differ."""
MASK_FOLDER = re.compile(rf"mask|label|annot|(^|{_SPACE})({_WORDS})", re.IGNORECASE)
NOT_MISSED = frozenset(
    {"", ".txt", ".md", ".csv", ".db", ".ini", ".lock", ".log", ".html", ".pdf", ".yml", ".yaml", ".py"}
)
"""Extensions of files beside images that nobody expects to be read."""


@dataclass(frozen=True, slots=True)
class Listing:
    """The files in the folders, after swapped or nested folders are corrected."""

    images_at: str
    masks_at: str | None
    images: list[ImageFile]
    masks: list[ImageFile]
    pairs: list[Pair]
    """Sorted by key; includes pairs that match only by other rules of names."""
    findings: list[Finding]


def listing(images_at: str, masks_at: str | None) -> Listing:
    """Lists the files and pairs them. `masks_at` None: see `examine`. Raises UserError if there is no such folder."""
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
        remedy = f"swap them: {_flags(images_at, masks_at)}; the rest of this report does so"
        findings += error("folders-swapped", text, remedy)
    for location, files in ((images_at, images), (masks_at, masks)):
        if location is not None and not files:
            remedy = f"kinds: {', '.join(sorted(EXTENSIONS))}; convert others, or name another folder"
            findings += error("no-images", f"{location}: no file of a kind that can be read", remedy)
    findings += _skipped({images_at, masks_at or images_at})
    if masks_at is None:
        text = "no folder of masks was given: only the images are examined"
        findings += note("no-masks", text, "for training add --masks DIR")
        return Listing(images_at, None, images, [], [], findings)
    return _paired(Listing(images_at, masks_at, images, masks, [], findings), one_folder=one_folder)


def _listed(location: str) -> list[ImageFile]:
    """Lists the images of a folder, which may have none. Raises UserError if there is no such folder."""
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
    """Returns the subfolders of images and of masks if these two are the only ones and their names look like it."""
    tops = {image.name.partition("/")[0] if "/" in image.name else "" for image in images}
    if len(tops) != 2 or "" in tops:
        return None
    first, second = sorted(tops, key=lambda name: MASK_FOLDER.search(name) is not None)
    return (first, second) if MASK_FOLDER.search(second) and not MASK_FOLDER.search(first) else None


def _swapped(images: Sequence[ImageFile], masks: Sequence[ImageFile]) -> bool:
    """Returns whether images and masks are swapped.

    Either the names match only the other way round, or the first images have few gray levels and their masks many.
    """
    straight, crossed = match_pairs(images, masks).pairs, match_pairs(masks, images).pairs
    if len(crossed) > 2 * len(straight) and len(crossed) >= len(masks) / 2:
        return True
    votes = [(gray_levels(pair.image), gray_levels(pair.mask)) for pair in straight[:4]]
    return bool(votes) and all(0 < image <= 16 and mask > 64 for image, mask in votes)


def _paired(found: Listing, *, one_folder: bool) -> Listing:
    """Adds the pairs to a listing, and findings about files that can't be paired.

    In one folder, it also separates the images from the masks.
    """
    matches = match_pairs(found.images, found.masks, one_folder=one_folder)
    renamed, of_renamed = _renamed(matches, one_folder=one_folder)
    taken = {file.path for pair in renamed for file in pair}
    missing, orphans = (
        [file for file in files if file.path not in taken] for files in (matches.missing, matches.orphans)
    )
    pairs = [*matches.pairs, *(Pair(image.key, image.path, mask.path) for image, mask in renamed)]
    pairs.sort(key=lambda pair: pair.key)
    images, masks = found.images, found.masks
    if one_folder:
        of_masks = {pair.mask for pair in pairs} | {mask.path for mask in orphans} | _ambiguous(matches)
        masks, images = (
            [file for file in found.images if (file.path in of_masks) == wanted] for wanted in (True, False)
        )
    findings = [
        *found.findings,
        *of_renamed,
        *_doubles(matches, images, masks),
        *_without_partner(missing, orphans, images, masks),
    ]
    if pairs and all(PurePosixPath(pair.mask).stem.endswith(MASK_SUFFIX) for pair in pairs):
        text = f"masks are named after their images with {MASK_SUFFIX} at the end"
        findings += note("masks-with-suffix", text, "nothing to do: they are paired so")
    return replace(found, images=images, masks=masks, pairs=pairs, findings=findings)


def _ambiguous(matches: Matches) -> set[str]:
    """Returns the paths of masks that share an image with another mask."""
    return {path for paths in matches.ambiguous.values() for path in paths}


def _renamed(matches: Matches, *, one_folder: bool) -> tuple[list[tuple[ImageFile, ImageFile]], list[Finding]]:
    """Pairs files without a partner by other rules of names. Returns these pairs and the finding about them."""
    images, masks = matches.missing, matches.orphans
    if one_folder:
        images, masks = (
            [file for file in matches.missing if bool(MASK_WORD.search(_last(file.key))) == is_mask]
            for is_mask in (False, True)
        )
    renamed, code = _other_names(images, masks)
    if not renamed:
        return [], []
    image, mask = renamed[0]
    text = f"{number(renamed, 'mask')} named differently from the image ({mask.name} for {image.name})"
    remedy = f"{_rule(image, mask)}; the rest of this report takes them as pairs"
    return renamed, error(code, text, remedy, [mask.name for _, mask in renamed])


def _doubles(matches: Matches, images: Sequence[ImageFile], masks: Sequence[ImageFile]) -> Iterator[Finding]:
    """Finds images that share a name, and images with two masks."""
    twice, ambiguous = set(matches.twice), _ambiguous(matches)
    text = f"{number(twice, 'name')} with two images that differ only in the extension"
    remedy = "rename or remove one of each: their masks can't be told apart"
    yield from error("two-images-of-one-name", text, remedy, [image.name for image in images if image.key in twice])
    text = f"{number(matches.ambiguous, 'image')} with two masks"
    remedy = f"keep one each: an image x.jpg has x.png or x{MASK_SUFFIX}.png"
    yield from error("two-masks-for-one-image", text, remedy, [mask.name for mask in masks if mask.path in ambiguous])


def _without_partner(
    missing: Sequence[ImageFile],
    orphans: Sequence[ImageFile],
    images: Sequence[ImageFile],
    masks: Sequence[ImageFile],
) -> Iterator[Finding]:
    """Finds images without a mask, and masks without an image."""
    text = f"{number(missing, 'image')} of {len(images)} without a mask"
    remedy = f"add the masks (the image's path and stem, with or without {MASK_SUFFIX}), or move the images elsewhere"
    yield from error("image-without-mask", text, remedy, [image.name for image in missing])
    text = f"{number(orphans, 'mask')} of {len(masks)} without an image"
    remedy = "add the images, or move the masks elsewhere"
    yield from error("mask-without-image", text, remedy, [mask.name for mask in orphans])


def _other_names(
    images: Sequence[ImageFile], masks: Sequence[ImageFile]
) -> tuple[list[tuple[ImageFile, ImageFile]], str]:
    """Pairs files by names without known words, or without the text that all names share, in the same folder or in any.

    Returns the pairs of the first rule that pairs at least half of the files, and the finding's code.
    """
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
    """Removes the common start and end of all names, and leading zeros of numbers."""

    def start(names: Sequence[str]) -> int:
        alike = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
        return len(
            "".join(letters[0] for letters in alike).rstrip("0123456789")
        )  # digits may belong to the part that differs

    first, last = start(names), start([name[::-1] for name in names])
    return [re.sub(r"^0+(?=\d+$)", "", name[first : len(name) - last]) for name in names]


def _last(key: str) -> str:
    return PurePosixPath(key).name


def _rule(image: ImageFile, mask: ImageFile) -> str:
    """Returns the remedy, from the first pair with other names."""
    ours, theirs = _last(image.key), _last(mask.key)
    if ours == theirs:
        return "give masks the same folders below --masks as their images have below --images"
    if theirs.startswith(ours):
        return f"rename masks: {theirs[len(ours) :]!r} at the end becomes {MASK_SUFFIX!r}, or nothing"
    if theirs.endswith(ours):
        return f"rename masks: {theirs[: -len(ours)]!r} at the start becomes nothing"
    return f"rename masks: the image's whole name, with or without {MASK_SUFFIX}"


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
