"""The real sets are clean, and a single problem planted in a copy of one is the only finding."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import REAL_DATA
from PIL import Image
from scipy import ndimage
from test_doctor import cut, every, examine, flags_of, renamed, save, troubles

from unet_ray.settings import load_train_config

FOLDERS = {
    "carvana": ("train", "train_masks"),
    "isbi2012": ("images", "masks"),
    "dsb2018": ("images", "masks"),
    "camvid": ("images", "masks"),
}
PAIRS = 12


@pytest.mark.parametrize(
    ("name", "recipe"),
    [("carvana", "carvana-fast"), ("isbi2012", "isbi2012"), ("dsb2018", "carvana-fast"), ("camvid", "camvid")],
)
def test_the_real_sets_are_clean(real_data, name, recipe):
    report = examine(*(real_data / name / folder for folder in FOLDERS[name]), samples=PAIRS)
    assert not troubles(report)
    assert report.suggestion.recipe == recipe
    suggested, settings = flags_of(report.suggestion.command)
    load_train_config(recipe=suggested, settings=settings)


def copied(name: str, target: Path) -> tuple[Path, Path]:
    """The first pairs of a set in folders of its names; Carvana's are of two cars."""
    folders = []
    for folder in FOLDERS[name]:
        (target / folder).mkdir()
        for path in sorted((REAL_DATA / name / folder).iterdir())[:PAIRS]:
            shutil.copy(path, target / folder)
        folders.append(target / folder)
    return folders[0], folders[1]


def nth(folder: Path, number: int) -> Path:
    return sorted(folder.iterdir())[number]


