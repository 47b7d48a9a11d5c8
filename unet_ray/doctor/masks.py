"""Checks the masks: which values are classes, and how often each occurs."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from unet_ray.config import MAX_CLASSES, locations
from unet_ray.doctor.class_lists import ClassList, class_list
from unet_ray.doctor.layouts import Way
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
FAR = 64
"""A value of 255 that is so far above all others is no class."""
MERGED = 4
"""Up to so many values without names may be parts of one class, as the border of a trimap is."""
MOST_COLOURS, LISTED, FEW_COLOURS = 64, 0.98, 8
"""The most colours that can be classes without a list of them; share of the pixels whose colours a list must name, and
the most colours that it may leave out."""
NEAR, APART, NEARLY_ALL = 16, 48, 0.9
"""How far the noise of JPEG moves a colour; how far apart the colours of two classes must be; which share of the rare
colours lies between two others if smoothing has made them."""
MAIN_SHARE, MAINLY = 0.002, 0.8
"""Share of the pixels that a class must have to be recognised by its colour; share near such colours."""
OBJECTS, SAME_NUMBER = 0.8, 0.7
"""If values number objects, each must be one region in this share of the masks, and fewer than the other share of them
may have the same number of objects."""
RARE_FILES, RARE_PIXELS, RARE_FOREGROUND, MUCH_FOREGROUND = 0.05, 0.0005, 0.01, 0.6
VOID_NAME = re.compile(r"void|ignore|unlabel|unknown|don'?t.?care", re.IGNORECASE)

NO_MASKS = {
    "mask-is-the-image": ("the image itself", "put the masks there: is --masks the right folder?"),
    "masks-in-colours": (
        "in colours",
        "all masks alike: each class in one colour, or class ids in a gray PNG",
    ),
    "floating-point-masks": (
        "with floating-point values",
        "store class ids as integers: `Image.fromarray((mask > 0.5).astype('uint8'))` for one class",
    ),
    "mask-values-beyond-16-bits": ("with values above 65535", "store class ids: 0, 1, 2, …"),
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
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings that say what the masks mean, if the values alone don't: dotted name -> value."""
    folders: list[str] = field(default_factory=list)
    """Folders of masks that are classes."""

    @property
    def count(self) -> int:
        """`model.num_classes`."""
        if self.folders:
            return len(self.folders) + 1
        number = len(self.settings.get("data.mask_colors") or self.settings.get("data.mask_values") or self.values)
        return number if number > 2 else 1


def classes(looks: Sequence[Look], way: Way, folders: Sequence[str]) -> tuple[Classes, list[Finding]]:
    """Finds what the masks mean: the values, colours or folders that are classes; and the problems with them.

    `folders`: those that are classes, if several masks are (`data.several_masks`).
    """
    if way.classes:
        known = ClassList(by_value=dict(enumerate(("background", *way.classes))))
    else:
        known = class_list([*locations(way.masks)])
    coloured = _colours(looks, known)
    if coloured is not None:
        return coloured
    findings = list(_no_masks(looks))
    looks, more, settings = _of_few_values([look for look in looks if look.counts])
    findings += more
    if not looks:
        return Classes(settings=settings), findings
    occurs = {value: [look.mask.name for look in looks if value in look.counts] for value in sorted(values_of(looks))}
    found = Classes(list(occurs), names=known.by_value, settings=settings, folders=[*folders])
    if folders:
        settings["data.mask_values"] = (0, ">0")
    if not settings:
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
    if settings:
        return found, findings
    if 2 < len(found.values) <= MERGED and not found.names:
        merged = ((found.values[0],), tuple(found.values[1:]))
        text = f"masks hold {few(found.values)}, taken for {len(found.values)} classes"
        findings += note("several-values", text, f"one foreground instead: {setting('data.mask_values', merged)}")
    return found, [*findings, *_alike(looks, found), *_balance(looks, found, occurs)]


