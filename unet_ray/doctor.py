"""What is wrong with a data set, or worth knowing, before hours of training are spent on it.

Names and headers are read of all files, pixels of a sample of the pairs. An `error` stops a training, or spoils it;
a `warning` may spoil it; a `note` is handled, or a choice to make. With what was seen come the settings that fit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import os
import re
import shlex
import textwrap
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

import numpy as np
import yaml
from PIL import Image, UnidentifiedImageError

from unet_ray import records, storage
from unet_ray.config import MAX_CLASSES, MAX_PIXELS, TrainConfig, UserError, ValueRange, load_train_config
from unet_ray.records import ImageFile, Pair

SAMPLES = 256
HEADERS = 20_000
"""Where there are more files, or where they lie in a bucket, headers are read of the sample only."""
THREADS = 8
NAMED, SHOWN = 20, 3
"""Files that a finding lists, and those of them that its text names."""
TAIL = 4096
LOOK = 128
"""Side that a sampled image is looked at in."""
MANY_VALUES, TOO_MANY_VALUES = 32, 64
"""Of all masks, beyond which they are looked at more closely; of a middling mask, which is then none."""
VOID = 255
"""The value that most sets mark pixels with which are to be left out."""
RARE_FILES, RARE_PIXELS, RARE_FOREGROUND = 0.05, 0.0005, 0.01
TINY, LARGE_FACTOR, DIFFER_AREA, DIFFER_ASPECT = 32, 6, 16, 3
STEPS = 2500
"""Of a whole training, which the suggested epochs come near to: what `carvana-fast` takes on 3,200 pairs."""
ALIKE = 0.8
"""Neighbours that differ by less than this share of what others differ by are taken for slices or frames: 0.67
measured for the slices of ISBI 2012, 1.02 for the unrelated images of DSB 2018."""
SAME = 0.9
"""Correlation above which an image and a mask are taken for the same picture."""
TIMED_SECONDS = 4.0

MASK_ENDS = (
    *("_seg", "_segmentation", "_Segmentation", "_label", "_labels", "_labelIds", "_gtFine_labelIds", "_gt", "_GT"),
    *("_masks", "_Mask", "_MASK", "-mask", ".mask", " mask", "mask", "_msk", "_m", "_L", "_matte", "_annotation"),
    *("_annotated", "_target", "_truth", "_binary", "_1stHO", "_manual1", "_anno", "-seg", "-label", "-gt"),
)
MASK_STARTS = ("mask_", "masks_", "Mask_", "mask-", "mask", "seg_", "label_", "labels_", "gt_", "m_", "target_")
IMAGE_AFFIXES = ("_image", "_img", "_leftImg8bit", "_sat", "_RGB", "_rgb", "-image", "image_", "img_", "im_", "image")
MASK_FOLDER = re.compile(r"mask|label|annot|(^|[_-])(seg|gt|truth|target)", re.IGNORECASE)
TEXTS = frozenset({"", ".txt", ".md", ".csv", ".db", ".ini", ".lock", ".log", ".html", ".pdf", ".yml", ".yaml", ".py"})
"""Extensions of files beside images that nobody misses."""
HINTS = ("classes.txt", "labels.txt", "class_names.txt")
VOID_NAME = re.compile(r"void|ignore|unlabel|unknown|don'?t.?care", re.IGNORECASE)

Level = Literal["error", "warning", "note"]
LEVELS: tuple[Level, ...] = ("error", "warning", "note")
OnProgress = Callable[[int, int, int], None]
"""Gets the files done, those among them that are damaged, and their number."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong, or worth knowing."""

    level: Level
    code: str
    """Its name, such as `mask-of-another-size`."""
    text: str
    """One line: what, how many, up to three names."""
    remedy: str
    files: tuple[str, ...] = ()
    """Names below their folder, at most `NAMED`."""


@dataclass(frozen=True, slots=True)
class Suggestion:
    """Settings that fit the data."""

    recipe: str
    image_size: int | tuple[int, int]
    """As `data.image_size`."""
    settings: tuple[tuple[str, str], ...]
    """Where they differ from the recipe's: dotted name and YAML value, as `--set` takes them."""
    command: str
    """The whole `unet-ray train …`, quoted for a shell."""

    def config(self) -> TrainConfig:
        """What the command trains."""
        return load_train_config(recipe=self.recipe, settings=self.settings)


@dataclass(frozen=True, slots=True)
class Expected:
    """What the suggested training takes on this machine."""

    seconds_per_epoch: float
    row_bytes: int
    """Of all decoded pairs."""
    fits: bool
    """They stay in memory; otherwise each epoch decodes them again."""
    device: str
    measured: str
    """How, in words."""


@dataclass(frozen=True, slots=True)
class Report:
    """What `examine` returns."""

    images: str
    masks: str | None
    pairs: int
    facts: dict[str, Any]
    """Numbers of `images`, `masks` and `sampled` pairs; files of each of `image_formats`, `image_modes`, `image_sizes`,
    and of the masks'; masks with each of `mask_values`; `class_shares` of the pixels; `empty_masks`; `groups`."""
    findings: tuple[Finding, ...]
    """Errors first, then warnings, then notes."""
    suggestion: Suggestion | None
    expected: Expected | None

    @property
    def exit_code(self) -> int:
        """0: nothing, or notes only; 1: warnings; 2: errors."""
        levels = {finding.level for finding in self.findings}
        return 2 if "error" in levels else 1 if "warning" in levels else 0

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON; `exit_code` among them."""
        return {**dataclasses.asdict(self), "exit_code": self.exit_code}


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
        images = storage.absolute(images)
        found = _listed(images)
        if masks is None:
            one_folder = any(image.key.endswith(records.MASK_SUFFIX) for image in found)
            masks = images if one_folder else None
        else:
            masks = storage.absolute(masks)
        examination = _Examination(images, masks, samples, timing, max_pixels, on_progress)
        return examination.run(found, [] if masks is None else found if masks == images else _listed(masks))


def table(report: Report) -> str:
    """The report for a terminal, at most 80 columns but for the command to copy."""
    lines = [f"images       {report.images}", f"masks        {report.masks or 'none given'}"]
    lines += [line for label, text in _facts(report) for line in _wrapped(f"{label:<12} ", text)]
    for finding in report.findings:
        lines += ["", *_wrapped(f"{finding.level:<8} ", f"{finding.text} [{finding.code}]")]
        lines += _wrapped("         -> ", finding.remedy)
    if not report.findings:
        lines += ["", "nothing to complain of"]
    if report.suggestion is not None:
        lines += ["", "suggested", f"  {report.suggestion.command}"]
    if report.expected is not None:
        expected = report.expected
        size = expected.row_bytes / 2**30
        memory = f"{size:.1f} GiB" if size >= 1 else f"{size * 1024:.0f} MiB"
        fits = "fit in memory" if expected.fits else "do not fit in memory: each epoch decodes them, or see --cache"
        lines += _wrapped(
            "expected     ",
            f"{_seconds(expected.seconds_per_epoch)} an epoch on {expected.device} ({expected.measured}); "
            f"the decoded pairs take {memory} and {fits}",
        )
    return "\n".join(lines)


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    facts = report.facts
    yield "found", f"{facts['images']} images, {facts['masks']} masks, {report.pairs} pairs"
    if facts["sampled"]:
        yield "pixels", f"read of {'all' if facts['sampled'] == report.pairs else facts['sampled']} pairs"
    for kind in ("image", "mask"):
        parts = [_counts(facts[f"{kind}_{what}"]) for what in ("formats", "modes", "sizes") if facts[f"{kind}_{what}"]]
        if parts:
            yield f"{kind} files", "; ".join(parts)
    if facts["class_shares"]:
        some = list(facts["class_shares"].items())
        shown = ", ".join(f"{value}: {_percent(share)}" for value, share in some[:16])
        yield "mask values", shown + (f" and {len(some) - 16} more" if len(some) > 16 else "") + " of the pixels"
    if facts["empty_masks"]:
        yield "empty masks", f"{facts['empty_masks']} of {facts['sampled']}"
    if facts["groups"]:
        yield "groups", f"{facts['groups']['groups']} by {facts['groups']['pattern']!r}"


def _wrapped(first: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        80,
        initial_indent=first,
        subsequent_indent=" " * len(first),
        break_on_hyphens=False,
        break_long_words=True,
    )


@dataclass(slots=True)
class _Header:
    """What a file says of itself without its pixels."""

    format: str = ""
    mode: str = ""
    channels: int = 0
    """As it is stored: 1, 2, 3 or 4 of Pillow's modes, any number of an array's."""
    kind: Literal["8", "more", "float"] = "8"
    """Bits of a channel: at most 8, more, or floating point."""
    array: bool = False
    """.npy, or TIFF of many channels: its channels must be the model's."""
    size: tuple[int, int] = (0, 0)
    """(width, height) in pixels as it is meant to be seen."""
    stored: tuple[int, int] = (0, 0)
    """The same before EXIF orientation."""
    orientation: int = 1
    frames: int = 1
    cut: bool = False
    """Its end is not that of its format."""
    code: str = ""
    """Of the error, if it can't be used."""
    trouble: str = ""


@dataclass(slots=True, eq=False)
class _Look:
    """What the pixels of a pair say."""

    pair: Pair
    image_trouble: str = ""
    mask_trouble: str = ""
    image_digest: bytes = b""
    mask_digest: bytes = b""
    lowest: tuple[int, ...] = ()
    """Of each channel, at a side of `LOOK`."""
    highest: tuple[int, ...] = ()
    constant: bool = False
    gray: bool = False
    opaque: bool = True
    stored: tuple[float, float] | None = None
    """0.5th and 99.5th percentile of values of more than 8 bits."""
    pixels_gray: np.ndarray | None = None
    """float32 [LOOK,LOOK]."""
    thumb: np.ndarray | None = None
    """The same at a side of 32, less its mean."""
    counts: dict[int, int] = field(default_factory=dict)
    """Of a mask: stored value -> pixels; empty if it has no such values."""
    colours: Counter[tuple[int, ...]] = field(default_factory=Counter)
    is_image: bool = False
    """The mask shows what the image shows."""

    @property
    def pixels(self) -> int:
        return sum(self.counts.values())


