"""Checks the masks: which values are classes, and how often each occurs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from unet_ray.config import MAX_CLASSES
from unet_ray.data import storage
from unet_ray.doctor.pixels import Look, values_of
from unet_ray.doctor.report import Finding, error, note, warning
from unet_ray.doctor.words import few, number, percent, setting

MANY_VALUES, TOO_MANY_VALUES = 32, 64
"""If the masks together have more values than the first, they are checked for values in between. If the median mask
has more than the second, they are no masks."""
TWO_VALUES = 0.43
"""If a larger share of a mask's pixels is within 2 of its two main values, its other values lie between classes.
Measured: 0.46 or more for thin membranes scaled from a fifth of the size, 0.8 for JPEGs of quality 30, 0.40 or less for
photographs."""
VOID = 255
"""Most data sets mark pixels to leave out with this value."""
RARE_FILES, RARE_PIXELS, RARE_FOREGROUND, MUCH_FOREGROUND = 0.05, 0.0005, 0.01, 0.6
LISTS = ("classes.txt", "labels.txt", "class_names.txt")
VOID_NAME = re.compile(r"void|ignore|unlabel|unknown|don'?t.?care", re.IGNORECASE)

NO_MASKS = {
    "mask-is-the-image": ("the image itself", "put the masks there: is --masks the right folder?"),
    "masks-in-colours": (
        "in colours",
        "store class ids, one for each colour, as a gray or a palette PNG; then --set model.num_classes=K",
    ),
    "floating-point-masks": (
        "with floating-point values",
        "store class ids as integers: `Image.fromarray((mask > 0.5).astype('uint8'))` for one class",
    ),
    "mask-values-beyond-16-bits": ("with values below 0 or above 65535", "store class ids: 0, 1, 2, …"),
}
"""`Look.no_mask` -> text and remedy."""


@dataclass(slots=True)
class Classes:
    """The stored values that are classes."""

    values: list[int] = field(default_factory=list)
    shares: dict[int, float] = field(default_factory=dict)
    """Value -> share of the pixels."""
    ignore: int | None = None
    """The value of pixels to leave out."""
    names: dict[int, str] = field(default_factory=dict)
    """Value -> name, from a list of classes beside the masks."""


def classes(looks: Sequence[Look], masks_at: str | None) -> tuple[Classes, list[Finding]]:
    """Finds the values of the masks that are classes, and the problems with them."""
    findings = list(_no_masks(looks))
    looks, more = _of_few_values([look for look in looks if look.counts])
    findings += more
    if not looks:
        return Classes(), findings
    occurs = {value: [look.mask.name for look in looks if value in look.counts] for value in sorted(values_of(looks))}
    found = Classes(list(occurs), names=_names(masks_at))
    findings += _void(found, looks, occurs)
    findings += _strange(found, looks, occurs)
    pixels = {value: sum(look.counts.get(value, 0) for look in looks) for value in found.values}
    found.shares = {value: count / max(1, sum(pixels.values())) for value, count in pixels.items()}
    if found.values == [0, 255]:
        remedy = "they are read as background and foreground: nothing to convert"
        findings += note("masks-0-255", "masks hold 0 and 255", remedy)
    if any(look.mask.mode == "P" for look in looks):
        text = f"masks have a palette and hold its indices {few(found.values)}"
        remedy = "the indices are the classes, whatever their colours: nothing to convert"
        findings += note("palette-masks", text, remedy)
    return found, [*findings, *_alike(looks, found), *_balance(looks, found, occurs)]


def _named(looks: Iterable[Look]) -> list[str]:
    return [look.mask.name for look in looks]


def _no_masks(looks: Sequence[Look]) -> Iterator[Finding]:
    """Finds masks whose pixels can't be class values."""
    for code, (what, remedy) in NO_MASKS.items():
        some = [look for look in looks if look.no_mask == code]
        colours: Counter[tuple[int, ...]] = Counter()
        for look in some:
            colours.update(look.colours)
        if code == "masks-in-colours":
            shown = ", ".join("#{:02x}{:02x}{:02x}".format(*colour) for colour, _ in colours.most_common(8))
            what += f" ({len(colours)}: {shown}{', …' if len(colours) > 8 else ''})"
        yield from error(code, f"{number(some, 'mask')} {what}", remedy, _named(some))