def _colours(looks: Sequence[Look], known: ClassList) -> tuple[Classes, list[Finding]] | None:
    """Returns the classes of masks in colours, or whose palettes differ; None if the masks are neither."""
    in_colours = [look for look in looks if look.no_mask == "masks-in-colours"]
    in_gray = [look for look in looks if look.counts and set(look.counts) != {0} and not look.palette]
    differ = _palettes_differ(looks)
    if not differ and len(in_colours) <= len(in_gray):  # a few in colours among others are a mistake
        return None
    occurs: Counter[tuple[int, ...]] = Counter()
    for look in looks:
        gray = {(value,) * 3: count for value, count in look.counts.items()}
        occurs.update(look.colours or gray)
    listed = known.by_colour if sum(occurs[colour] for colour in known.by_colour) >= LISTED * occurs.total() else {}
    unlisted = [colour for colour in occurs if colour not in listed] if listed else []
    if len(unlisted) > FEW_COLOURS or (not listed and (len(occurs) > MOST_COLOURS or _are_mixed(occurs))):
        return _blurred(occurs, known) if 2 * len(in_colours) > len(looks) else None
    names = listed or dict.fromkeys(_ordered(occurs), "")
    void = [colour for colour, name in names.items() if VOID_NAME.search(name)]
    kept = [colour for colour in names if colour not in void]
    kept.sort(key=lambda colour: names[colour].lower() != "background")
    void += unlisted
    texts = tuple("#{:02x}{:02x}{:02x}".format(*colour) for colour in kept)
    ignored = tuple("#{:02x}{:02x}{:02x}".format(*colour) for colour in void)
    settings: dict[str, Any] = {"data.mask_colors": texts}
    if ignored:
        settings["data.ignore_index"] = ignored if len(ignored) > 1 else ignored[0]
    found = Classes(list(range(len(kept))), names=dict(enumerate(names[colour] for colour in kept)), settings=settings)
    pixels = [occurs[colour] for colour in kept]
    found.shares = {number: count / max(1, sum(pixels)) for number, count in enumerate(pixels)}
    what = "palettes that differ from file to file" if differ and not in_colours else "colours"
    source = f"the classes of {Path(known.file).name}" if listed else "one class for each"
    text = f"masks have {what}: {len(kept)}, {', '.join(texts[:8])}{', …' if len(texts) > 8 else ''}"
    findings = note("masks-in-colours", text, f"{setting('data.mask_colors', texts)}: {source}")
    if unlisted:
        text = f"{len(unlisted)} colours are in no class of {Path(known.file).name}: {', '.join(ignored[-5:])}"
        findings += warning("colours-of-no-class", text, "they are left out (data.ignore_index); else name their class")
    return found, findings


def _blurred(occurs: Counter[tuple[int, ...]], known: ClassList) -> tuple[Classes, list[Finding]] | None:
    """Returns the classes of masks whose colours JPEG or smoothing has mixed at the edges; None if they have no few
    main colours."""
    colours, counts = np.array([*occurs], np.int32), np.array([*occurs.values()])

    def pixels_near(main: tuple[int, ...]) -> np.ndarray:
        return np.abs(colours - main).max(axis=1) <= NEAR

    mains = [*known.by_colour] or _mains(occurs)
    near = np.any([pixels_near(main) for main in mains], axis=0) if mains else np.zeros(len(counts), bool)
    if not 1 < len(mains) <= MOST_COLOURS or counts[near].sum() < MAINLY * counts.sum():
        return None
    names = {colour: known.by_colour.get(colour, "") for colour in _ordered(Counter(dict.fromkeys(mains, 1)))}
    texts = tuple("#{:02x}{:02x}{:02x}".format(*colour) for colour in names)
    settings = {"data.mask_colors": texts, "data.mask_nearest": True}
    found = Classes(list(range(len(names))), names=dict(enumerate(names.values())), settings=settings)
    shares = [float(counts[pixels_near(colour)].sum() / counts[near].sum()) for colour in names]
    found.shares = dict(enumerate(shares))
    text = f"masks have {len(occurs)} colours, as JPEG or smoothing makes of {len(names)}: {', '.join(texts[:8])}"
    remedy = f"{setting('data.mask_colors', texts)} --set data.mask_nearest=true takes the nearest of them"
    return found, warning("masks-in-blurred-colours", text, remedy)


def _are_mixed(occurs: Counter[tuple[int, ...]]) -> bool:
    """Returns whether nearly all rare colours lie between two main ones, as smoothing makes them."""
    mains = np.array(_mains(occurs), np.float64)
    rare = np.array([each for each in occurs if np.abs(mains - each).max(axis=1).min() > NEAR], np.float64)
    if len(rare) <= FEW_COLOURS or len(mains) < 2:
        return False
    between = np.zeros(len(rare), bool)
    for one, other in itertools.combinations(mains, 2):
        along = other - one
        place = ((rare - one) @ along / (along @ along)).clip(0, 1)
        between |= np.abs(one + place[:, None] * along - rare).max(axis=1) <= NEAR / 2
    return bool(between.mean() >= NEARLY_ALL)


