"""Matches images with their masks by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from unet_ray.config import UserError
from unet_ray.data.inputs import ImageFile, find_images, listing

MASK_SUFFIX = "_mask"


@dataclass(frozen=True, slots=True)
class Pair:
    """One image and its mask."""

    key: str
    image: str
    mask: str


@dataclass(frozen=True, slots=True)
class Matches:
    """Pairs of images and masks, and the files that can't be paired."""

    pairs: list[Pair]
    """Images with exactly one mask and a key that no other image has, sorted by key."""
    twice: list[str]
    """Keys that several images share, so that their masks can't be told apart."""
    ambiguous: dict[str, list[str]]
    """Key of an image with several masks -> their paths."""
    missing: list[ImageFile]
    """Images without a mask."""
    orphans: list[ImageFile]
    """Masks without an image."""


def match_pairs(images: Sequence[ImageFile], masks: Sequence[ImageFile], *, one_folder: bool = False) -> Matches:
    """Matches images and masks by name, see `find_pairs`. In one folder, names of masks end in `MASK_SUFFIX`."""
    if one_folder:
        images = [image for image in images if not image.key.endswith(MASK_SUFFIX)]
        masks = [mask for mask in masks if mask.key.endswith(MASK_SUFFIX)]
    twice = {key: count for key, count in Counter(image.key for image in images).items() if count > 1}
    keys = {image.key for image in images}
    masks_of: dict[str, list[str]] = {}
    orphans = []
    for mask in masks:
        # Try the whole name first: x_mask.png belongs to an image x_mask.jpg if there is one, otherwise to x.jpg.
        key = next((key for key in (mask.key, mask.key.removesuffix(MASK_SUFFIX)) if key in keys), None)
        if key is None:
            orphans.append(mask)
        else:
            masks_of.setdefault(key, []).append(mask.path)
    ambiguous = {key: found for key, found in masks_of.items() if len(found) > 1}
    pairs = [
        Pair(image.key, image.path, masks_of[image.key][0])
        for image in images
        if image.key in masks_of and image.key not in ambiguous and image.key not in twice
    ]
    return Matches(pairs, list(twice), ambiguous, [i for i in images if i.key not in masks_of], orphans)


def find_pairs(images_folder: str, masks_folder: str) -> list[Pair]:
    """Pairs each image with the mask of the same relative path and stem (`car.jpg`: `car.png` or `car_mask.gif`).

    Sorted by key. Both may be in one folder. Names match exactly: `train1` is never `train10`. Raises UserError that
    lists images without a mask, masks without an image, and images with several masks.
    """
    images, masks = find_images(images_folder), find_images(masks_folder)
    found = match_pairs(images, masks, one_folder=images_folder == masks_folder)
    if found.twice:
        raise UserError(
            f"{images_folder}: {listing(found.twice)}: two images of the same name but for the extension, "
            "so their masks can't be told apart; rename one"
        )
    if found.ambiguous:
        some = list(found.ambiguous.items())[:3]
        names = "; ".join(f"{key}: {', '.join(PurePosixPath(p).name for p in paths)}" for key, paths in some)
        raise UserError(f"{masks_folder}: {len(found.ambiguous)} image(s) with two masks ({names}): keep one each")
    if found.missing:
        raise UserError(
            f"{masks_folder}: no mask for {listing([image.name for image in found.missing])}: a mask has its image's "
            f"relative path and stem, with or without {MASK_SUFFIX}"
        )
    if found.orphans:
        raise UserError(
            f"{images_folder}: no image for the mask(s) {listing([mask.name for mask in found.orphans])}: "
            "add the images or move the masks"
        )
    return found.pairs
