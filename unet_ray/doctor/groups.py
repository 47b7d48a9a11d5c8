"""Finds images that belong together (groups, slices, frames, copies), and data sets with too few pairs."""

from __future__ import annotations

import hashlib
import itertools
import re
import shlex
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from unet_ray.config import DataConfig, UserError, locations
from unet_ray.data import imaging, mask_files, pages, storage
from unet_ray.data.inputs import ImageFile
from unet_ray.data.pairs import Pair
from unet_ray.data.splits import given_parts, group_of
from unet_ray.doctor.files import THREADS
from unet_ray.doctor.layouts import Way
from unet_ray.doctor.pixels import Look
from unet_ray.doctor.report import Finding, error, note, warning
from unet_ray.doctor.words import number

ALIKE = 0.8
"""Neighbours by name are taken for slices or frames if they differ by less than this share of the difference between
other images. Measured: 0.67 for the slices of ISBI 2012, 1.02 for the unrelated images of DSB 2018."""
MIDDLE = 4096
"""Bytes in the middle of files of equal size, which are compared before the whole files."""

LISTED = 0.9
"""Lists that name at least this share of the images are taken for their split."""
LISTS_IN = (".", "ImageSets/Segmentation", "ImageSets", "splits", "lists")
"""Where data sets keep train.txt and val.txt, beside the folder of the images or above it."""

COPIES = {
    "duplicates-with-different-masks": ("with different masks", "keep the right one: contrary labels can't be learned"),
    "duplicates-across-groups": (
        "in different groups",
        "remove the copies: --group-by can't keep them on one side, so validation sees what was trained on",
    ),
    "duplicate-images": (
        "with the same mask, if any",
        "remove the copies, or keep them on one side of the split with --group-by: validation sees what was trained on",
    ),
}
"""Code -> text and remedy."""


def too_few(count: int) -> list[Finding]:
    """Judges the number of pairs."""
    if count < 2:
        text = f"{count or 'no'} pair of an image and a mask: one is needed to train on and one to validate on"
        return error("too-few-pairs", text, "add pairs; some tens are a start where images are alike")
    text = f"{count} pairs are few: the validation score of {max(1, round(0.2 * count))} says little"
    remedy = "--folds 5 scores each pair once; strong augmentation helps (see `unet-ray recipes isbi2012`)"
    return note("few-pairs", text, remedy) if count < 10 else []


def folders_of_a_split(parts: Mapping[str, int]) -> list[Finding]:
    """Reports that the names of folders divide the images. `parts`: part -> pairs."""
    if not parts:
        return []
    shown = ", ".join(f"{parts[name]} to {verb}" for name, verb in VERBS.items() if parts.get(name))
    text = f"folders divide the images: {shown}"
    rest = "" if parts.get("val") else "; some of those to train on are drawn to validate on"
    return note("folders-of-a-split", text, f"a training keeps to that{rest}; --split random draws anew")


def lists_of_a_split(way: Way, keys: Sequence[str]) -> tuple[str | None, list[Finding]]:
    """Returns the folder of lists (`train.txt`, `val.txt`) that divide these images (`data.split`), and a finding."""
    for place in _places_of_lists(way):
        try:
            parts = Counter(given_parts(keys, DataConfig(split=str(place))).values())
        except UserError:  # lists of something else
            continue
        if parts["train"] and len(parts) > 1 and parts.total() >= LISTED * len(keys):
            shown = ", ".join(f"{parts[name]} to {verb}" for name, verb in VERBS.items() if parts[name])
            text = f"lists in {place} divide the images: {shown}"
            remedy = f"--split {shlex.quote(str(place))} keeps to them; left out, images are drawn"
            return str(place), note("lists-of-a-split", text, remedy)
    return None, []


def _places_of_lists(way: Way) -> Iterator[Path]:
    """Yields local folders beside the images or above them in which there is a train.txt."""
    fixed = re.split(r"[*?\[]", locations(way.images)[0])[0] if way.images else ""
    if not fixed or storage.is_uri(fixed):
        return
    folder = Path(fixed if fixed == locations(way.images)[0] else fixed.rpartition("/")[0])
    for base in (folder, *list(folder.parents)[:2]):
        for inner in LISTS_IN:
            if (base / inner / "train.txt").is_file():
                yield base / inner