def _mains(occurs: Counter[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Returns the colours of many pixels that are far from each other, the most frequent first."""
    mains: list[tuple[int, ...]] = []
    for colour, count in occurs.most_common():
        if count < MAIN_SHARE * occurs.total():
            break
        if all(max(abs(one - other) for one, other in zip(colour, main, strict=True)) > APART for main in mains):
            mains.append(colour)
    return mains


def _palettes_differ(looks: Sequence[Look]) -> bool:
    """Returns whether an index has different colours in different masks."""
    colour_of: dict[int, tuple[int, ...]] = {}
    return any(
        colour_of.setdefault(index, colour) != colour for look in looks for index, colour in look.palette.items()
    )


def _ordered(occurs: Counter[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Returns the colours with the background first: black if it occurs, or else the most frequent one."""
    background = (0, 0, 0) if (0, 0, 0) in occurs else occurs.most_common(1)[0][0]
    return [background, *sorted(colour for colour in occurs if colour != background)]


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


def _of_few_values(looks: list[Look]) -> tuple[list[Look], list[Finding], dict[str, Any]]:
    """Returns the masks whose values can be classes, findings about the others, and settings that make classes of many
    values."""
    if not looks:
        return looks, [], {}
    if _number_objects(looks):
        highest = max(max(look.counts) for look in looks)
        text = f"masks number their objects, up to {highest} in one"
        remedy = (
            f"{setting('data.mask_values', (0, '>0'))} makes all of them foreground; "
            "--set train.border_weight=10 parts objects that touch"
        )
        return looks, note("masks-number-objects", text, remedy), {"data.mask_values": (0, ">0")}
    many = len(values_of(looks)) > MANY_VALUES
    between = [look for look in looks if (many or look.mask.format in ("JPEG", "MPO")) and _in_between(look.counts)]
    rest = [look for look in looks if look not in between]
    values = sorted(values_of(rest))
    too_many = len(values) > MAX_CLASSES or (rest and np.median([len(look.counts) for look in rest]) > TOO_MANY_VALUES)
    if too_many and len(between) < len(rest):  # photographs, some of which are mostly dark and bright
        rest, between, values = looks, [], sorted(values_of(looks))
    if between and not too_many and _black_and_white(between, rest):
        text = f"{number(between, 'mask')} with values between black and white, as JPEG or smoothing makes"
        settings = {"data.mask_values": (0, ">=128")}
        remedy = f"{setting('data.mask_values', settings['data.mask_values'])} parts them in the middle"
        return looks, note("masks-with-in-between-values", text, remedy, _named(between)), settings
    text = f"{number(between, 'mask')} with values between the classes, as JPEG or resizing makes"
    remedy = "save PNGs of class values alone, or name ranges: --set data.mask_values=\"['<64', '<128', '>=128']\""
    findings = error(
        "masks-with-in-between-values", f"{text} ({len(values_of(between))} values)", remedy, _named(between)
    )
    if too_many:
        text = f"masks hold {len(values)} values ({few(values)})"
        remedy = f"a class is one value, and at most {MAX_CLASSES} can be: are these masks?"
        return [], findings + error("too-many-mask-values", text, remedy, _named(rest)), {}
    return rest, findings, {}


def _number_objects(looks: Sequence[Look]) -> bool:
    """Returns whether the values are numbers of objects: each is one region, and masks have different numbers of them.

    Classes are in one region, too, where each is one organ; but then most masks have the same.
    """
    known = [look for look in looks if look.numbers_objects is not None]
    tops = [max(look.counts) for look in known]
    alike = sum(bool(look.numbers_objects) for look in known)
    most_often = Counter(tops).most_common(1)[0][1] if tops else 0
    return alike >= OBJECTS * len(known) and most_often < SAME_NUMBER * len(known)


def _black_and_white(between: Sequence[Look], rest: Sequence[Look]) -> bool:
    """Returns whether masks with values in between have two main values, near 0 and 255."""
    for look in between:
        dark = sum(count for value, count in look.counts.items() if value < 64)
        bright = sum(count for value, count in look.counts.items() if value >= 192)
        if dark + bright < 0.8 * sum(look.counts.values()) or max(look.counts) < 192:
            return False
    return values_of(rest) <= {*range(16), *range(240, 256)}


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


def _void(found: Classes, looks: Sequence[Look], occurs: Mapping[int, Sequence[str]]) -> list[Finding]:
    """Removes from the classes the value of pixels to leave out, or the rarer of two values for foreground."""
    values = found.values
    if len(values) < 3:
        return []
    void = [value for value in values if value < 0 or VOID_NAME.search(found.names.get(value, ""))]
    if len(void) == 1:
        found.ignore = void[0]
        name = found.names.get(void[0])
        text = f"the list of classes calls value {void[0]} {name!r}" if name else f"value {void[0]} can be no class"
    elif values == [0, 1, VOID] and not any({1, VOID} <= look.counts.keys() for look in looks):
        fewer = min(1, VOID, key=lambda value: len(occurs[value]))
        values.remove(fewer)
        text = f"{len(occurs[1])} masks hold 0 and 1, {len(occurs[VOID])} hold 0 and 255"
        return error("mask-values-differ", text, "write them alike, all 0 and 255 or all 0 and 1", occurs[fewer])
    elif values[-1] == VOID and values[-2] < VOID - FAR and _is_void(looks, values):
        found.ignore = VOID
        text = f"value 255 stands apart from the others ({few(values[:-1])}), as a mark for pixels to leave out"
    else:
        return []
    values.remove(found.ignore)
    remedy = f"{setting('data.ignore_index', found.ignore)} leaves its pixels out; if it is a class, omit this setting"
    return note("ignore-value", text, remedy)


def _is_void(looks: Sequence[Look], values: Sequence[int]) -> bool:
    """Returns whether 255 marks pixels to leave out: beside a few ids, or on fewer pixels than several ids have."""
    if values[-2] <= len(values) + 1:
        return True
    pixels = [sum(look.counts.get(value, 0) for look in looks) for value in values[1:]]
    return len(values) > 3 and pixels[-1] < sum(pixels[:-1])


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
    gaps = [value for value in range(values[0], values[-1]) if value not in occurs] if len(values) > 2 else []
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