def pixels(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


def missing_mask(images, masks):
    nth(masks, 3).unlink()
    return nth(images, 3).name


def orphan_mask(images, masks):
    nth(images, 3).unlink()
    return nth(masks, 3).name


def other_ending(images, masks):
    renamed(masks, lambda stem: stem.replace("_mask", "_seg") + ".gif")
    return nth(masks, 0).name


def cut_image(images, masks):
    cut(nth(images, 2), 0.97)
    return nth(images, 2).name


def cut_mask(images, masks):
    cut(nth(masks, 2), 0.8)
    return nth(masks, 2).name


def empty_image(images, masks):
    nth(images, 2).write_bytes(b"")
    return nth(images, 2).name


def web_page(images, masks):
    nth(images, 2).write_text("<!doctype html><title>404 Not Found</title>")
    return nth(images, 2).name


def half_size_mask(images, masks):
    Image.open(nth(masks, 5)).resize((959, 640), Image.Resampling.NEAREST).save(nth(masks, 5))
    return nth(masks, 5).name


def turned(images, masks):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(nth(images, 5)).save(nth(images, 5), exif=exif)
    return nth(masks, 5).name


def jpeg_masks(images, masks):
    for path in list(masks.iterdir()):
        Image.open(path).convert("L").save(path.with_suffix(".jpg"), quality=80)
        path.unlink()
    return nth(masks, 0).name


def car_twice(images, masks):
    """One car's photograph with its mask under the name of another car."""
    for folder in (images, masks):
        shutil.copy(nth(folder, 0), nth(folder, -1))
    return nth(images, -1).name


def other_mask_of_a_copy(images, masks):
    shutil.copy(nth(images, 0), nth(images, -1))
    return nth(images, -1).name


def photograph_as_mask(images, masks):
    save(nth(masks, 4), pixels(nth(images, 4)))
    return nth(masks, 4).name


def smoothed_masks(images, masks):
    for path in masks.iterdir():
        Image.open(path).resize((200, 200)).resize((512, 512), Image.Resampling.BILINEAR).save(path)
    return nth(masks, 0).name


def one_mask_of_0_and_1(images, masks):
    save(nth(masks, 4), pixels(nth(masks, 4)) // 255)
    return nth(masks, 4).name


def stray_value(images, masks):
    mask = pixels(nth(masks, 4))
    mask[100, 200:203] = 17
    save(nth(masks, 4), mask)
    return nth(masks, 4).name


def filled_mask(images, masks):
    save(nth(masks, 4), np.full((512, 512), 255, np.uint8))
    return nth(masks, 4).name


def empty_masks(images, masks):
    every(masks, np.zeros_like)
    return nth(masks, 0).name


def one_mask_for_all(images, masks):
    for path in sorted(masks.iterdir())[1:]:
        shutil.copy(nth(masks, 0), path)
    return nth(masks, 0).name


def twelve_bits(images, masks):
    every(images, lambda image: image.astype(np.uint16) * 16)
    return nth(images, 0).name


def dark(images, masks):
    every(images, lambda image: image // 40)
    return nth(images, 0).name


def lost_class(images, masks):
    every(masks, lambda mask: np.where(mask == 4, 3, mask))


def colours(images, masks):
    palette = np.random.default_rng(0).integers(0, 256, (12, 3)).astype(np.uint8)
    every(masks, lambda mask: palette[mask])
    return nth(masks, 0).name


def photographs_as_masks(images, masks):
    for number, path in enumerate(sorted(masks.iterdir())):
        Image.open(nth(images, (number + 3) % PAIRS)).convert("L").save(path)
    return nth(masks, 0).name


def two_masks(images, masks):
    shutil.copy(nth(masks, 0), masks / f"{nth(masks, 0).stem}_mask.png")
    return nth(masks, 1).name


def masks_by_street(images, masks):
    renamed(masks, lambda stem: f"{stem.split('_')[0]}/{stem}.png")
    return next(path.relative_to(masks).as_posix() for path in sorted(masks.rglob("*.png")))


def numbered_nuclei(images, masks):
    every(masks, lambda mask: ndimage.label(mask)[0].astype(np.uint16))


def mostly_without_nuclei(images, masks):
    for path in sorted(masks.iterdir())[: PAIRS * 2 // 3]:
        save(path, np.zeros_like(pixels(path)))
    return nth(masks, 0).name


def damaged_in_the_middle(images, masks):
    data = bytearray(nth(images, 1).read_bytes())
    data[len(data) // 2 : len(data) // 2 + 200] = bytes(200)
    nth(images, 1).write_bytes(data)
    return nth(images, 1).name


def without_green(images, masks):
    every(images, lambda image: image * np.array([1, 0, 1, 1], np.uint8))
    return nth(images, 0).name


def probabilities(images, masks):
    for path in list(masks.iterdir()):
        Image.fromarray(ndimage.gaussian_filter(pixels(path) / 255.0, 2).astype(np.float32)).save(
            path.with_suffix(".tif")
        )
        path.unlink()
    return nth(masks, 0).name


Plant = Callable[[Path, Path], str | None]
PLANTED: list[tuple[str, Plant, str]] = [
    ("carvana", missing_mask, "image-without-mask"),
    ("carvana", orphan_mask, "mask-without-image"),
    ("carvana", other_ending, "masks-named-otherwise"),
    ("carvana", cut_image, "truncated-file"),
    ("carvana", cut_mask, "truncated-file"),
    ("carvana", empty_image, "empty-file"),
    ("carvana", web_page, "not-an-image"),
    ("carvana", half_size_mask, "mask-of-another-scale"),
    ("carvana", turned, "mask-not-turned-like-its-image"),
    ("carvana", jpeg_masks, "masks-with-in-between-values"),
    ("carvana", car_twice, "duplicates-across-groups"),
    ("carvana", other_mask_of_a_copy, "duplicates-with-different-masks"),
    ("carvana", photograph_as_mask, "mask-is-the-image"),
    ("isbi2012", smoothed_masks, "masks-with-in-between-values"),
    ("isbi2012", one_mask_of_0_and_1, "mask-values-differ"),
    ("isbi2012", stray_value, "unexpected-mask-value"),
    ("isbi2012", filled_mask, "full-masks"),
    ("isbi2012", empty_masks, "all-masks-empty"),
    ("isbi2012", one_mask_for_all, "masks-all-alike"),
    ("isbi2012", twelve_bits, "dark-16-bit-images"),
    ("isbi2012", dark, "images-nearly-black"),
    ("camvid", lost_class, "class-never-occurs"),
    ("camvid", colours, "masks-in-colours"),
    ("camvid", photographs_as_masks, "too-many-mask-values"),
    ("camvid", two_masks, "two-masks-for-one-image"),
    ("camvid", masks_by_street, "layout"),
    ("dsb2018", numbered_nuclei, "masks-number-objects"),
    ("dsb2018", mostly_without_nuclei, "mostly-empty-masks"),
    ("dsb2018", damaged_in_the_middle, "cannot-be-decoded"),
    ("dsb2018", without_green, "constant-channel"),
    ("dsb2018", probabilities, "floating-point-masks"),
]


HANDLED = {
    "image-without-mask",
    "mask-without-image",
    "masks-named-otherwise",
    "layout",
    "masks-with-in-between-values",
    "masks-in-colours",
    "masks-number-objects",
}
"""Problems that the suggested command handles: they are notes."""


@pytest.mark.parametrize(("name", "plant", "code"), PLANTED, ids=lambda value: getattr(value, "__name__", None))
def test_a_problem_planted_in_a_copy_is_the_only_finding(real_data, tmp_path, name, plant, code):
    images, masks = copied(name, tmp_path)
    file = plant(images, masks)
    report = examine(images, masks)
    found = troubles(report)
    assert set(found) == {code} - HANDLED
    if code in HANDLED:
        [found[code]] = [finding for finding in report.findings if finding.code == code]
    assert file is None or not found[code].files or file in found[code].files