def _of_few_values(looks: list[Look]) -> tuple[list[Look], list[Finding]]:
    """Returns the masks whose values can be classes, and findings about the others."""
    if not looks:
        return looks, []
    many = len(values_of(looks)) > MANY_VALUES
    highest = [max(look.counts) for look in looks]
    counted = all(len(look.counts) >= 0.9 * (top + 1) for look, top in zip(looks, highest, strict=True))
    if many and counted and max(highest) > 1.5 * min(highest):
        text = f"masks number their objects, up to {max(highest)} in one"
        remedy = "a class is one value: for one, save mask > 0; --set train.border_weight=10 parts objects that touch"
        return [], error("masks-number-objects", text, remedy, _named(looks))
    between = [look for look in looks if (many or look.mask.format in ("JPEG", "MPO")) and _in_between(look.counts)]
    rest = [look for look in looks if look not in between]
    values = sorted(values_of(rest))
    too_many = len(values) > MAX_CLASSES or (rest and np.median([len(look.counts) for look in rest]) > TOO_MANY_VALUES)
    if too_many and len(between) < len(rest):  # photographs, some of which are mostly dark and bright
        rest, between, values = looks, [], sorted(values_of(looks))
    text = f"{number(between, 'mask')} with values between the classes, as JPEG or resizing makes"
    remedy = "save PNGs of class values alone; for one: `Image.open(f).convert('L').point(lambda v: 255 * (v > 127))`"
    findings = error(
        "masks-with-in-between-values", f"{text} ({len(values_of(between))} values)", remedy, _named(between)
    )
    if too_many:
        text = f"masks hold {len(values)} values ({few(values)})"
        remedy = f"a class is one value, and at most {MAX_CLASSES} can be: are these masks?"
        return [], findings + error("too-many-mask-values", text, remedy, _named(rest))
    return rest, findings


def _in_between(counts: Mapping[int, int]) -> bool:
    """Returns whether most of a mask is close to two values that are far apart, and other pixels lie between them."""
    first = max(counts, key=lambda value: counts[value])
    far = {value: count for value, count in counts.items() if abs(value - first) >= MANY_VALUES}
    if not far:
        return False
    second = max(far, key=lambda value: far[value])
    near = [value for value in counts if min(abs(value - first), abs(value - second)) <= 2]
    between = [value for value in counts if min(first, second) < value < max(first, second)]
    return len(between) > 1 and sum(counts[value] for value in near) > TWO_VALUES * sum(counts.values())


def _names(masks_at: str | None) -> dict[int, str]:
    """Returns value -> name, from a list of classes beside the masks; empty if there is none."""
    if masks_at is None or storage.is_uri(masks_at):
        return {}
    for path in (folder / name for folder in (Path(masks_at), Path(masks_at).parent) for name in LISTS):
        if path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            found = re.findall(r"^\s*(\d+)[\s,;:=]+(\S.*?)\s*$", text, re.MULTILINE)
            return {int(value): name for value, name in found}
    return {}


def _void(found: Classes, looks: Sequence[Look], occurs: Mapping[int, Sequence[str]]) -> list[Finding]:
    """Removes from the classes the value of pixels to leave out, or the rarer of two values for foreground."""
    values = found.values
    if len(values) < 3:
        return []
    void = [value for value in values if VOID_NAME.search(found.names.get(value, ""))]
    if len(void) == 1:
        found.ignore = void[0]
        text = f"the list of classes calls value {void[0]} {found.names[void[0]]!r}"
    elif values == [0, 1, VOID] and not any({1, VOID} <= look.counts.keys() for look in looks):
        fewer = min(1, VOID, key=lambda value: len(occurs[value]))
        values.remove(fewer)
        text = f"{len(occurs[1])} masks hold 0 and 1, {len(occurs[VOID])} hold 0 and 255"
        return error("mask-values-differ", text, "write them alike, all 0 and 255 or all 0 and 1", occurs[fewer])
    elif values[-1] == VOID and values[-2] <= len(values) + 1:
        found.ignore = VOID
        text = f"value 255 stands apart from the others ({few(values[:-1])}), as a mark for pixels to leave out"
    else:
        return []
    values.remove(found.ignore)
    remedy = f"{setting('data.ignore_index', found.ignore)} leaves its pixels out; if it is a class, omit this setting"
    return note("ignore-value", text, remedy)


