"""Examines annotations that take the place of masks: which classes there are, and which images have none."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from unet_ray.config import DataConfig, UserError
from unet_ray.data import storage
from unet_ray.data.annotations import sources
from unet_ray.data.annotations.sources import BACKGROUND, Source
from unet_ray.data.inputs import ImageFile
from unet_ray.data.pairs import Matches, annotated_matches
from unet_ray.doctor.layouts import Found, Way
from unet_ray.doctor.report import Finding, error, note, warning
from unet_ray.doctor.words import number


def find_annotations(images_at: str, masks_at: str | None) -> Source | None:
    """Returns the annotations where masks were looked for, or beside them."""
    for location in dict.fromkeys((masks_at or images_at, images_at)):
        if (source := sources.recognised(location)) is not None:
            return source
    return None


def pair_annotations(images_at: str, source: Source, images: Sequence[ImageFile]) -> tuple[Found, list[Finding]]:
    """Pairs the images with their annotations, in all classes. Returns the findings, too."""
    names, _ = sources.class_names(source)
    names = [name for name in names if name.lower() not in BACKGROUND]
    classes = ("background", *names) if len(names) > 1 else ()
    way = Way(images_at, source.location, classes=tuple(names) if len(names) > 1 else ())
    findings: list[Finding] = []
    try:
        paired = sources.paired(source, images, DataConfig(classes=classes))
        if paired.covered:
            text = f"{paired.covered} shapes lie under later ones of another class"
            findings += warning("covered-shapes", text, "--overlap-order area shows the smaller of two")
            way = dataclasses.replace(way, by_area=True)
            paired = sources.paired(source, images, DataConfig(classes=classes, overlap_order="area"))
    except UserError as problem:
        return Found(way, [*images], [], Matches([], [], {}, [*images], [])), error(
            "annotations-cannot-be-read", str(problem), "a training would stop at it"
        )
    matches = annotated_matches(images, paired.masks, paired.orphans)
    masks = [ImageFile(each.key, each.mask, f"{each.key}.png", 1, 0) for each in matches.pairs]
    shown = ", ".join(f"{count} {label}" for label, count in paired.labels.most_common(8)) or "no shape"
    place = storage.without_secrets(source.location)
    text = f"{place} is {source.kind}, with {number(matches.pairs, 'annotated image')}: {shown}"
    remedy = "shapes are drawn as masks; --classes picks and orders the classes" if classes else "drawn as masks"
    return Found(way, [*images], masks, matches), [*note("annotations", text, remedy), *findings]
