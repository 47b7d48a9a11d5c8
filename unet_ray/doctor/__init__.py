"""Examines a data set before hours of training are spent on it: finds problems, and suggests settings.

Reads names and headers of all files, and pixels of a sample of the pairs. An `error` stops or spoils a training. A
`warning` may spoil it. A `note` is handled automatically, or is a choice to make.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from unet_ray.config import MAX_PIXELS, shown_locations
from unet_ray.data import mask_files, storage
from unet_ray.data.imaging import without_pillows_limit
from unet_ray.data.inputs import ImageFile, evenly
from unet_ray.data.pairs import Pair
from unet_ray.data.progress import OnProgress
from unet_ray.data.splits import group_of, likely_groups, parts_of_folders
from unet_ray.doctor.against import training_of, unlike
from unet_ray.doctor.cluster import feeding
from unet_ray.doctor.files import THREADS, Header, damage, read_headers
from unet_ray.doctor.groups import (
    duplicates,
    folders_of_a_split,
    lists_of_a_split,
    named_groups,
    neighbours,
    too_few,
)
from unet_ray.doctor.images import channels, constants, kinds, sizes, sizes_of_pairs, value_range
from unet_ray.doctor.masks import classes
from unet_ray.doctor.names import Listing, listing
from unet_ray.doctor.pixels import Look, look_at, values_of
from unet_ray.doctor.report import LEVELS, Expected, Finding, Report, Suggestion, table
from unet_ray.doctor.suggestion import Traits, expected, suggest, trial
from unet_ray.doctor.turned import turned_pairs
from unet_ray.doctor.words import times

__all__ = ["Expected", "Finding", "Report", "Suggestion", "examine", "table"]

SAMPLES = 200
HEADERS = 20_000
"""If a data set has more files, or files in a bucket, only the headers of the sample are read."""
SHOWN = 20
"""Entries in each dictionary of `Report.facts`."""


def examine(
    images: str,
    masks: str | None = None,
    *,
    match: str | None = None,
    against: str | None = None,
    samples: int = SAMPLES,
    timing: bool = True,
    max_pixels: int = MAX_PIXELS,
    on_progress: OnProgress = lambda _done, _failed, _total: None,
) -> Report:
    """Examines the images and masks of two folders (or URIs), or of one folder that holds both.

    `masks` None: masks are in the folder of the images, if it has any; otherwise only the images are examined. `match`:
    see `DataConfig.match`; None: found out. `against`: a model; says if the images look unlike those of its training,
    and whether the CPUs of the cluster that RAY_ADDRESS names can feed its GPUs.
    `samples`: pairs whose pixels are read. `timing`: time a training step for `Report.expected`. `on_progress` gets
    damaged files as failed. Raises UserError if there is no such folder.
    """
    training = None if against is None else training_of(against)
    with without_pillows_limit():  # real problems become findings
        found = listing(images, masks, match)
        headers, looks = _read(found, samples, max_pixels, on_progress)
        traits, findings = _judge(found, headers, looks)
        if training is not None:
            findings += unlike(found.images, training) + feeding(found.images, training)
        suggestion = time_taken = None
        if found.way.masks and len(found.pairs) > 1:
            sizes_of_images = [headers[pair.image].size for pair in _usable(found.pairs, headers)]
            suggestion = suggest(found.way, found.pairs, sizes_of_images, traits)
            if not any(finding.level == "error" for finding in findings):
                findings += trial(suggestion, [look.pair for look in looks])
            time_taken = expected(suggestion, found.pairs) if timing else None
    findings.sort(key=lambda finding: LEVELS.index(finding.level))
    facts = _facts(found, headers, looks, traits)
    way = found.way
    images_at, masks_at = map(shown_locations, (way.images, way.masks))
    return Report(images_at, masks_at or None, len(found.pairs), facts, tuple(findings), suggestion, time_taken)


def _judge(found: Listing, headers: Mapping[str, Header], looks: Sequence[Look]) -> tuple[Traits, list[Finding]]:
    """Runs all checks. Returns the traits that decide the settings, and the findings."""
    good, usable = _good(headers, found.images), _usable(found.pairs, headers)
    keys = [pair.key for pair in found.pairs]
    parts = Counter(parts_of_folders(keys).values())
    split, of_split = lists_of_a_split(found.way, keys) if not parts else (None, [])
    divided = bool(parts) or split is not None
    pattern = likely_groups(keys) if len(keys) > 1 and not divided else None
    in_channels, of_channels = channels(good, looks)
    found_range, of_range = value_range(looks)
    found_classes, of_masks = classes(looks, found.way, found.classes)
    resize, of_sizes = sizes_of_pairs(usable, headers)
    turn, of_turned = turned_pairs(usable, headers)
    alone = pattern is None and not divided and len(looks) == len(found.pairs)
    sequence = neighbours(looks) if alone else []
    findings = [
        *found.findings,
        *damage(headers.values()),
        *kinds(good),
        *of_channels,
        *of_range,
        *of_turned,
        *of_sizes,
        *sizes(good),
        *constants(looks),
        *of_masks,
        *(named_groups(found.pairs, pattern) if pattern is not None else sequence),
        *duplicates(found.images, found.pairs, looks, pattern),
        *folders_of_a_split(parts),
        *of_split,
        *(too_few(len(found.pairs)) if found.way.masks else ()),
    ]
    traits = Traits(
        in_channels,
        found_classes,
        found_range,
        pattern,
        bool(sequence),
        mask_resize=resize,
        mask_turn=turn,
        split=split,
        volumes=bool(good) and all(header.volumes for header in good),
    )
    return traits, findings


def _read(
    found: Listing, samples: int, max_pixels: int, on_progress: OnProgress
) -> tuple[dict[str, Header], list[Look]]:
    """Reads headers by path, and the pixels of a sample of the usable pairs."""
    sampled = {p for pair in evenly(found.pairs, samples) for p in (pair.image, *mask_files.files_of(pair.mask))}
    files = [*found.images, *found.masks]
    many = len(files) > HEADERS
    files = [f for f in files if f.path in sampled or f.size <= 0 or not (many or storage.is_uri(f.path))]
    bad: set[int] = set()
    done = 0

    def report(pending: int, *headers: Header) -> None:
        nonlocal done
        done += 1
        bad.update(id(header) for header in headers if header.code)
        on_progress(done, len(bad), done + pending)

    headers = read_headers(files, max_pixels, lambda header: report(len(files) - done - 1 + len(sampled) // 2, header))
    pairs = evenly(_usable(found.pairs, headers), samples)
    looks = []
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as threads:
        for place, look in enumerate(threads.map(lambda pair: look_at(pair, headers), pairs), start=1):
            report(len(pairs) - place, look.image, look.mask)
            if not (look.image.code or look.mask.code):
                looks.append(look)
    return headers, looks


def _good(headers: Mapping[str, Header], files: Sequence[ImageFile]) -> list[Header]:
    """Returns the headers that were read and show no damage."""
    return [header for file in files if (header := headers.get(file.path)) is not None and not header.code]


def _usable(pairs: Sequence[Pair], headers: Mapping[str, Header]) -> list[Pair]:
    """Returns the pairs whose headers were both read and show no damage."""
    good = {path for path, header in headers.items() if not header.code}
    return [pair for pair in pairs if pair.image in good and good.issuperset(mask_files.files_of(pair.mask))]


def _facts(found: Listing, headers: Mapping[str, Header], looks: Sequence[Look], traits: Traits) -> dict[str, Any]:
    """Returns `Report.facts`."""
    facts: dict[str, Any] = {"images": len(found.images), "masks": len(found.masks), "sampled": len(looks)}
    for kind, files in (("image", found.images), ("mask", found.masks)):
        good = _good(headers, files)
        facts[f"{kind}_formats"] = dict(Counter(header.format for header in good).most_common(SHOWN))
        facts[f"{kind}_modes"] = dict(Counter(header.mode for header in good).most_common(SHOWN))
        facts[f"{kind}_bands"] = dict(Counter(header.bands for header in good).most_common(SHOWN))
        facts[f"{kind}_sizes"] = dict(Counter(times(header.size) for header in good).most_common(SHOWN))
    values = sorted(values_of(looks))[:SHOWN]
    of_masks, pattern = traits.classes, traits.group_by
    binary = len(of_masks.values) == 2
    groups = set() if pattern is None else {group_of(pair.key, pattern) for pair in found.pairs}
    return facts | {
        "mask_values": {value: sum(value in look.counts for look in looks) for value in values},
        "class_shares": of_masks.shares,
        "empty_masks": sum(set(look.counts) == {of_masks.values[0]} for look in looks) if binary else 0,
        "groups": None if pattern is None else {"pattern": pattern, "groups": len(groups)},
    }
