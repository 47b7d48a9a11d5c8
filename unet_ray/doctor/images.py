"""Checks the images: their kinds, channels, values and sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from unet_ray.config import DataConfig, ValueRange
from unet_ray.data import mask_files
from unet_ray.data.darkness import NEARLY_BLACK
from unet_ray.data.imaging import problem_of_sizes
from unet_ray.data.pairs import Pair
from unet_ray.doctor.files import Header
from unet_ray.doctor.pixels import Look
from unet_ray.doctor.report import Finding, error, note, warning
from unet_ray.doctor.words import few, number, setting, times

TINY, DIFFER_AREA, DIFFER_ASPECT = 32, 16, 3
SPREAD = 4
"""Images whose brightest values differ by more than this factor have no common range."""
DARK_16_BIT = 2**14


def kinds(headers: Sequence[Header]) -> Iterator[Finding]:
    """Reports formats and modes that are handled specially."""

    def those(test: Callable[[Header], bool]) -> list[str]:
        return [header.name for header in headers if test(header)]

    names = those(lambda h: h.mode in ("RGBA", "LA", "PA") and not h.volumes)
    remedy = "dropped; if it is data, keep it with --set model.in_channels=4"
    yield from note("alpha-channel", f"{number(names, 'image')} with an alpha channel", remedy, names)
    names = those(lambda h: h.mode == "CMYK")
    yield from note("cmyk-images", f"{number(names, 'image')} in CMYK", "read as RGB: nothing to convert", names)
    names = those(lambda h: h.mode in ("P", "PA"))
    yield from note("palette-images", f"{number(names, 'image')} with a palette", "read as their colours", names)
    names = those(lambda h: h.frames > 1 and h.format != "TIFF")
    yield from note("animations", f"{number(names, 'image')} with several frames", "the first frame is taken", names)
    gray = those(lambda h: h.channels < 3 and not h.array)
    colour = those(lambda h: h.channels > 2 and not h.array)
    text = f"{len(gray)} gray images among {len(colour)} in colour"
    remedy = "all are read as RGB; --set model.in_channels=1 reads all as gray"
    yield from note("gray-and-colour", text, remedy, min(gray, colour, key=len))


def channels(headers: Sequence[Header], looks: Sequence[Look]) -> tuple[int, list[Finding]]:
    """Chooses `model.in_channels`, and reports problems."""
    volumes = Counter(header.volumes for header in headers)
    if headers and not volumes[()] and len(volumes) == 1:
        [names] = volumes
        text = f"slices of volumes, with a channel for each: {', '.join(names)}"
        return len(names), note(
            "slices-of-volumes", text, f"read as they are: {setting('model.in_channels', len(names))}"
        )
    arrays = Counter(header.channels for header in headers if header.array)
    if arrays:
        wanted = arrays.most_common(1)[0][0]
        odd = [h.name for h in headers if (h.channels != wanted if h.array else wanted > 4)]
        text = f"{number(odd, 'image')} with another number of channels than the other arrays' {wanted}"
        remedy = "a network takes one number of channels: make them alike, or sort them into two folders"
        return wanted, error("channels-differ", text, remedy, odd)
    if headers and all(header.channels < 3 for header in headers):
        return 1, []
    if not looks or not all(look.gray for look in looks):
        return 3, []
    text = "the images are stored in colour, but the sampled ones are gray"
    remedy = "--set model.in_channels=1 reads them as gray; leave it out if the images to come have colour"
    return 1, note("gray-in-colour-files", text, remedy)


def value_range(looks: Sequence[Look]) -> tuple[ValueRange, list[Finding]]:
    """Chooses `data.value_range`, and reports problems."""
    ranges = {look.image.name: look.range for look in looks if look.range is not None}
    if not ranges:
        return _range_of_8_bits([look for look in looks if not look.constant])
    names = list(ranges)
    floats = any(look.image.depth == "float" for look in looks)
    low, high = min(low for low, _ in ranges.values()), max(high for _, high in ranges.values())
    other = floats or low < 0 or high > 65535
    spread = f"most values lie between {low:.4g} and {high:.4g}"
    if not other and high >= DARK_16_BIT:
        text = f"{number(names, 'sampled image')} of 16 bits ({spread})"
        remedy = "the upper 8 bits are taken; --set data.value_range=percentiles stretches each image by itself"
        return None, note("images-16-bit", text, remedy, names)
    found: ValueRange
    if high > SPREAD * max(1e-9, min(high for _, high in ranges.values())) or high <= low:
        found = "percentiles"
    elif other:
        found = (float(f"{low:.4g}"), float(f"{high:.4g}"))
    else:
        found = (0.0, float(2 ** int(np.ceil(np.log2(high + 1))) - 1))
    remedy = f"set black and white: {setting('data.value_range', found)} (or percentiles: of each image by itself)"
    if floats:
        text = f"{number(names, 'sampled image')} with floating-point pixels ({spread})"
        return found, warning("floating-point-images", text, remedy, names)
    text = f"{number(names, 'sampled image')} of 16 bits and more, of which the upper 8 keep little ({spread})"
    return found, warning("dark-16-bit-images", text, remedy, names)


def _range_of_8_bits(looks: Sequence[Look]) -> tuple[ValueRange, list[Finding]]:
    top = max((max(look.highest) for look in looks), default=255)
    if top >= NEARLY_BLACK:
        return None, []
    text = f"no pixel of the sampled images is above {top} of 255: they may have been divided by 255, or hold ids"
    remedy = f"{setting('data.value_range', [0, top])} makes {top} white; or store them anew"
    return (0.0, float(top)), warning("images-nearly-black", text, remedy, [look.image.name for look in looks])


def sizes(headers: Sequence[Header]) -> Iterator[Finding]:
    tiny = [header.name for header in headers if min(header.size) < TINY]
    text = f"{number(tiny, 'image')} of less than {TINY} pixels a side"
    yield from warning("tiny-images", text, "thumbnails? Find the originals, or remove them", tiny)
    areas = sorted((header.size[0] * header.size[1], header.name, header.size) for header in headers)
    aspects = sorted((header.size[0] / header.size[1], header.name, header.size) for header in headers)
    for ordered, factor in ((areas, DIFFER_AREA), (aspects, DIFFER_ASPECT)):
        if ordered and ordered[-1][0] >= factor * ordered[0][0]:
            (_, least, small), (_, most, large) = ordered[0], ordered[-1]
            text = f"sizes differ widely, from {times(small)} to {times(large)}"
            remedy = "all are resized to --image-size; if objects have one size in pixels, cut images into tiles first"
            yield from note("sizes-differ-widely", text, remedy, [least, most])
            break


def sizes_of_pairs(pairs: Sequence[Pair], headers: Mapping[str, Header]) -> tuple[bool, list[Finding]]:
    """Finds masks whose size differs from their image's. Returns whether to resize masks (`data.mask_resize`), and the
    findings. What an EXIF orientation explains is for `turned_pairs`."""
    other, scaled, example = [], [], ""
    for pair in pairs:
        image, mask = headers[pair.image], headers[mask_files.first_file(pair.mask)]
        if image.orientation > 1 >= mask.orientation and mask.size == image.stored:
            continue
        if problem_of_sizes(image.size[::-1], mask.size[::-1], DataConfig(mask_resize=True)):
            other.append(mask.name)
            example = f"{times(mask.size)} for an image of {times(image.size)}"
        elif image.size != mask.size:
            scaled.append(mask.name)
            example = example or f"{times(mask.size)} for an image of {times(image.size)}"
    text = f"{number(other, 'mask')} of another size than the image, such as {example}"
    remedy = "resize them to their images' size by nearest neighbour, or find the images they were drawn on"
    findings = error("mask-of-another-size", text, remedy, other)
    text = f"{number(scaled, 'mask')} larger or smaller than the image, in its proportions, such as {example}"
    level = note if 2 * len(scaled) > len(pairs) else warning
    findings += level("mask-of-another-scale", text, "--set data.mask_resize=true resizes them", scaled)
    return bool(scaled), findings


def constants(looks: Sequence[Look]) -> Iterator[Finding]:
    """Finds images of a single colour, and channels with the same value in all images."""
    flat = [look.image.name for look in looks if look.constant]
    remedy = "nothing can be learned from them: find the originals, or remove them with their masks"
    yield from warning("constant-images", f"{number(flat, 'image')} of a single colour", remedy, flat)
    rest = [look for look in looks if not look.constant]
    if len({len(look.highest) for look in rest}) != 1:
        return
    every = np.array([(look.lowest, look.highest) for look in rest])  # [N,2,C]
    still = np.flatnonzero(np.ptp(every, axis=(0, 1)) == 0).tolist()
    if 0 < len(still) < every.shape[2]:
        text = f"channel {few(still)} (the first is 0) has the same value in every pixel of the sampled images"
        remedy = "if intended, leave it; otherwise export them again (or one channel: --set model.in_channels=1)"
        yield from warning("constant-channel", text, remedy, [look.image.name for look in rest])