class _Examination:
    """One pass over a data set; `findings` grow as it goes."""

    def __init__(
        self, images: str, masks: str | None, samples: int, timing: bool, max_pixels: int, on_progress: OnProgress
    ) -> None:
        self.images, self.masks, self.samples, self.timing = images, masks, samples, timing
        self.max_pixels, self.on_progress = max_pixels, on_progress
        self.findings: list[Finding] = []
        self.headers: dict[str, _Header] = {}
        self.names: dict[str, str] = {}
        self.facts: dict[str, Any] = {"images": 0, "masks": 0, "sampled": 0}
        self.failed = 0
        self.ignore: int | None = None
        self.hint: dict[int, str] = {}

    def add(self, level: Level, code: str, text: str, remedy: str, files: Iterable[str] = ()) -> None:
        self.findings.append(Finding(level, code, text, remedy, tuple(files)[:NAMED]))

    def run(self, images: list[ImageFile], masks: list[ImageFile]) -> Report:
        images, masks = self._right_way_round(images, masks)
        one_folder = self.images == self.masks
        matches = records.match(images, masks, one_folder=one_folder)
        pairs = self._pairing(images, masks, matches)
        if one_folder:
            own = {pair.mask for pair in pairs} | {mask.path for mask in matches.orphans}
            own |= {path for paths in matches.ambiguous.values() for path in paths}
            images, masks = ([f for f in images if (f.path in own) == wanted] for wanted in (False, True))
        self.names = {file.path: file.name for file in [*images, *masks]}
        self._passed_over()
        sampled = self._sample(pairs)
        self._read_headers(images, masks, sampled)
        usable = [p for p in pairs if not any(self.headers.get(path, _Header()).code for path in (p.image, p.mask))]
        looks = self._looks(self._sample(usable))
        image_headers, mask_headers = ([self.headers.get(f.path) for f in files] for files in (images, masks))
        self._damage(images, masks, looks)
        self._image_kinds(images, looks)
        channels = self._channels(images, looks)
        value_range = self._value_range(looks)
        self._sizes(pairs, images)
        self._constants(looks, channels)
        values, shares = self._mask_values(looks)
        pattern = records.likely_groups([pair.key for pair in pairs]) if len(pairs) > 1 else None
        alike = self._groups(pairs, looks, pattern)
        self._duplicates(images, pairs, looks, pattern)
        self._too_few(len(pairs))
        self.facts |= {
            "images": len(images),
            "masks": len(masks),
            "sampled": len(looks),
            **_counted("image", image_headers),
            **_counted("mask", mask_headers),
            "mask_values": {
                value: sum(value in look.counts for look in looks) for value in sorted(_values_of(looks))[:NAMED]
            },
            "class_shares": shares,
            "empty_masks": sum(_is_only(look, min(values, default=0)) for look in looks) if len(values) == 2 else 0,
            "groups": None
            if pattern is None
            else {"pattern": pattern, "groups": len({records.group_of(pair.key, pattern) for pair in pairs})},
        }
        suggestion = self._suggestion(pairs, channels, values, shares, value_range, pattern, alike)
        expected = None
        if suggestion is not None:
            self._trial(suggestion, looks)
            expected = self._expected(suggestion, pairs) if self.timing else None
        order = {level: number for number, level in enumerate(LEVELS)}
        findings = tuple(sorted(self.findings, key=lambda finding: order[finding.level]))
        return Report(self.images, self.masks, len(pairs), self.facts, findings, suggestion, expected)

    # Names

    def _right_way_round(
        self, images: list[ImageFile], masks: list[ImageFile]
    ) -> tuple[list[ImageFile], list[ImageFile]]:
        """Where one folder holds both in two subfolders, or the two are swapped, the error and what was meant."""
        if self.masks is None or self.masks == self.images:
            tops: dict[str, list[ImageFile]] = {}
            for image in images:
                tops.setdefault(image.name.split("/")[0] if "/" in image.name else "", []).append(image)
            if len(tops) == 2 and "" not in tops:
                named = sorted(tops, key=lambda name: bool(MASK_FOLDER.search(name)))
                if MASK_FOLDER.search(named[1]) and not MASK_FOLDER.search(named[0]):
                    whole = self.images
                    self.images, self.masks = (storage.join(whole, name) for name in named)
                    self.add(
                        "error",
                        "one-folder-holds-both",
                        f"{whole} holds images in {named[0]}/ and masks in {named[1]}/",
                        f"give both: {self._flags()}; the rest of this report is about them",
                    )
                    return _listed(self.images), _listed(self.masks)
        elif images and masks:
            straight, crossed = records.match(images, masks).pairs, records.match(masks, images).pairs
            if (len(crossed) > 2 * len(straight) and len(crossed) >= len(masks) / 2) or (
                straight and self._look_swapped(straight)
            ):
                self.images, self.masks = self.masks, self.images
                self.add(
                    "error",
                    "folders-swapped",
                    "--images and --masks look swapped: one has the photographs, the other the masks",
                    f"give them the other way: {self._flags()}; the rest of this report takes them so",
                )
                return masks, images
        if self.masks is None and images:
            self.add(
                "note",
                "no-masks",
                "no folder of masks was given: only the images are examined",
                "for training add --masks DIR",
            )
        return images, masks

    def _look_swapped(self, pairs: Sequence[Pair]) -> bool:
        """Whether the first pairs have few values where photographs should be, and many where masks should be."""
        votes = [(_grays(pair.image), _grays(pair.mask)) for pair in _evenly(pairs, 4)]
        return all(0 < image <= 16 and mask > 64 for image, mask in votes)

    def _flags(self) -> str:
        masks = [] if self.masks is None else ["--masks", shlex.quote(storage.without_secrets(self.masks))]
        return " ".join(["--images", shlex.quote(storage.without_secrets(self.images)), *masks])

    def _pairing(self, images: list[ImageFile], masks: list[ImageFile], matches: records.Matches) -> list[Pair]:
        """The pairs to go on with, also those that other names would make."""
        for location, files in ((self.images, images), (self.masks, masks)):
            if location is not None and not files:
                self.add(
                    "error",
                    "no-images",
                    f"{location}: no file of a kind that can be read",
                    f"kinds: {', '.join(sorted(records.EXTENSIONS))}; convert others, or name another folder",
                )
        if matches.twice:
            self.add(
                "error",
                "two-images-of-one-name",
                f"{_number(matches.twice, 'name')} with two images, but for the extension: {_some(matches.twice)}",
                "rename or remove one of each: their masks can't be told apart",
                [image.name for image in images if image.key in set(matches.twice)],
            )
        if matches.ambiguous:
            names = [PurePosixPath(path).name for paths in matches.ambiguous.values() for path in paths]
            self.add(
                "error",
                "two-masks-for-one-image",
                f"{_number(matches.ambiguous, 'image')} with two masks: {_some(names)}",
                f"keep one each: an image x.jpg has x.png or x{records.MASK_SUFFIX}.png",
                names,
            )
        if self.masks is None:
            return []
        missing, orphans, pairs = matches.missing, matches.orphans, list(matches.pairs)
        if missing and masks:
            renamed, rule, code = _other_names(missing, orphans, one_folder=self.masks == self.images)
            if renamed:
                pairs += [Pair(image.key, image.path, mask.path) for image, mask in renamed]
                pairs.sort(key=lambda pair: pair.key)
                self.add(
                    "error",
                    code,
                    f"{_number(renamed, 'mask')} named otherwise than the image: "
                    f"{renamed[0][1].name} for {renamed[0][0].name}",
                    f"{rule}; the rest of this report takes them as pairs",
                    [mask.name for _, mask in renamed],
                )
                keys = {image.key for image, _ in renamed}
                paths = {mask.path for _, mask in renamed}
                missing = [image for image in missing if image.key not in keys and image.path not in paths]
                orphans = [mask for mask in orphans if mask.path not in paths]
        if missing:
            names = [image.name for image in missing]
            self.add(
                "error",
                "image-without-mask",
                f"{_number(names, 'image')} of {len(images)} without a mask: {_some(names)}",
                f"add the masks (the image's path and stem, with or without {records.MASK_SUFFIX}), or move the images "
                "elsewhere; `unet-ray predict` segments them later",
                names,
            )
        if orphans:
            names = [mask.name for mask in orphans]
            self.add(
                "error",
                "mask-without-image",
                f"{_number(names, 'mask')} of {len(masks)} without an image: {_some(names)}",
                "add the images, or move the masks elsewhere",
                names,
            )
        if pairs and all(PurePosixPath(pair.mask).stem.endswith(records.MASK_SUFFIX) for pair in pairs):
            self.add(
                "note",
                "masks-with-suffix",
                f"masks are named after their images with {records.MASK_SUFFIX} at the end",
                "nothing to do: they are paired so",
            )
        return pairs

    def _passed_over(self) -> None:
        """Files of kinds that are not read, in local folders."""
        kinds: Counter[str] = Counter()
        examples: dict[str, str] = {}
        for location in {self.images, self.masks or self.images}:
            if storage.is_uri(location) or not Path(location).is_dir():
                continue
            for folder, subfolders, files in os.walk(location):
                hidden = [name for name in subfolders if name.startswith(".")]
                subfolders[:] = [name for name in subfolders if name not in hidden]
                for name in files:
                    known = PurePosixPath(name).suffix.lower()
                    if name.lower().endswith(".nii.gz"):
                        known = ".nii.gz"
                    if name.startswith("."):
                        known = "hidden" if known in records.EXTENSIONS else ""
                    elif known in records.EXTENSIONS:
                        continue
                    if known not in TEXTS:
                        kinds[known] += 1
                        examples.setdefault(known, os.path.relpath(os.path.join(folder, name), location))  # noqa: PTH118
        if kinds:
            remedies = {
                ".nii": "`unet-ray slices` makes images of .nii volumes",
                ".nii.gz": "`unet-ray slices` makes images of .nii volumes",
                ".json": "polygons in .json must be drawn as masks first",
                "hidden": "names that begin with a dot are left alone",
            }
            said = list(dict.fromkeys(remedies[kind] for kind in kinds if kind in remedies))
            if set(kinds) - set(remedies):
                said.append(f"convert what you need to one of {', '.join(sorted(records.EXTENSIONS))}")
            self.add(
                "note",
                "files-passed-over",
                f"{sum(kinds.values())} files are passed over: {_counts(kinds)}",
                "; ".join(said),
                examples.values(),
            )

    def _sample(self, pairs: Sequence[Pair]) -> Sequence[Pair]:
        return _evenly(pairs, self.samples)

    # Headers

    def _read_headers(self, images: list[ImageFile], masks: list[ImageFile], sampled: Sequence[Pair]) -> None:
        """Of all local files, or of the sample where there are too many; a bucket's are read with the pixels."""
        files = [*images, *masks]
        if len(files) > HEADERS:
            wanted = {path for pair in sampled for path in (pair.image, pair.mask)}
            files = [file for file in files if file.path in wanted or file.size <= 0]
        local = [file for file in files if not storage.is_uri(file.path) or file.size <= 0]
        failed = 0
        with ThreadPoolExecutor(THREADS) as threads:
            for done, (file, header) in enumerate(zip(local, threads.map(_header, local), strict=True), start=1):
                self._check(header)
                self.headers[file.path] = header
                failed += bool(header.code)
                self.on_progress(done, failed, len(local) + len(sampled))
        self.failed = failed

    def _check(self, header: _Header) -> None:
        pixels = header.size[0] * header.size[1]
        if not header.code and pixels > self.max_pixels:
            header.code, header.trouble = "too-many-pixels", f"{pixels} pixels, more than {self.max_pixels}"

    def _damage(self, images: list[ImageFile], masks: list[ImageFile], looks: Sequence[_Look]) -> None:
        """Files that can't be used, by kind."""
        remedies = {
            "file-not-there": "a link that leads nowhere, or no permission: mend or remove it",
            "empty-file": "copy it again, or remove it with its partner: a training stops at it",
            "not-an-image": "remove or convert it: a training stops at it",
            "truncated-file": "copy it again, or remove it with its partner: a training stops at it",
            "cannot-be-decoded": "mend or remove it with its partner: a training stops at it",
            "too-many-pixels": "cut it into parts or make it smaller (predict and evaluate take --max-pixels N)",
        }
        found: dict[str, list[tuple[str, str]]] = {}
        for file in [*images, *masks]:
            header = self.headers.get(file.path)
            if header is not None and header.code:
                found.setdefault(header.code, []).append((file.name, header.trouble))
        for look in looks:
            for path, trouble in ((look.pair.image, look.image_trouble), (look.pair.mask, look.mask_trouble)):
                if trouble and trouble not in NO_CLASSES:
                    code = "truncated-file" if "truncated" in trouble else "cannot-be-decoded"
                    found.setdefault(code, []).append((self.names[path], trouble))
        for code, entries in found.items():
            names = [name for name, _ in entries]
            reason = f" ({entries[0][1]})" if entries[0][1] else ""
            self.add(
                "error", code, f"{_number(names, 'file')} {_WHAT[code]}: {_some(names)}{reason}", remedies[code], names
            )

    def _of(self, files: Sequence[ImageFile], test: Callable[[_Header], bool]) -> list[str]:
        """Names of the files whose headers were read, can be used, and pass."""
        found = []
        for file in files:
            header = self.headers.get(file.path)
            if header is not None and not header.code and test(header):
                found.append(file.name)
        return found

    def _image_kinds(self, images: list[ImageFile], looks: Sequence[_Look]) -> None:
        """Formats and modes that need a word."""

        def some(test: Callable[[_Header], bool]) -> tuple[list[str], str]:
            names = self._of(images, test)
            return names, f"{_number(names, 'image')} of {len(images)}"

        names, count = some(lambda h: h.mode in ("RGBA", "LA", "PA", "La", "RGBa") and not h.array)
        if names:
            opaque = all(look.opaque for look in looks)
            self.add(
                "note",
                "alpha-channel",
                f"{count} with an alpha channel" + (", opaque wherever it was looked at" if opaque else ""),
                "dropped, nothing is lost"
                if opaque
                else "dropped; if it is data, keep it with --set model.in_channels=4",
                names,
            )
        names, count = some(lambda h: h.mode == "CMYK")
        if names:
            self.add(
                "note", "cmyk-images", f"{count} in CMYK: {_some(names)}", "read as RGB: nothing to convert", names
            )
        names, count = some(lambda h: h.mode in ("P", "PA"))
        if names:
            self.add(
                "note", "palette-images", f"{count} with a palette: {_some(names)}", "read as their colours", names
            )
        names, count = some(lambda h: h.frames > 1 and h.format != "TIFF")
        if names:
            self.add(
                "note", "animations", f"{count} with several frames: {_some(names)}", "the first frame is taken", names
            )
        names, count = some(lambda h: h.frames > 1 and h.format == "TIFF")
        if names:
            self.add(
                "warning",
                "stack-of-pages",
                f"{count} with several pages, of which the first alone is read: {_some(names)}",
                "save each page as a file of its own, or the pages as channels of one .npy",
                names,
            )
        gray, _ = some(lambda h: h.channels in (1, 2) and not h.array)
        colour, _ = some(lambda h: h.channels > 2 and not h.array)
        if gray and colour:
            fewer = gray if len(gray) <= len(colour) else colour
            self.add(
                "note",
                "gray-and-colour",
                f"{len(gray)} gray images among {len(colour)} in colour: {_some(fewer)}",
                "all are read as RGB; --set model.in_channels=1 reads all as gray",
                fewer,
            )

    def _channels(self, images: list[ImageFile], looks: Sequence[_Look]) -> int:
        """What `model.in_channels` should be."""
        headers = [h for i in images if (h := self.headers.get(i.path)) is not None and not h.code]
        arrays = Counter(h.channels for h in headers if h.array)
        if arrays:
            wanted = arrays.most_common(1)[0][0]
            odd = self._of(images, lambda h: h.channels != wanted if h.array else wanted not in (1, 2, 3, 4))
            if odd:
                self.add(
                    "error",
                    "channels-differ",
                    f"{_number(odd, 'image')} with another number of channels than the other arrays' {wanted}: "
                    f"{_some(odd)}",
                    "a network takes one number of channels: make them alike, or sort them into two folders",
                    odd,
                )
            return wanted
        if headers and all(h.channels < 3 for h in headers):
            return 1
        seen = [look for look in looks if look.highest]
        if seen and all(look.gray for look in seen):
            self.add(
                "note",
                "gray-in-colour-files",
                "the images are stored in colour, but those that were looked at are gray",
                "--set model.in_channels=1 reads them as gray; leave it out if the images to come have colour",
            )
            return 1
        return 3

    def _value_range(self, looks: Sequence[_Look]) -> ValueRange:
        """What `data.value_range` should be."""
        stored = {look.pair.image: look.stored for look in looks if look.stored is not None}
        floats = [path for path in stored if self.headers[path].kind == "float"]
        if stored:
            names = [self.names[path] for path in stored]
            low, high = min(s[0] for s in stored.values()), max(s[1] for s in stored.values())
            ends = [max(s[1], 1e-9) for s in stored.values()]
            value_range: ValueRange
            if max(ends) > 4 * min(ends) or high - low <= 0:
                value_range = "percentiles"
            elif floats or high > 65535 or low < 0:
                value_range = (float(f"{low:.4g}"), float(f"{high:.4g}"))
            else:
                value_range = (0.0, float(2 ** int(np.ceil(np.log2(high + 1))) - 1))
            option = "--set data.value_range=" + shlex.quote(_yaml(value_range))
            spread = f"most values lie between {low:.4g} and {high:.4g}"
            if floats:
                self.add(
                    "warning",
                    "floating-point-images",
                    f"{_number(names, 'sampled image')} with floating-point pixels ({spread}): {_some(names)}",
                    f"say which values are black and white: {option} (or percentiles: of each image by itself)",
                    names,
                )
                return value_range
            if high < 16384 or low < 0 or high > 65535:
                self.add(
                    "warning",
                    "dark-16-bit-images",
                    f"{_number(names, 'sampled image')} of 16 bits and more use a part of them ({spread}), of which "
                    f"the upper 8 bits keep little: {_some(names)}",
                    f"{option} (or percentiles: of each image by itself)",
                    names,
                )
                return value_range
            self.add(
                "note",
                "images-16-bit",
                f"{_number(names, 'sampled image')} of 16 bits ({spread})",
                "the upper 8 bits are taken; --set data.value_range=percentiles stretches each image by itself",
                names,
            )
            return None
        seen = [look for look in looks if look.highest and not look.constant]
        if seen and max(max(look.highest) for look in seen) < 16:
            top = max(max(look.highest) for look in seen)
            self.add(
                "warning",
                "images-nearly-black",
                f"no pixel of the sampled images is above {top} of 255: they may have been divided by 255, or hold ids",
                f"--set data.value_range='[0, {top}]' makes {top} white; or store them anew",
                [self.names[look.pair.image] for look in seen],
            )
            return (0.0, float(top))
        return None

    def _sizes(self, pairs: Sequence[Pair], images: list[ImageFile]) -> None:
        other, turned = [], []
        ratios: Counter[str] = Counter()
        for pair in pairs:
            image, mask = self.headers.get(pair.image), self.headers.get(pair.mask)
            if image is None or mask is None or image.code or mask.code:
                continue
            if (
                image.orientation not in (0, 1)
                and mask.orientation in (0, 1)
                and (mask.size != image.size or image.orientation < 5)
                and mask.size == image.stored
            ):
                turned.append(self.names[pair.mask])
            elif image.size != mask.size:
                other.append(self.names[pair.mask])
                ratios[f"{_times(mask.size)} for an image of {_times(image.size)}"] += 1
        if turned:
            self.add(
                "error",
                "mask-not-turned-like-its-image",
                f"{_number(turned, 'image')} turned by EXIF orientation, while the mask lies as the camera held it: "
                f"{_some(turned)}",
                "turn the masks, or take the orientation from the images: `mogrify -auto-orient` turns the pixels, "
                "`exiftool -Orientation= -overwrite_original` removes the tag",
                turned,
            )
        if other:
            self.add(
                "error",
                "mask-of-another-size",
                f"{_number(other, 'mask')} of another size than the image: {_some(other)} "
                f"({ratios.most_common(1)[0][0]})",
                "resize these masks to their images' size by nearest neighbour, or find the images they were drawn on",
                other,
            )
        sizes = {i.name: h.size for i in images if (h := self.headers.get(i.path)) is not None and not h.code}
        if not sizes:
            return
        tiny = [name for name, size in sizes.items() if min(size) < TINY]
        if tiny:
            self.add(
                "warning",
                "tiny-images",
                f"{_number(tiny, 'image')} of less than {TINY} pixels a side: {_some(tiny)}",
                "thumbnails? Find the originals, or remove them; small objects are lost when all are resized alike",
                tiny,
            )
        areas = sorted((width * height, name) for name, (width, height) in sizes.items())
        aspects = sorted((width / height, name) for name, (width, height) in sizes.items())
        if areas[-1][0] >= DIFFER_AREA * areas[0][0] or aspects[-1][0] >= DIFFER_ASPECT * aspects[0][0]:
            ends = (areas[0][1], areas[-1][1])
            if areas[-1][0] < DIFFER_AREA * areas[0][0]:
                ends = (aspects[0][1], aspects[-1][1])
            self.add(
                "note",
                "sizes-differ-widely",
                f"sizes differ widely: {_times(sizes[ends[0]])} ({ends[0]}) and {_times(sizes[ends[1]])} ({ends[1]})",
                "all are resized to --image-size; if objects have one size in pixels everywhere, cut images into tiles "
                "of one size first",
                ends,
            )
        middle = areas[len(areas) // 2][0]
        if middle >= (LARGE_FACTOR * 512) ** 2:
            self.add(
                "note",
                "large-images",
                f"a middling image has {middle / 1e6:.0f} million pixels, {np.sqrt(middle) / 512:.0f} times the side "
                "that training sees",
                "small objects vanish: raise --image-size, with --set data.tile=512 to train on parts, and predict "
                "with --tile 512",
            )

    # Pixels

    def _looks(self, pairs: Sequence[Pair]) -> list[_Look]:
        if not pairs:
            return []
        with ThreadPoolExecutor(min(THREADS, max(2, os.cpu_count() or 1))) as threads:
            looks = []
            before = len(self.headers)
            for done, look in enumerate(threads.map(self._look, pairs), start=1):
                looks.append(look)
                self.failed += bool(look.image_trouble or look.mask_trouble)
                self.on_progress(before + done, self.failed, before + len(pairs))
        return looks

    def _look(self, pair: Pair) -> _Look:
        look = _Look(pair)
        data: dict[str, bytes] = {}
        for path in (pair.image, pair.mask):
            try:
                data[path] = storage.read_bytes(path)
            except OSError as error:
                self.headers.setdefault(path, _Header(code="file-not-there", trouble=error.strerror or str(error)))
                return look
            if path not in self.headers:
                header = _header(ImageFile("", path, "", len(data[path]), 0), data[path])
                self._check(header)
                self.headers[path] = header
        if any(self.headers[path].code for path in data):
            return look
        look.image_digest, look.mask_digest = (hashlib.sha256(data[path]).digest() for path in (pair.image, pair.mask))
        _look_at_image(look, data[pair.image], self.headers[pair.image])
        _look_at_mask(look, data[pair.mask], self.headers[pair.mask], self.headers[pair.image])
        return look

    def _constants(self, looks: Sequence[_Look], channels: int) -> None:
        flat = [look for look in looks if look.constant]
        if flat:
            names = [self.names[look.pair.image] for look in flat]
            value = "entirely black" if all(max(look.highest) == 0 for look in flat) else "of one colour all over"
            self.add(
                "warning",
                "constant-images",
                f"{_number(names, 'image')} {value}: {_some(names)}",
                "nothing can be learned from them: find the originals, or remove them with their masks",
                names,
            )
        rest = [look for look in looks if look.highest and not look.constant]
        if channels > 1 and len(rest) > 1 and len({len(look.highest) for look in rest}) == 1:
            still = [
                channel
                for channel in range(len(rest[0].highest))
                if len({value for look in rest for value in (look.lowest[channel], look.highest[channel])}) == 1
            ]
            if still and len(still) < len(rest[0].highest):
                which = ", ".join(["red", "green", "blue"][c] if len(rest[0].highest) == 3 else str(c) for c in still)
                self.add(
                    "warning",
                    "constant-channel",
                    f"channel {which} has the same value in every pixel of the sampled images",
                    "a stain or a sensor that is missing? If so leave it; otherwise export the images again "
                    "(one channel only: --set model.in_channels=1)",
                    [self.names[look.pair.image] for look in rest],
                )

    def _mask_values(self, looks: Sequence[_Look]) -> tuple[list[int], dict[int, float]]:
        """The stored values that are classes, in order, and their shares of the pixels."""
        self._masks_that_are_none(looks)
        looks = [look for look in looks if look.counts and not look.is_image]
        looks = self._without_in_between(looks)
        if not looks:
            return [], {}
        occurs = {value: [look for look in looks if value in look.counts] for value in _values_of(looks)}
        self.hint = self._hint()
        values = self._without_strange(looks, occurs)
        pixels = {value: sum(look.counts.get(value, 0) for look in looks) for value in values}
        total = max(1, sum(pixels.values()))
        shares = {value: pixels[value] / total for value in values}
        files = [self.names[look.pair.mask] for look in looks]
        self._masks_alike(looks, values, files)
        if values == [0, 255]:
            self.add(
                "note",
                "masks-0-255",
                "masks hold 0 and 255",
                "they are read as background and foreground: nothing to convert",
            )
        if any(self.headers[look.pair.mask].mode == "P" for look in looks):
            self.add(
                "note",
                "palette-masks",
                f"masks have a palette and hold its indices {_few(values)}",
                "the indices are the classes, whatever their colours: nothing to convert",
            )
        self._balance(looks, values, shares, occurs)
        return values, shares

    def _masks_that_are_none(self, looks: Sequence[_Look]) -> None:
        """Masks whose pixels are no class values."""
        same = [self.names[look.pair.mask] for look in looks if look.is_image]
        if same:
            self.add(
                "error",
                "mask-is-the-image",
                f"{_number(same, 'mask')} the image itself: {_some(same)}",
                "put the masks there: is --masks the right folder?",
                same,
            )
        coloured = [look for look in looks if look.colours and not look.is_image]
        if coloured:
            names = [self.names[look.pair.mask] for look in coloured]
            colours: Counter[tuple[int, ...]] = Counter()
            for look in coloured:
                colours.update(look.colours)
            # Colours as they were meant; those that a lossy format or a smooth edge adds are many and rare.
            shown = ", ".join("#{:02x}{:02x}{:02x}".format(*colour) for colour, _ in colours.most_common(8))
            self.add(
                "error",
                "masks-in-colours",
                f"{_number(names, 'mask')} in colours ({len(colours)}: {shown}{', …' if len(colours) > 8 else ''}): "
                f"{_some(names)}",
                "store class ids instead, one number for each colour, as a gray or a palette PNG; then "
                "--set model.num_classes=K",
                names,
            )
        for code, text, remedy in (
            (
                "floating-point-masks",
                "floating-point values",
                "store class ids as integers: `Image.fromarray((mask > 0.5).astype('uint8'))` for one class",
            ),
            ("mask-values-beyond-16-bits", "values below 0 or above 65535", "store class ids: 0, 1, 2, …"),
        ):
            names = [self.names[look.pair.mask] for look in looks if look.mask_trouble == code]
            if names:
                self.add("error", code, f"{_number(names, 'mask')} with {text}: {_some(names)}", remedy, names)

    def _without_in_between(self, looks: Sequence[_Look]) -> list[_Look]:
        """The masks that hold few values; the others are findings."""
        jpeg = [look for look in looks if self.headers[look.pair.mask].format in ("JPEG", "MPO")]
        many = len(_values_of(looks)) > MANY_VALUES
        highest = [max(look.counts) for look in looks]
        counted = all(len(look.counts) >= 0.9 * (max(look.counts) + 1) for look in looks)
        if many and counted and max(highest) > 1.5 * min(highest):
            names = [self.names[look.pair.mask] for look in looks]
            self.add(
                "error",
                "masks-number-objects",
                f"masks number their objects, up to {max(highest)} in one: {_some(names)}",
                "a class is one value: `Image.fromarray((mask > 0).astype('uint8'))` for one class; where objects "
                "touch, leave a pixel of background between them and add --set train.border_weight=10",
                names,
            )
            return []
        between = [look for look in looks if (many or look in jpeg) and _in_between(look.counts)]
        if between:
            names = [self.names[look.pair.mask] for look in between]
            cause = "JPEG blurs edges" if between[0] in jpeg else "an edge was smoothed, as a resize does"
            self.add(
                "error",
                "masks-with-in-between-values",
                f"{_number(names, 'mask')} with values between the classes ({cause}; "
                f"{len(_values_of(between))} values): {_some(names)}",
                "save them as PNG with the class values alone, for one class: "
                "`Image.open(f).convert('L').point(lambda v: 255 * (v > 127)).save(stem + '.png')`",
                names,
            )
            chosen = {id(look) for look in between}
            looks = [look for look in looks if id(look) not in chosen]
        found = _values_of(looks)
        if len(found) > MAX_CLASSES or (found and np.median([len(look.counts) for look in looks]) > TOO_MANY_VALUES):
            names = [self.names[look.pair.mask] for look in looks]
            self.add(
                "error",
                "too-many-mask-values",
                f"masks hold {len(found)} values ({_few(sorted(found))}): {_some(names)}",
                f"a class is one value, and at most {MAX_CLASSES} can be: are these masks?",
                names,
            )
            return []
        return list(looks)

    def _without_strange(self, looks: Sequence[_Look], occurs: Mapping[int, Sequence[_Look]]) -> list[int]:
        """The values that look like classes; the others are findings."""
        values = sorted(occurs)
        void = [value for value in values if VOID_NAME.search(self.hint.get(value, ""))]
        if len(void) == 1 and len(values) > 2:
            self.ignore = void[0]
            self.add(
                "note",
                "ignore-value",
                f"the list of classes calls value {void[0]} {self.hint[void[0]]!r}",
                f"--set data.ignore_index={void[0]} leaves its pixels out of training and scores",
            )
            values.remove(void[0])
        elif VOID in values and len(values) > 2:
            others = [value for value in values if value not in (0, VOID)]
            together = any(len({*others} & look.counts.keys()) for look in occurs[VOID])
            if others == [1] and not together:
                ones, names = ([self.names[look.pair.mask] for look in occurs[value]] for value in (1, VOID))
                few = min((ones, names), key=len)
                self.add(
                    "error",
                    "mask-values-differ",
                    f"{len(ones)} masks hold 0 and 1, {len(names)} hold 0 and 255: {_some(few)}",
                    "write them alike, all 0 and 255 or all 0 and 1",
                    few,
                )
                return [0, VOID] if len(names) >= len(ones) else [0, 1]
            if values[-2] <= len(values) + 1:
                self.ignore = VOID
                self.add(
                    "note",
                    "ignore-value",
                    f"value 255 stands apart from the others ({_few(values[:-1])}), as a mark for pixels to leave out",
                    "--set data.ignore_index=255 leaves them out of training and scores; if 255 is a class, leave "
                    "that setting out",
                )
                values.remove(VOID)
        strange = []
        for value in values:
            rest = [other for other in values if other != value]
            seldom = len(occurs[value]) <= max(1, RARE_FILES * len(looks)) < len(looks) / 4
            contiguous = rest == list(range(len(rest)))
            if seldom and (len(rest) == 2 or (contiguous and value > len(rest))):
                strange.append(value)
        if len(strange) == 1:
            value = strange[0]
            names = [self.names[look.pair.mask] for look in occurs[value]]
            values.remove(value)
            self.add(
                "error",
                "unexpected-mask-value",
                f"value {value} occurs in {_number(names, 'mask')} only, beside {_few(values)} elsewhere: "
                f"{_some(names)}",
                f"mend these masks, or leave it out: --set data.ignore_index={value}; if it is a class: "
                f"--set model.num_classes={len(values) + 1}",
                names,
            )
        if len(values) > 2:
            gaps = [value for value in range(values[-1]) if value not in occurs]
            if gaps and len(gaps) <= max(1, len(values) // 3):
                self.add(
                    "warning",
                    "class-never-occurs",
                    f"value {_few(gaps)} lies between the others ({_few(values)}) and is in none of "
                    f"{_number(looks, 'sampled mask')}",
                    f"if there is no such class: --set data.mask_values={shlex.quote(_yaml(values))}; if there is, "
                    f"--set model.num_classes={values[-1] + 1} and add images that show it",
                )
            elif not gaps and self.ignore is None:
                self.add(
                    "note",
                    "several-classes",
                    f"masks hold the values 0 to {values[-1]}: {len(values)} classes",
                    f"--set model.num_classes={len(values)}; if one of them marks pixels to leave out (void), such as "
                    f"{values[-1]}: --set model.num_classes={len(values) - 1} --set data.ignore_index={values[-1]}",
                )
        return values

    def _hint(self) -> dict[int, str]:
        """Names of mask values in a list of classes beside the masks; empty if there is none."""
        if self.masks is None or storage.is_uri(self.masks):
            return {}
        for folder in (Path(self.masks), Path(self.masks).parent):
            for name in HINTS:
                if (folder / name).is_file():
                    text = (folder / name).read_text(encoding="utf-8", errors="replace")
                    found = re.findall(r"^\s*(\d+)[\s,;:=]+(\S.*?)\s*$", text, re.MULTILINE)
                    return {int(value): label for value, label in found}
        return {}

    def _masks_alike(self, looks: Sequence[_Look], values: Sequence[int], names: list[str]) -> None:
        """Empty, full and identical masks."""
        count = len(looks)
        only = {value: [look for look in looks if _is_only(look, value)] for value in values}
        if len(values) == 1:
            code, text = ("all-masks-empty", "empty") if values[0] == 0 else ("all-masks-full", f"{values[0]} all over")
            self.add(
                "error",
                code,
                f"every one of {_number(names, 'mask')} is {text}: there is one class only",
                "check how they were saved: ids 0 and 1 divided by 255 become 0; and whether --masks is right",
                names,
            )
            return
        if count > 2 and len({look.mask_digest for look in looks}) == 1:
            self.add(
                "warning",
                "masks-all-alike",
                f"all {count} sampled masks are one and the same picture: {_some(names)}",
                "a mask belongs to its image: check how they were exported",
                names,
            )
            return
        if len(values) != 2:
            return
        low, high = values
        empty, full = ([self.names[look.pair.mask] for look in only[value]] for value in (low, high))
        if empty:
            often = 2 * len(empty) > count
            self.add(
                "warning" if often else "note",
                "mostly-empty-masks" if often else "empty-masks",
                f"{len(empty)} of {_number(names, 'sampled mask')} are empty: {_some(empty)}",
                "right where there is nothing to find; otherwise their labels are missing"
                + ("; with so many of them a network learns to find nothing: leave some out" if often else ""),
                empty,
            )
        if full:
            self.add(
                "warning",
                "full-masks",
                f"{_number(full, 'mask')} foreground all over: {_some(full)}",
                "check whether they are inverted or were filled by mistake",
                full,
            )

    def _balance(
        self,
        looks: Sequence[_Look],
        values: Sequence[int],
        shares: Mapping[int, float],
        occurs: Mapping[int, Sequence[_Look]],
    ) -> None:
        if len(values) == 2:
            foreground = shares[values[1]]
            if 0 < foreground < RARE_FOREGROUND:
                self.add(
                    "warning",
                    "little-foreground",
                    f"the foreground is {_percent(foreground)} of the pixels",
                    "bce alone would find nothing: train.loss=bce+dice (the suggested one) or "
                    "--set train.loss=focal+tversky, perhaps --set train.class_weights=inverse; and keep objects "
                    "visible with a larger --image-size and --set data.tile",
                )
            elif foreground > 0.6:
                self.add(
                    "note",
                    "mostly-foreground",
                    f"value {values[1]} is the foreground and {_percent(foreground)} of the pixels",
                    "if what is to be found is the other one: "
                    f"--set data.mask_values={shlex.quote(_yaml([values[1], values[0]]))}",
                )
        elif len(values) > 2:
            for value in values:
                files = [self.names[look.pair.mask] for look in occurs[value]]
                if (
                    shares[value] < RARE_PIXELS
                    or len(files) < 0.01 * len(looks)
                    or (len(files) == 1 and len(looks) > 9)
                ):
                    self.add(
                        "warning",
                        "rare-class",
                        f"value {value} is {_percent(shares[value])} of the pixels, in {_number(files, 'mask')} of "
                        f"{len(looks)}: {_some(files)}",
                        "add images that show it, or weigh it: --set train.class_weights=inverse; validation may not "
                        "see it at all: --set data.val_groups='[…]' names groups to hold out",
                        files,
                    )

    # The whole

    def _groups(self, pairs: Sequence[Pair], looks: Sequence[_Look], pattern: str | None) -> bool:
        """Says whether images belong together. Returns whether neighbours by name are alike, as slices are."""
        if pattern is not None:
            groups = Counter(records.group_of(pair.key, pattern) for pair in pairs)
            largest = groups.most_common(2)
            self.add(
                "note",
                "names-look-like-groups",
                f"the names look like {len(groups)} groups, such as {largest[0][0]!r} with {largest[0][1]} images",
                f"--group-by {shlex.quote(pattern)} keeps each on one side of the split; otherwise the scores of a "
                "validation that has seen its subjects flatter",
            )
            return False
        thumbs = [look.thumb for look in looks if look.thumb is not None]
        if len(thumbs) < 8 or len(looks) < len(pairs):
            return False
        near = np.mean([np.abs(a - b).mean() for a, b in itertools.pairwise(thumbs)])
        half = len(thumbs) // 2
        far = np.mean([np.abs(thumb - thumbs[(k + half) % len(thumbs)]).mean() for k, thumb in enumerate(thumbs)])
        if near >= ALIKE * far:
            return False
        self.add(
            "note",
            "neighbours-alike",
            f"images that follow each other by name are alike (they differ by {near / far:.0%} of what others do), as "
            "slices of a volume or frames of a film are",
            "--set data.split_order=name holds out one end of them instead of some in between, whose neighbours the "
            "network has seen",
        )
        return True

    def _duplicates(
        self, images: Sequence[ImageFile], pairs: Sequence[Pair], looks: Sequence[_Look], pattern: str | None
    ) -> None:
        mask_of = {pair.image: pair.mask for pair in pairs}
        local = [image for image in images if not storage.is_uri(image.path) and image.size > 0]
        copies = _copies(local) if len(local) == len(images) else _same([(k.image_digest, k.pair.image) for k in looks])
        flat = {look.pair.image for look in looks if look.constant}
        copies = [group for group in copies if not flat.intersection(group)]
        contrary = [group for group in copies if self._masks_differ([mask_of[p] for p in group if p in mask_of])]
        if contrary:
            names = [self.names[path] for group in contrary for path in group]
            self.add(
                "warning",
                "duplicates-with-different-masks",
                f"{_number(contrary, 'image')} there more than once, with different masks: {_some(names)}",
                "keep the right one: contrary labels can't be learned",
                names,
            )
        copies = [group for group in copies if group not in contrary]
        across = []
        if pattern is not None:
            keys = {image.path: image.key for image in images}
            across = [g for g in copies if len({m.group() for p in g if (m := re.search(pattern, keys[p]))}) > 1]
        if across:
            names = [self.names[path] for group in across for path in group]
            self.add(
                "warning",
                "duplicates-across-groups",
                f"{_number(across, 'image')} there more than once in different groups by {pattern!r}: {_some(names)}",
                "remove the copies: --group-by can't keep them on one side, so validation sees what was trained on",
                names,
            )
        copies = [group for group in copies if group not in across]
        if copies:
            names = [self.names[path] for group in copies for path in group]
            self.add(
                "warning",
                "duplicate-images",
                f"{_number(copies, 'image')} there more than once, {len(names)} files in all: {_some(names)}",
                "remove the copies, or keep them on one side of the split with --group-by: validation would see what "
                "was trained on",
                names,
            )

    def _masks_differ(self, paths: Sequence[str]) -> bool:
        from unet_ray import imaging

        try:
            data = {storage.read_bytes(path) for path in paths}
            if len(data) < 2:
                return False
            first, *rest = (imaging.stored_values(encoded) for encoded in data)
        except (imaging.ImageError, OSError):
            return False  # said elsewhere
        return not all(np.array_equal(first, other) for other in rest)

    def _too_few(self, count: int) -> None:
        if self.masks is None:
            return
        if count < 2:
            self.add(
                "error",
                "too-few-pairs",
                f"{count or 'no'} pair of an image and a mask: one is needed to train on and one to validate on",
                "add pairs; some tens are a start where images are alike",
            )
        elif count < 10:
            self.add(
                "note",
                "few-pairs",
                f"{count} pairs are few: the validation score of {max(1, round(0.2 * count))} says little",
                "--folds 5 scores each pair once; strong augmentation helps (see `unet-ray recipes isbi2012`)",
            )

    def _suggestion(
        self,
        pairs: Sequence[Pair],
        channels: int,
        values: Sequence[int],
        shares: Mapping[int, float],
        value_range: ValueRange,
        pattern: str | None,
        alike: bool,
    ) -> Suggestion | None:
        if len(pairs) < 2 or self.masks is None:
            return None
        classes = max(1, len(values) if len(values) > 2 else 1)
        if classes > MAX_CLASSES:
            return None
        if channels == 4 and classes == 4:
            recipe = "brats"
        elif classes > 1:
            recipe = "camvid"
        elif channels == 1 and len(pairs) < 200:
            recipe = "isbi2012"
        else:
            recipe = "carvana-fast"
        base = load_train_config(recipe=recipe)
        keys = [pair.key for pair in pairs]
        sizes = [h.size for pair in pairs if (h := self.headers.get(pair.image)) is not None and not h.code]
        # At the deepest level more than one position must be left, for batch norm.
        least = 2 * base.model.patch * 2**base.model.depth
        image_size = _image_size(sizes, least, square=base.augment.quarter_turns)
        settings: dict[str, Any] = {
            "model.in_channels": channels,
            "model.num_classes": classes,
            "data.image_size": image_size,
            "data.mask_values": None,
            "data.ignore_index": self.ignore,
            "data.classes": (),
            "data.group_by": _pattern(pattern, base.data.group_by, keys),
            "data.split_order": "name" if alike else "hash",
            "data.value_range": value_range,
        }
        if list(values) not in ([], list(range(len(values)))) and classes > 1:
            settings["data.mask_values"] = tuple(values)
        labels = [self.hint.get(value, "") for value in values]
        if classes > 1 and all(labels):
            settings["data.classes"] = tuple(labels)
        membranes = recipe == "isbi2012" and shares.get(255, 0) > 0.6 and alike
        if membranes and list(values) == [0, 255]:
            settings["data.mask_values"], settings["data.classes"] = base.data.mask_values, base.data.classes
        if settings["data.mask_values"] is None and base.data.mask_values == tuple(range(classes)):
            settings["data.mask_values"] = base.data.mask_values
        config = load_train_config(recipe=recipe, settings=settings.items())
        try:
            train, _ = records.split(keys, config.data, config.train.seed)
        except UserError:  # a pattern that leaves nothing on one side
            settings["data.group_by"] = None
            config = load_train_config(recipe=recipe, settings=settings.items())
            train, _ = records.split(keys, config.data, config.train.seed)
        steps = -(-len(train) // config.train.batch_size)
        settings["train.epochs"] = min(max(base.train.epochs, 40), max(base.train.epochs, round(STEPS / steps)))
        known = base.to_dict()
        changed = {
            name: value
            for name, value in settings.items()
            if _yaml(known[name.split(".")[0]][name.split(".")[1]]) != _yaml(value)
        }
        flags = {"data.group_by": "--group-by", "data.image_size": "--image-size", "train.epochs": "--epochs"}
        command = ["unet-ray", "train", "--images", storage.without_secrets(self.images)]
        command += ["--masks", storage.without_secrets(self.masks), "--out", "RUN", "--recipe", recipe]
        for name, value in changed.items():
            if name in flags and isinstance(value, (int, str)):
                command += [flags[name], str(value)]
            else:
                command += ["--set", f"{name}={_yaml(value)}"]
        pinned = tuple((name, _yaml(value)) for name, value in changed.items())
        return Suggestion(recipe, image_size, pinned, shlex.join(command))

    def _trial(self, suggestion: Suggestion, looks: Sequence[_Look]) -> None:
        """Decodes two pairs as the suggested training will: what it says is an error, unless it was said before."""
        from unet_ray.rows import Decoder

        if any(finding.level == "error" for finding in self.findings):
            return
        config = suggestion.config()
        values = config.data.mask_values
        if values is None:
            found = sorted(_values_of(looks) - {self.ignore})
            values = tuple(found) if config.model.num_classes == 1 else tuple(range(config.model.num_classes))
        decoder = Decoder.of(dataclasses.replace(config, data=dataclasses.replace(config.data, mask_values=values)))
        for look in _evenly(looks, 2):
            try:
                decoder(look.pair.image, look.pair.mask)
            except UserError as error:
                self.add(
                    "error",
                    "cannot-be-trained-on",
                    str(error),
                    "a training with the suggested settings would stop at it",
                    [self.names[look.pair.image]],
                )

    def _expected(self, suggestion: Suggestion, pairs: Sequence[Pair]) -> Expected:
        from unet_ray.rows import Decoder, fits_in_memory

        config = suggestion.config()
        decoder = Decoder.of(config)
        train, val = records.split([pair.key for pair in pairs], config.data, config.train.seed)
        batch, seconds, device = _timed_step(config, len(train))
        # Of a step's work the forward pass, which validation is, is a third.
        epoch = seconds / batch * (len(train) + len(val) / 3)
        return Expected(
            epoch,
            decoder.row_bytes() * len(pairs),
            fits_in_memory(len(pairs), decoder, config.compute.memory_fraction),
            device,
            f"a training step on {_number(range(batch), 'image')} took {seconds:.2f} s; validation counted as a "
            f"third, decoding left out{_busy()}",
        )


NO_CLASSES = frozenset({"floating-point-masks", "mask-values-beyond-16-bits"})
"""Codes that stand in `_Look.mask_trouble`."""
_WHAT = {
    "file-not-there": "can't be opened",
    "empty-file": "empty",
    "not-an-image": "no image",
    "truncated-file": "cut off",
    "cannot-be-decoded": "damaged",
    "too-many-pixels": "too large",
}


def _timed_step(config: TrainConfig, count: int) -> tuple[int, float, str]:
    """Images of the batch, seconds of one training step on it, and the device."""
    import torch

    from unet_ray import engine
    from unet_ray.rows import Decoder

    device = engine.device_here("auto", 1)
    if device.type == "cpu":
        engine.keep_freed_memory()
    training = engine.prepare(config, device)
    training.model.train()
    decoder = Decoder.of(config)
    generator = np.random.default_rng(0)

    def step(images: int) -> float:
        batch = decoder.empty(images)
        batch["image"] = generator.integers(0, 255, batch["image"].shape, np.uint8)
        indices = batch["index"] = np.arange(images)
        started = time.perf_counter()
        float(training.step([(batch, engine.Part(indices, 1.0))], 1, 1))  # float: waits for a GPU
        return time.perf_counter() - started

    size = min(config.train.batch_size, count)
    first = step(1)  # which warms up
    once = [step(1)]
    # A whole batch where there is time for it: part of a step's work does not depend on the images.
    if once[0] * size > TIMED_SECONDS:
        size = 1
    seconds = once if size == 1 else [step(size)]
    while first < TIMED_SECONDS and sum(seconds) < TIMED_SECONDS / 2 and len(seconds) < 3:
        seconds.append(step(size))
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else _number(range(torch.get_num_threads()), "CPU thread")
    )
    return size, min(seconds), name


def _busy() -> str:
    """A word of other work on this machine, where it asks for all CPUs (of the last minute; Unix)."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return (
        f"; this machine is busy (load {load:.1f}), without that it is faster" if load > (os.cpu_count() or 1) else ""
    )


def _listed(location: str) -> list[ImageFile]:
    """The images of a folder, none where it has none. Raises UserError if there is no such folder."""
    try:
        return records.find_images(location)
    except UserError:
        if storage.exists(location) and storage.is_folder(location):
            return []
        raise


def _header(file: ImageFile, data: bytes | None = None) -> _Header:
    """What a file says of itself: of `data`, or of the local file."""
    if file.size < 0:
        return _Header(code="file-not-there")
    if file.size == 0:
        return _Header(code="empty-file")
    try:
        with io.BytesIO(data) if data is not None else Path(file.path).open("rb") as stream:
            header = _header_of(stream, file.size)
            if header.cut and not header.code:
                stream.seek(0)
                _confirm_cut(header, stream.read())
            return header
    except OSError as error:
        return _Header(code="file-not-there", trouble=error.strerror or str(error))


def _header_of(stream: IO[bytes], size: int) -> _Header:
    magic = stream.read(8)
    stream.seek(0)
    try:
        if magic[:6] == b"\x93NUMPY":
            return _npy_header(stream, size)
        image = Image.open(stream)
    except UnidentifiedImageError:
        if magic[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return _tiff_header(stream)
        return _Header(code="not-an-image")
    except Exception as error:  # of as many kinds as there are plugins
        cut = "truncated" in str(error)
        code = "truncated-file" if cut else "not-an-image"
        return _Header(code=code, trouble=" ".join(str(error).split())[:100])
    try:
        header = _Header(format=image.format or "", mode=image.mode, stored=image.size, size=image.size)
        header.channels = len(image.getbands())
        if image.mode in ("P", "PA"):
            header.channels = 3
        header.kind = "float" if image.mode == "F" else "more" if image.mode.startswith("I") else "8"
        # Pillow's method for PNG would decode all pixels first.
        header.orientation = Image.Image.getexif(image).get(0x0112, 1)
        if header.orientation in (5, 6, 7, 8):
            header.size = (image.size[1], image.size[0])
        header.cut = _ends_early(image, stream, size)
        if image.format != "MPO":  # a photograph with its preview
            header.frames = getattr(image, "n_frames", 1)
    except Exception as error:  # the rest of the header is damaged
        header.code, header.trouble = "cannot-be-decoded", " ".join(str(error).split())[:100]
    return header


def _npy_header(stream: IO[bytes], size: int) -> _Header:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    if len(shape) not in (2, 3) or dtype.kind not in "biuf" or 0 in shape:
        return _Header(code="not-an-image", trouble=f"an array {[*shape]} of {dtype}, not [height, width, channels]")
    channels = shape[2] if len(shape) == 3 else 1
    if stream.tell() + int(np.prod(shape)) * dtype.itemsize > size:
        return _Header(code="truncated-file")
    kind: Literal["8", "more", "float"] = "float" if dtype.kind == "f" else "8" if dtype.itemsize == 1 else "more"
    extent = (shape[1], shape[0])
    return _Header("npy", f"{dtype}×{channels}", channels, kind, True, extent, extent)


def _tiff_header(stream: IO[bytes]) -> _Header:
    """Of a TIFF that Pillow doesn't know, such as one of many channels."""
    try:
        import tifffile

        stream.seek(0)
        with tifffile.TiffFile(stream) as file:
            series = file.series[0]
            sizes = dict(zip(series.axes, series.shape, strict=True))
            extent = (sizes["X"], sizes["Y"])
            channels = int(np.prod(series.shape)) // (extent[0] * extent[1])
            kind: Literal["8", "more", "float"] = "float" if series.dtype.kind == "f" else "more"
            return _Header(
                "TIFF",
                f"{series.dtype}×{channels}",
                channels,
                "8" if series.dtype.itemsize == 1 else kind,
                True,
                extent,
                extent,
            )
    except ImportError:
        return _Header(code="cannot-be-decoded", trouble="a TIFF that needs tifffile: install the extra `tiff`")
    except Exception as error:
        return _Header(code="not-an-image", trouble=" ".join(str(error).split())[:100])


def _ends_early(image: Image.Image, stream: IO[bytes], size: int) -> bool:
    """Whether a file looks cut off, by its end or by what its header says of its length."""
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        parts = ((273, 279), (324, 325))  # offsets and lengths of strips, of tiles
        return any(
            offset + length > size
            for where, lengths in parts
            for offset, length in zip(tags.get(where, ()), tags.get(lengths, ()), strict=False)
        )
    if image.format in ("BMP", "WEBP"):
        stream.seek(0)
        start = stream.read(8)
        said = int.from_bytes(start[2:6] if image.format == "BMP" else start[4:8], "little")
        return said + (8 if image.format == "WEBP" else 0) > size
    marks = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND", "GIF": b";"}
    mark = marks.get(image.format or "")
    if mark is None:
        return False
    # Some writers put a few bytes behind the end.
    stream.seek(max(0, size - (TAIL if image.format != "GIF" else 16)))
    return mark not in stream.read()


def _confirm_cut(header: _Header, data: bytes) -> None:
    """A file without its end may be whole all the same: decoding it tells."""
    from unet_ray import imaging

    header.cut = False
    try:
        imaging.decode_image(data, 3, (LOOK, LOOK), value_range=None if header.kind == "8" else "percentiles")
    except imaging.ImageError as error:
        if "--max-pixels" not in str(error):
            header.cut, header.code, header.trouble = True, "truncated-file", str(error)


def _look_at_image(look: _Look, data: bytes, header: _Header) -> None:
    """Fills in what the image's pixels say."""
    from unet_ray import imaging

    channels = header.channels if header.array else 1 if header.channels < 3 else 3
    value_range: ValueRange = None if header.kind == "8" else "percentiles"
    try:
        array, _ = imaging.decode_image(data, channels, (LOOK, LOOK), value_range=value_range)
        if not header.array and header.mode in ("RGBA", "LA"):
            with Image.open(io.BytesIO(data)) as image:
                look.opaque = image.getchannel("A").getextrema()[0] == 255
        if header.kind != "8":
            values = _stored(data)
            sparse = values[:: max(1, len(values) // 256)]
            low, high = np.nanpercentile(sparse, imaging.PERCENTILES)
            look.stored = (float(low), float(high))
        look.lowest = tuple(array.min(axis=(0, 1)).tolist())
        look.highest = tuple(array.max(axis=(0, 1)).tolist())
        if look.lowest == look.highest:
            # At full size a few pixels may differ.
            whole, _ = imaging.decode_image(data, channels, None, value_range=value_range)
            look.constant = bool((whole == whole[:1, :1]).all())
    except imaging.ImageError as error:
        look.image_trouble = str(error)
        return
    except (OSError, ValueError) as error:
        look.image_trouble = f"cannot be decoded: {error}"
        return
    look.pixels_gray = array.mean(axis=2, dtype=np.float32)
    # A step or two of difference is what JPEG makes of gray.
    look.gray = channels != 3 or int(np.ptp(array, axis=2).max()) <= 4
    small = _smaller(look.pixels_gray)
    look.thumb = small - small.mean()


def _look_at_mask(look: _Look, data: bytes, header: _Header, image_header: _Header) -> None:
    """Fills in what the mask's pixels say."""
    from unet_ray import imaging

    if look.mask_digest == look.image_digest:
        look.is_image = True
        return
    if header.kind == "float":
        look.mask_trouble = "floating-point-masks"
        return
    try:
        values = imaging.stored_values(data)
    except imaging.ImageError as error:
        if header.array or header.mode not in ("RGB", "RGBA", "CMYK", "YCbCr"):
            look.mask_trouble = str(error)
            return
        try:
            with Image.open(io.BytesIO(data)) as image:
                found = image.convert("RGB").getcolors(2**24) or []
        except Exception:  # not in colours, then, but damaged
            look.mask_trouble = str(error)
            return
        look.colours = Counter({colour: count for count, colour in found})
        look.is_image = len(found) > MANY_VALUES and _shows_the_same(look, data)
        return
    if values.dtype == np.uint8:
        counts = np.bincount(values.reshape(-1), minlength=256)
        look.counts = {value: int(counts[value]) for value in np.flatnonzero(counts).tolist()}
    else:
        ids, numbers = np.unique(values, return_counts=True)
        if ids[0] < 0 or ids[-1] >= 2**16:
            look.mask_trouble = "mask-values-beyond-16-bits"
            return
        look.counts = dict(zip(ids.tolist(), numbers.tolist(), strict=True))
    if len(look.counts) > MANY_VALUES and image_header.size == header.size:
        look.is_image = _shows_the_same(look, data)


def _shows_the_same(look: _Look, mask: bytes) -> bool:
    """Whether a mask with the values of a photograph is the image, saved again."""
    from unet_ray import imaging

    try:
        seen, _ = imaging.decode_image(mask, 1, (LOOK, LOOK))
    except imaging.ImageError:
        return False
    if look.pixels_gray is None:
        return False
    # Its fine texture too: an object on a plain ground looks like its own mask.
    pictures = (look.pixels_gray, seen[..., 0].astype(np.float32))
    coarse = [_smaller(picture) for picture in pictures]
    fine = [p - np.kron(c, np.ones((LOOK // 32, LOOK // 32))) for p, c in zip(pictures, coarse, strict=True)]
    return all(
        min(one.std(), other.std()) > 1e-3 and np.corrcoef(one.ravel(), other.ravel())[0, 1] > SAME
        for one, other in (coarse, fine)
    )


def _smaller(picture: np.ndarray) -> np.ndarray:
    """[LOOK,LOOK] as [32,32]."""
    return picture.reshape(32, LOOK // 32, 32, LOOK // 32).mean(axis=(1, 3))


def _stored(data: bytes) -> np.ndarray:
    """An image's values of more than 8 bits, as they are stored."""
    if data[:6] == b"\x93NUMPY":
        return np.load(io.BytesIO(data), allow_pickle=False)
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image)
    except UnidentifiedImageError:
        import tifffile

        return tifffile.imread(io.BytesIO(data))


def _grays(path: str) -> int:
    """Gray levels of an image; 0 if it can't be read."""
    from unet_ray import imaging

    try:
        array, _ = imaging.decode_image(storage.read_bytes(path), 1, None, value_range="percentiles")
        palette = Image.open(io.BytesIO(storage.read_bytes(path))).mode == "P"
    except (imaging.ImageError, OSError):
        return 0
    return 1 if palette and len(np.unique(array)) <= 16 else len(np.unique(array))


def _in_between(counts: Mapping[int, int]) -> bool:
    """Whether a mask consists of two values far apart, or nearly them, and several others that lie between."""
    first = max(counts, key=lambda value: counts[value])
    far = {value: count for value, count in counts.items() if abs(value - first) >= MANY_VALUES}
    if not far:
        return False
    second = max(far, key=lambda value: far[value])
    near = [value for value in counts if min(abs(value - first), abs(value - second)) <= MANY_VALUES // 2]
    between = [value for value in counts if min(first, second) < value < max(first, second)]
    return len(between) > 1 and sum(counts[value] for value in near) > 0.6 * sum(counts.values())


def _is_only(look: _Look, value: int) -> bool:
    return set(look.counts) == {value}


def _values_of(looks: Iterable[_Look]) -> set[int]:
    return {value for look in looks for value in look.counts}


def _other_names(
    images: Sequence[ImageFile], masks: Sequence[ImageFile], *, one_folder: bool
) -> tuple[list[tuple[ImageFile, ImageFile]], str, str]:
    """Pairs that other names would make of images and masks without a partner, what to rename, and the finding's code;
    no pairs if no rule makes pairs of half of them."""
    if one_folder:
        masks = images
    best: tuple[list[tuple[ImageFile, ImageFile]], str, str] = ([], "", "")
    for guess, folder in itertools.product((False, True), (True, False)):
        part = _whole if folder else _last
        for rule, of_image, of_mask in _guesses(part, images, masks) if guess else _rules(part):
            image_of: dict[str, list[ImageFile]] = {}
            mask_of: dict[str, list[ImageFile]] = {}
            for files, found, name in ((images, image_of, of_image), (masks, mask_of, of_mask)):
                for file in files:
                    key = name(file.key)
                    if key is not None:
                        found.setdefault(key, []).append(file)
            pairs = [
                (image_of[key][0], mask_of[key][0])
                for key in image_of.keys() & mask_of.keys()
                if len(image_of[key]) == len(mask_of[key]) == 1 and image_of[key][0].path != mask_of[key][0].path
            ]
            if len(pairs) > len(best[0]):
                code = "masks-named-otherwise" if folder else "masks-in-other-folders"
                best = (sorted(pairs, key=lambda pair: pair[0].name), rule, code)
        least = len(images) if not one_folder else len(images) / 2
        if best[0] and 2 * len(best[0]) >= min(least, len(masks)):
            return best
    return [], "", ""


_Name = Callable[[str], "str | None"]


def _rules(part: Callable[[str], str]) -> Iterator[tuple[str, _Name, _Name]]:
    """What to do in words, and how what an image and its mask have in common is found in their keys, of which `part` is
    what counts."""

    def without(end: str, start: str = "") -> _Name:
        def name(key: str) -> str | None:
            head, slash, stem = part(key).rpartition("/")
            if not (stem.endswith(end) and stem.startswith(start) and len(stem) > len(end) + len(start)):
                return None
            return head + slash + stem[len(start) : len(stem) - len(end)]

        return name

    def same(key: str) -> str | None:
        return part(key).removesuffix(records.MASK_SUFFIX)

    yield ("give masks the same folders below --masks as their images have below --images", part, same)
    for end in MASK_ENDS:
        yield f"rename masks: {end!r} at the end becomes {records.MASK_SUFFIX!r}, or nothing", part, without(end)
    for start in MASK_STARTS:
        yield f"rename masks: {start!r} at the start becomes nothing", part, without("", start)
    for affix in IMAGE_AFFIXES:
        image = without("", affix) if affix.endswith("_") else without(affix)
        for end in ("", records.MASK_SUFFIX, *MASK_ENDS):
            rule = f"give images and masks one stem: {affix!r} in images and {end!r} in masks become nothing"
            yield rule, image, without(end)
        for start in MASK_STARTS:
            rule = f"give images and masks one stem: {affix!r} in images and {start!r} in masks become nothing"
            yield rule, image, without("", start)
    yield "rename masks: capitals as in the images' names", lambda key: part(key).lower(), _lower(same)


def _guesses(
    part: Callable[[str], str], images: Sequence[ImageFile], masks: Sequence[ImageFile]
) -> Iterator[tuple[str, _Name, _Name]]:
    """The same from what all images' names and all masks' names begin and end with, and from their last numbers."""
    if len(images) > 2 and len(masks) > 2:
        starts, ends = zip(*(_common([part(f.key) for f in files]) for files in (images, masks)), strict=True)
        rule = (
            f"rename masks: {starts[1]!r} at the start becomes {starts[0]!r}, and {ends[1]!r} at the end "
            f"{ends[0]!r} or {ends[0] + records.MASK_SUFFIX!r}"
        )
        yield rule, _between(part, starts[0], ends[0]), _between(part, starts[1], ends[1])
    rule = f"rename masks: the image's whole name, with or without {records.MASK_SUFFIX}; their last numbers agree"
    yield rule, _last_number(part), _last_number(part)


def _whole(key: str) -> str:
    return key


def _last(key: str) -> str:
    return PurePosixPath(key).name


def _lower(name: _Name) -> _Name:
    return lambda key: (name(key) or "").lower()


def _common(names: Sequence[str]) -> tuple[str, str]:
    """What all names begin and end with, without digits next to what differs."""

    def start(names: Sequence[str]) -> str:
        alike = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
        return "".join(letters[0] for letters in alike).rstrip("0123456789")

    return start(names), start([name[::-1] for name in names])[::-1]


def _between(part: Callable[[str], str], start: str, end: str) -> _Name:
    def name(key: str) -> str | None:
        text = part(key)
        core = text[len(start) : len(text) - len(end)]
        return (core.lstrip("0") or "0" if core.isdigit() else core) if len(text) > len(start) + len(end) else None

    return name


def _last_number(part: Callable[[str], str]) -> _Name:
    def name(key: str) -> str | None:
        found = re.findall(r"\d+", part(key))
        return str(int(found[-1])) if found else None

    return name


def _copies(files: Sequence[ImageFile]) -> list[list[str]]:
    """Paths of local files with the same bytes, in groups. Only files of one size, and with the same bytes in their
    middle, are read whole."""
    by_size = _same([(str(file.size), file.path) for file in files])
    sizes = {file.path: file.size for file in files}

    def middle(path: str) -> tuple[int, bytes]:
        try:
            with Path(path).open("rb") as stream:
                stream.seek(sizes[path] // 2)
                return sizes[path], stream.read(TAIL)
        except OSError:
            return -1, path.encode(errors="surrogateescape")

    def whole(path: str) -> bytes:
        try:
            with Path(path).open("rb") as stream:
                return (
                    hashlib.file_digest(stream, "sha256").digest()
                    if hasattr(hashlib, "file_digest")
                    else (hashlib.sha256(stream.read()).digest())
                )
        except OSError:
            return path.encode(errors="surrogateescape")

    with ThreadPoolExecutor(THREADS) as threads:
        candidates = [path for group in by_size for path in group]
        alike = _same(list(zip(threads.map(middle, candidates), candidates, strict=True)))
        candidates = [path for group in alike for path in group]
        return _same(list(zip(threads.map(whole, candidates), candidates, strict=True)))


def _same(keyed: Iterable[tuple[Any, str]]) -> list[list[str]]:
    """Paths that share a key, in groups of two and more; an empty key is none."""
    groups: dict[Any, list[str]] = {}
    for key, path in keyed:
        if key:
            groups.setdefault(key, []).append(path)
    return [group for group in groups.values() if len(group) > 1]


def _image_size(sizes: Sequence[tuple[int, int]], least: int, *, square: bool) -> int | tuple[int, int]:
    """`data.image_size` for images of these (width, height): a middling image's own size up to the area of 512²; larger
    photographs become squares of 512, as those of Carvana do, and so do images of different forms."""
    if not sizes:
        return 512
    width, height = (float(np.median([size[axis] for size in sizes])) for axis in (0, 1))
    scale = min(1.0, 512 / np.sqrt(width * height))
    forms = np.percentile([size[0] / size[1] for size in sizes], (10, 90))
    if square or forms[1] > 1.1 * forms[0] or (scale < 1 and 0.5 <= width / height <= 2):
        return max(least, round(scale * np.sqrt(width * height) / 16) * 16)
    sides = [max(least, round(scale * side / 8) * 8) for side in (height, width)]
    return sides[0] if sides[0] == sides[1] else (sides[0], sides[1])


def _pattern(pattern: str | None, known: str | None, keys: Sequence[str]) -> str | None:
    """The recipe's own pattern where it makes the same groups."""
    if known is None or not all(re.search(known, key) for key in keys):
        return pattern
    groups = {(records.group_of(key, known), records.group_of(key, pattern)) for key in keys}
    return known if len(groups) == len({ours for ours, _ in groups}) == len({seen for _, seen in groups}) else pattern


def _evenly(items: Sequence[Any], count: int) -> list[Any]:
    """`count` of the items, evenly spaced; all if there are fewer."""
    if len(items) <= count:
        return list(items)
    return [items[number * len(items) // count] for number in range(count)]


def _counted(kind: str, headers: Sequence[_Header | None]) -> dict[str, Any]:
    good = [header for header in headers if header is not None and not header.code]
    return {
        f"{kind}_formats": dict(Counter(h.format for h in good).most_common(NAMED)),
        f"{kind}_modes": dict(Counter(h.mode for h in good).most_common(NAMED)),
        f"{kind}_sizes": dict(Counter(_times(h.size) for h in good).most_common(NAMED)),
    }


def _counts(numbers: Mapping[Any, int]) -> str:
    some = sorted(numbers.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{number} {name}" if len(some) > 1 else str(name) for name, number in some[:4])
    return shown + (f" and {len(some) - 4} others" if len(some) > 4 else "")


def _some(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _number(things: Any, what: str) -> str:
    return f"{len(things)} {what}{'' if len(things) == 1 else 's'}"


def _few(values: Sequence[int]) -> str:
    if len(values) > 4 and list(values) == list(range(values[0], values[-1] + 1)):
        return f"{values[0]} to {values[-1]}"
    return ", ".join(map(str, values[:8])) + (", …" if len(values) > 8 else "")


def _times(size: tuple[int, int]) -> str:
    return f"{size[0]}×{size[1]}"


def _percent(share: float) -> str:
    return f"{100 * share:.{0 if share >= 0.1 else 1 if share >= 0.01 else 2 if share >= 1e-4 else 4}f} %"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"


def _yaml(value: Any) -> str:
    """A setting as `--set` takes it, on one line."""
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
