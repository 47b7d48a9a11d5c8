"""Finds images that are turned by their EXIF orientation while their masks are not, and shows one."""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from unet_ray.data import imaging, mask_files, pictures
from unet_ray.data.imaging import ImageError
from unet_ray.data.pairs import Pair
from unet_ray.doctor.files import Header
from unet_ray.doctor.report import Finding, error, warning
from unet_ray.doctor.words import number

SIDE = 512
SET = "--set data.mask_turn=true"


def turned_pairs(pairs: Sequence[Pair], headers: Mapping[str, Header]) -> tuple[bool, list[Finding]]:
    """Returns whether to turn the masks (`data.mask_turn`), and the findings.

    The size of a mask tells how it was drawn if the orientation swaps width and height; else nothing does.
    """
    as_stored, as_shown, unknown = [], [], []
    for pair in pairs:
        image, mask = headers[pair.image], headers[mask_files.first_file(pair.mask)]
        if image.orientation > 1 >= mask.orientation:
            if image.stored == image.size:
                unknown.append(pair)
            elif mask.size == image.stored:
                as_stored.append(mask.name)
            else:
                as_shown.append(mask.name)
    if as_stored and as_shown:
        text = f"{number(as_stored, 'mask')} drawn on images as they are stored, and {len(as_shown)} as they are shown"
        remedy = "turn them alike: `mogrify -auto-orient` turns the images, or `exiftool -Orientation=` removes the tag"
        return False, error("mask-not-turned-like-its-image", text, remedy, as_stored)
    if as_stored:
        text = f"{number(as_stored, 'image')} turned by EXIF orientation, while the mask is not turned"
        return True, warning("mask-not-turned-like-its-image", text, f"{SET} turns each mask like its image", as_stored)
    if as_shown or not unknown:
        return False, []
    names = [headers[pair.image].name for pair in unknown]
    text = f"{number(names, 'image')} turned or mirrored by EXIF, and sizes don't tell if the masks are, too"
    place = _shown(unknown[0])
    look = f"look at {place}, where the left half is what is trained on: " if place else ""
    return False, warning(
        "turned-by-exif", text, f"{look}if masks were drawn on images as they are stored, {SET}", names
    )


def _shown(pair: Pair) -> str:
    """Draws a pair, with the mask as it is and turned like its image. Returns the picture's path; empty: it can't."""
    try:
        data = imaging.read_file(pair.image)
        image, size_hw = imaging.decode_image(data, 3, None, value_range=None)
        ids = (imaging.stored_values(imaging.read_file(mask_files.first_file(pair.mask))) > 0).astype(np.uint8)
        small = imaging.fitted(size_hw, SIDE)
        picture = np.asarray(Image.fromarray(image).resize(small[::-1]))
        halves = [pictures.overlay(picture, mask, 1) for mask in (ids, imaging.turned(ids, imaging.orientation(data)))]
        both = np.hstack([np.asarray(Image.open(io.BytesIO(half))) for half in halves])
        name = hashlib.sha256(pair.image.encode("utf-8", "surrogateescape")).hexdigest()[:8]
        path = Path(tempfile.gettempdir(), f"unet-ray-doctor-{name}.png")
        Image.fromarray(both).save(path)
    except (OSError, ImageError):
        return ""
    return str(path)