def _strange(found: Classes, looks: Sequence[Look], occurs: Mapping[int, Sequence[str]]) -> Iterator[Finding]:
    """Removes from the classes a single value that seems to be a mistake. Reports values that seem to be missing."""
    values = found.values

    def by_mistake(value: int) -> bool:
        rest = [other for other in values if other != value]
        seldom = len(occurs[value]) <= max(1, RARE_FILES * len(looks)) < len(looks) / 4
        return seldom and (len(rest) == 2 or (rest == list(range(len(rest))) and value > len(rest)))

    strange = [value for value in values if by_mistake(value)]
    if len(strange) == 1:
        (value,) = strange
        values.remove(value)
        text = f"value {value}, beside {few(values)} elsewhere, occurs in {number(occurs[value], 'mask')} only"
        remedy = f"repair them, or leave the value out: {setting('data.ignore_index', value)}"
        yield from error("unexpected-mask-value", text, remedy, occurs[value])
    gaps = [value for value in range(values[-1]) if value not in occurs] if len(values) > 2 else []
    if gaps and len(gaps) <= max(1, len(values) // 3):
        text = f"value {few(gaps)} lies between the others ({few(values)}) and is in no sampled mask"
        remedy = f"if there is no such class: {setting('data.mask_values', values)}; otherwise add images with it"
        yield from warning("class-never-occurs", text, remedy)


def _alike(looks: Sequence[Look], found: Classes) -> Iterator[Finding]:
    """Finds empty, full and identical masks."""
    names, values = _named(looks), found.values
    if len(values) == 1:
        code, text = ("all-masks-empty", "empty") if values[0] == 0 else ("all-masks-full", f"{values[0]} all over")
        remedy = "check how they were saved (ids 0 and 1 divided by 255 become 0), and whether --masks is right"
        yield from error(code, f"all of {number(names, 'mask')} are {text}: there is one class only", remedy, names)
    elif len(looks) > 2 and len({look.mask_digest for look in looks}) == 1:
        text = f"all {len(looks)} sampled masks are the same picture"
        remedy = "a mask belongs to its image: check how they were exported"
        yield from warning("masks-all-alike", text, remedy, names)
    elif len(values) == 2:
        empty, full = (_named(look for look in looks if set(look.counts) == {value}) for value in values)
        text = f"{len(empty)} of {number(names, 'sampled mask')} are empty"
        remedy = "right where there is nothing to find; otherwise their labels are missing"
        if 2 * len(empty) > len(looks):
            remedy += "; with so many of them a network learns to find nothing: leave some out"
            yield from warning("mostly-empty-masks", text, remedy, empty)
        else:
            yield from note("empty-masks", text, remedy, empty)
        remedy = "check whether they are inverted or were filled by mistake"
        yield from warning("full-masks", f"{number(full, 'mask')} foreground all over", remedy, full)


def _balance(looks: Sequence[Look], found: Classes, occurs: Mapping[int, Sequence[str]]) -> Iterator[Finding]:
    """Finds classes of few pixels, or in few masks."""
    values, shares = found.values, found.shares
    if len(values) == 2 and shares[values[1]] < RARE_FOREGROUND:
        text = f"the foreground is {percent(shares[values[1]])} of the pixels"
        remedy = "keep it visible: a larger --image-size with --set data.tile; perhaps --set train.loss=focal+tversky"
        yield from warning("little-foreground", text, remedy)
    elif len(values) == 2 and shares[values[1]] > MUCH_FOREGROUND:
        text = f"value {values[1]} is the foreground and {percent(shares[values[1]])} of the pixels"
        remedy = f"if the other value is to be found: {setting('data.mask_values', values[::-1])}"
        yield from note("mostly-foreground", text, remedy)
    for value in values if len(values) > 2 else ():
        names = occurs[value]
        if shares[value] < RARE_PIXELS or len(names) < 0.01 * len(looks) or (len(names) == 1 and len(looks) > 9):
            text = f"value {value} is {percent(shares[value])} of the pixels, in {len(names)} of {len(looks)} masks"
            remedy = "add images that show it; --set train.class_weights=inverse; hold some out: --set data.val_groups"
            yield from warning("rare-class", text, remedy, names)