VERBS = {"train": "train on", "val": "validate on", "test": "test with (`evaluate RUN --part test`)"}


def named_groups(pairs: Sequence[Pair], pattern: str) -> list[Finding]:
    """Reports the groups that `pattern` finds in the names."""
    groups = Counter(group_of(pair.key, pattern) for pair in pairs)
    largest, count = groups.most_common(1)[0]
    text = f"the names look like {len(groups)} groups, such as {largest!r} with {count} images"
    remedy = f"--group-by {shlex.quote(pattern)} keeps each on one side of the split, as scores that don't flatter need"
    return note("names-look-like-groups", text, remedy)


def neighbours(looks: Sequence[Look]) -> list[Finding]:
    """Finds out whether images that follow each other by name are alike."""
    thumbs = [look.thumb for look in looks]
    if len(thumbs) < 8:
        return []
    half = len(thumbs) // 2
    near, far = (
        np.mean([np.abs(one - other).mean() for one, other in some])
        for some in (itertools.pairwise(thumbs), zip(thumbs, thumbs[half:] + thumbs[:half], strict=True))
    )
    text = (
        f"neighbours by name differ by {near / far:.0%} of what others do, like slices of a volume or frames of a film"
    )
    remedy = (
        "--set data.split_order=name holds out one end of them, instead of images between those that are trained on"
    )
    return note("neighbours-alike", text, remedy) if near < ALIKE * far else []


def duplicates(
    images: Sequence[ImageFile], pairs: Sequence[Pair], looks: Sequence[Look], pattern: str | None
) -> Iterator[Finding]:
    """Finds images that exist more than once, among all local ones and the sampled ones in buckets."""
    file_of, mask_of = {image.path: image for image in images}, {pair.image: pair.mask for pair in pairs}
    flat = {look.pair.image for look in looks if look.constant}
    whole = [i for i in images if not pages.is_part(i.path) and i.size > 0 and i.path not in flat]
    local = [image.path for image in whole if not storage.is_uri(image.path)]
    copies = _copies(local)
    copies += _same((look.digest, look.pair.image) for look in looks if storage.is_uri(look.pair.image))
    found: dict[str, list[list[str]]] = {code: [] for code in COPIES}
    for paths in copies:
        matches = [] if pattern is None else [re.search(pattern, file_of[path].key) for path in paths]
        if _differ([mask_of[path] for path in paths if path in mask_of]):
            found["duplicates-with-different-masks"].append(paths)
        elif len({match.group() for match in matches if match}) > 1:
            found["duplicates-across-groups"].append(paths)
        else:
            found["duplicate-images"].append(paths)
    for code, (what, remedy) in COPIES.items():
        names = [file_of[path].name for paths in found[code] for path in paths]
        yield from warning(code, f"{number(found[code], 'image')} present more than once, {what}", remedy, names)


def _copies(paths: Sequence[str]) -> list[list[str]]:
    """Groups local files with the same bytes; compares sizes, then the middle, then whole files."""

    def middle(path: str) -> bytes:
        with Path(path).open("rb") as stream:
            stream.seek(Path(path).stat().st_size // 2)
            return stream.read(MIDDLE)

    def whole(path: str) -> bytes:
        return hashlib.sha256(Path(path).read_bytes()).digest()

    with ThreadPoolExecutor(THREADS) as threads:
        groups = _same((Path(path).stat().st_size, path) for path in paths)
        for look in (middle, whole):
            left = list(itertools.chain(*groups))
            groups = _same(zip(threads.map(look, left), left, strict=True))
        return groups


def _same(keyed: Iterable[tuple[Hashable, str]]) -> list[list[str]]:
    """Groups paths that share a key; single paths are left out."""
    groups: dict[Hashable, list[str]] = {}
    for key, path in keyed:
        groups.setdefault(key, []).append(path)
    return [group for group in groups.values() if len(group) > 1]


def _differ(masks: Sequence[str]) -> bool:
    """Returns whether these masks differ from each other."""
    try:
        values = [imaging.stored_values(imaging.read_file(file)) for m in masks for file in mask_files.files_of(m)]
    except (imaging.ImageError, OSError):
        return False  # another finding reports the damage
    return any(not np.array_equal(one, other) for one, other in itertools.pairwise(values))
