"""What is wrong with a data set, or worth knowing, before hours of training are spent on it.

Names and headers are read of all files, pixels of a sample of the pairs. An `error` stops a training, or spoils it;
a `warning` may spoil it; a `note` is handled, or a choice to make. With what was seen come the settings that fit.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from unet_ray.config import MAX_PIXELS
from unet_ray.data import storage
from unet_ray.data.inputs import ImageFile, evenly
from unet_ray.data.pairs import Pair
from unet_ray.data.splits import group_of, likely_groups
from unet_ray.doctor.files import THREADS, Header, damage, read_headers
from unet_ray.doctor.groups import duplicates, named_groups, neighbours, too_few
from unet_ray.doctor.images import channels, constants, kinds, sizes, sizes_of_pairs, value_range
from unet_ray.doctor.masks import Classes, classes
from unet_ray.doctor.names import Listing, listing
from unet_ray.doctor.pixels import Look, look_at, values_of
from unet_ray.doctor.report import LEVELS, Expected, Finding, Report, Suggestion, table
from unet_ray.doctor.suggestion import expected, suggest, trial
from unet_ray.doctor.words import times

__all__ = ["Expected", "Finding", "Report", "Suggestion", "examine", "table"]

SAMPLES = 200
HEADERS = 20_000
"""Where there are more files, headers are read of the sample only, as they are of files in a bucket."""
SHOWN = 20
"""Kinds of each sort in `Report.facts`."""

OnProgress = Callable[[int, int, int], None]
"""Gets the files done, those among them that are damaged, and their number."""


def examine(
    images: str,
    masks: str | None = None,
    *,
    samples: int = SAMPLES,
    timing: bool = True,
    max_pixels: int = MAX_PIXELS,
    on_progress: OnProgress = lambda _done, _failed, _total: None,
) -> Report:
    """Examines the images and masks of two folders (or URIs), or of one that holds both.

    `masks` None: the images' own folder, where it has masks in it; otherwise the images alone. `timing` measures a
    training step for `Report.expected`. Raises UserError if there is no such folder.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of odd EXIF data and the like: what matters becomes a finding
        found = listing(images, masks)
        headers, looks = _read(found, samples, max_pixels, on_progress)
        good, usable = _good(headers, found.images), _usable(found.pairs, headers)
        pattern = likely_groups([pair.key for pair in found.pairs]) if len(found.pairs) > 1 else None
        in_channels, of_channels = channels(good, looks)
        found_range, of_range = value_range(looks)
        found_classes, of_masks = classes(looks, found.masks_at)
        sequence = neighbours(looks) if pattern is None and len(looks) == len(found.pairs) else []
        findings = [
            *found.findings,
            *damage(headers.values()),
            *kinds(good),
            *of_channels,
            *of_range,
            *sizes_of_pairs(usable, headers),
            *sizes(good),
            *constants(looks),
            *of_masks,
            *(named_groups(found.pairs, pattern) if pattern is not None else sequence),
            *duplicates(found.images, found.pairs, looks, pattern),
            *(too_few(len(found.pairs)) if found.masks_at is not None else ()),
        ]
        suggestion = time_taken = None
        if found.masks_at is not None and len(found.pairs) > 1:
            suggestion = suggest(
                found.images_at,
                found.masks_at,
                found.pairs,
                [headers[pair.image].size for pair in usable],
                channels=in_channels,
                classes=found_classes,
                value_range=found_range,
                group_by=pattern,
                alike=bool(sequence),
            )
            if not any(finding.level == "error" for finding in findings):
                findings += trial(suggestion, [look.pair for look in looks])
            time_taken = expected(suggestion, found.pairs) if timing else None
    findings.sort(key=lambda finding: LEVELS.index(finding.level))
    facts = _facts(found, headers, looks, found_classes, pattern)
    return Report(found.images_at, found.masks_at, len(found.pairs), facts, tuple(findings), suggestion, time_taken)


def _read(
    found: Listing, samples: int, max_pixels: int, on_progress: OnProgress
) -> tuple[dict[str, Header], list[Look]]:
    """Headers by path, and a look at the pixels of a sample of the pairs that can be used."""
    sampled = {path for pair in evenly(found.pairs, samples) for path in (pair.image, pair.mask)}
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
    """Of the files whose headers were read, and that are not damaged."""
    return [header for file in files if (header := headers.get(file.path)) is not None and not header.code]


def _usable(pairs: Sequence[Pair], headers: Mapping[str, Header]) -> list[Pair]:
    good = {path for path, header in headers.items() if not header.code}
    return [pair for pair in pairs if pair.image in good and pair.mask in good]


def _facts(
    found: Listing, headers: Mapping[str, Header], looks: Sequence[Look], of_masks: Classes, pattern: str | None
) -> dict[str, Any]:
    """See `Report.facts`."""
    facts: dict[str, Any] = {"images": len(found.images), "masks": len(found.masks), "sampled": len(looks)}
    for kind, files in (("image", found.images), ("mask", found.masks)):
        good = _good(headers, files)
        facts[f"{kind}_formats"] = dict(Counter(header.format for header in good).most_common(SHOWN))
        facts[f"{kind}_modes"] = dict(Counter(header.mode for header in good).most_common(SHOWN))
        facts[f"{kind}_sizes"] = dict(Counter(times(header.size) for header in good).most_common(SHOWN))
    values = sorted(values_of(looks))[:SHOWN]
    binary = len(of_masks.values) == 2
    groups = set() if pattern is None else {group_of(pair.key, pattern) for pair in found.pairs}
    return facts | {
        "mask_values": {value: sum(value in look.counts for look in looks) for value in values},
        "class_shares": of_masks.shares,
        "empty_masks": sum(set(look.counts) == {of_masks.values[0]} for look in looks) if binary else 0,
        "groups": None if pattern is None else {"pattern": pattern, "groups": len(groups)},
    }
