"""Problems planted one at a time in a small data set, and clean sets without findings."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import disc, make_discs
from PIL import Image

from unet_ray import doctor
from unet_ray.config import UserError
from unet_ray.data.pairs import find_pairs
from unet_ray.data.splits import split_pairs
from unet_ray.settings import load_train_config

SIDE = 32


def noise(seed: int, *shape: int, high: int = 255, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, shape or (SIDE, SIDE, 3)).astype(dtype)


def save(path: Path, array: np.ndarray, **options: object) -> None:
    Image.fromarray(array).save(path, **options)


def examine(images: Path, masks: Path | None = None, **options: object) -> doctor.Report:
    return doctor.examine(str(images), None if masks is None else str(masks), timing=False, **options)


def troubles(report: doctor.Report) -> dict[str, doctor.Finding]:
    return {finding.code: finding for finding in report.findings if finding.level != "note"}


def notes(report: doctor.Report) -> set[str]:
    return {finding.code for finding in report.findings if finding.level == "note"}


def cut(path: Path, share: float = 0.6) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def every(folder: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Stores each image of a folder anew."""
    for path in sorted(folder.iterdir()):
        save(path, change(np.asarray(Image.open(path))))


def renamed(folder: Path, name: Callable[[str], str]) -> None:
    for path in sorted(folder.iterdir()):
        target = folder / name(path.stem)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)


FIRST, SECOND = "a_000.png", "b_001.png"


def missing_mask(images, masks):
    (masks / FIRST).unlink()


def orphan_mask(images, masks):
    save(masks / "zzz.png", disc(SIDE, (16, 16), 8) * 255)


def two_masks(images, masks):
    shutil.copy(masks / FIRST, masks / "a_000_mask.png")


def two_images(images, masks):
    save(images / "a_000.bmp", noise(5))


def wrong_suffix(images, masks):
    renamed(masks, lambda stem: f"{stem}_seg.png")


def wrong_start(images, masks):
    renamed(masks, lambda stem: f"mask_{stem}.png")


def unheard_of_suffix(images, masks):
    renamed(masks, lambda stem: f"{stem}-ausgemalt2.png")


def other_folders(images, masks):
    renamed(masks, lambda stem: f"{stem[0]}/{stem}.png")


def empty_file(images, masks):
    (images / FIRST).write_bytes(b"")


def dangling_link(images, masks):
    (masks / FIRST).unlink()
    (masks / FIRST).symlink_to(masks / "nowhere")


def text_as_image(images, masks):
    (images / FIRST).unlink()
    (images / "a_000.jpg").write_text("<html>404</html>")


def cut_png(images, masks):
    cut(images / FIRST)


def cut_jpeg(images, masks):
    (images / FIRST).unlink()
    save(images / "a_000.jpg", noise(3))
    cut(images / "a_000.jpg", 0.9)


def cut_tiff(images, masks):
    (masks / FIRST).unlink()
    save(masks / "a_000.tif", disc(SIDE, (16, 16), 8))
    cut(masks / "a_000.tif", 0.7)


def cut_array(images, masks):
    for path in list(images.iterdir()):
        np.save(path.with_suffix(".npy"), np.asarray(Image.open(path)))
        path.unlink()
    cut(images / "a_000.npy")


def damaged_inside(images, masks):
    data = bytearray((images / FIRST).read_bytes())
    data[len(data) // 2 : len(data) // 2 + 40] = bytes(40)
    (images / FIRST).write_bytes(data)


def other_size(images, masks):
    save(masks / FIRST, np.pad(disc(16, (8, 8), 4) * 255, ((0, 0), (0, 9))))


def one_of_another_scale(images, masks):
    save(masks / FIRST, disc(16, (8, 8), 4) * 255)


def smaller_masks(images, masks):
    for path in sorted(masks.iterdir()):
        Image.open(path).resize((16, 16), Image.Resampling.NEAREST).save(path)


def turned_image(images, masks):
    exif = Image.Exif()
    exif[0x0112] = 6
    save(images / FIRST, noise(4, 32, 48, 3), exif=exif)
    save(masks / FIRST, np.pad(disc(SIDE, (16, 16), 8) * 255, ((0, 0), (0, 16))))


def upside_down_image(images, masks):
    exif = Image.Exif()
    exif[0x0112] = 3
    save(images / FIRST, noise(4), exif=exif)


def jpeg_masks(images, masks):
    for path in list(masks.iterdir()):
        Image.open(path).save(path.with_suffix(".jpg"), quality=60)
        path.unlink()


def smooth_masks(images, masks):
    for path in masks.iterdir():
        Image.open(path).resize((16, 16)).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(path)


def coloured_masks(images, masks):
    every(masks, lambda mask: np.where(mask[..., None] > 0, [200, 30, 30], [0, 0, 90]).astype(np.uint8))


def one_coloured_mask(images, masks):
    mask = np.asarray(Image.open(masks / FIRST))
    save(masks / FIRST, np.where(mask[..., None] > 0, [200, 30, 30], [0, 0, 0]).astype(np.uint8))


def float_masks(images, masks):
    for path in list(masks.iterdir()):
        Image.fromarray((np.asarray(Image.open(path)) / 300).astype(np.float32)).save(path.with_suffix(".tif"))
        path.unlink()


def huge_mask_values(images, masks):
    (masks / FIRST).unlink()
    np.save(masks / "a_000.npy", disc(SIDE, (16, 16), 8).astype(np.int32) * 100_000)


def differing_values(images, masks):
    save(masks / FIRST, disc(SIDE, (16, 16), 8))


def stray_value(images, masks):
    mask = np.array(Image.open(masks / FIRST))
    mask[:2, :2] = 7
    save(masks / FIRST, mask)


def numbered_objects(images, masks):
    for number, path in enumerate(sorted(masks.iterdir())):
        mask = np.zeros((SIDE, SIDE), np.uint8)
        mask.flat[: 20 + 5 * number] = np.arange(1, 21 + 5 * number)
        save(path, mask)


def photographs_as_masks(images, masks):
    for number, path in enumerate(sorted(masks.iterdir())):
        save(path, noise(100 + number, SIDE, SIDE))


def missing_class(images, masks):
    def with_three(mask):
        mask = mask // 255
        mask[:6] = 3
        mask[6:9] = 2 * (mask[6:9] > 5)
        return np.where(mask == 2, 0, mask)

    every(masks, with_three)


def rare_class(images, masks):
    every(masks, lambda mask: np.where(np.arange(SIDE)[:, None] < 8, 2, mask // 255).astype(np.uint8))
    mask = np.array(Image.open(masks / FIRST))
    mask[-1, -1] = 3
    save(masks / FIRST, mask)


def mostly_empty(images, masks):
    for path in sorted(masks.iterdir())[:8]:
        save(path, np.zeros((SIDE, SIDE), np.uint8))


def all_empty(images, masks):
    every(masks, lambda mask: mask * 0)


def full_mask(images, masks):
    save(masks / FIRST, np.full((SIDE, SIDE), 255, np.uint8))


def same_masks(images, masks):
    for path in masks.iterdir():
        save(path, disc(SIDE, (16, 16), 8) * 255)


def image_as_mask(images, masks):
    shutil.copy(images / FIRST, masks / FIRST)


def image_as_gray_mask(images, masks):
    pixels = np.asarray(Image.open(images / FIRST).convert("L"))
    pixels = pixels // 2 + np.linspace(0, 100, SIDE)[None].astype(np.uint8)  # noise alone has no shape
    save(images / FIRST, np.dstack([pixels, pixels, pixels[::-1] // 2]))
    save(masks / FIRST, np.asarray(Image.open(images / FIRST).convert("L")))


def little_foreground(images, masks):
    for number, path in enumerate(sorted(masks.iterdir())):
        save(path, disc(SIDE, (8 + number, 16), 1) * 255)


def twelve_of_sixteen_bits(images, masks):
    for number, path in enumerate(sorted(images.iterdir())):
        save(path, noise(number, SIDE, SIDE, high=4096, dtype=np.uint16))


def floating_point(images, masks):
    for number, path in enumerate(sorted(images.iterdir())):
        save(path.with_suffix(".tif"), noise(number, SIDE, SIDE, high=1000, dtype=np.float32))
        path.unlink()


def nearly_black(images, masks):
    every(images, lambda image: image // 40)


def pages_that_differ(images, masks):
    pages = [Image.fromarray(noise(1)), Image.fromarray(noise(2, 40, 40, 3))]
    (images / FIRST).unlink()
    pages[0].save(images / "a_000.tif", save_all=True, append_images=pages[1:])


def tiny_image(images, masks):
    save(images / FIRST, noise(1, 20, 20, 3))
    save(masks / FIRST, disc(20, (10, 10), 6) * 255)


def copied_image(images, masks):
    for folder in (images, masks):
        shutil.copy(folder / FIRST, folder / "a_003.png")


def copied_across_groups(images, masks):
    shutil.copy(images / FIRST, images / SECOND)
    shutil.copy(masks / FIRST, masks / SECOND)


def copied_with_another_mask(images, masks):
    shutil.copy(images / FIRST, images / SECOND)


def one_black_image(images, masks):
    save(images / FIRST, np.zeros((SIDE, SIDE, 3), np.uint8))


def dead_channel(images, masks):
    every(images, lambda image: image * np.array([1, 0, 1], np.uint8))


def other_channels(images, masks):
    many_channels(images, masks)
    np.save(images / "a_000.npy", noise(20, SIDE, SIDE, 4))


PLANTED = [
    (two_masks, "two-masks-for-one-image", "a_000_mask.png"),
    (two_images, "two-images-of-one-name", "a_000.bmp"),
    (empty_file, "empty-file", FIRST),
    (dangling_link, "file-not-there", FIRST),
    (text_as_image, "not-an-image", "a_000.jpg"),
    (cut_png, "truncated-file", FIRST),
    (cut_jpeg, "truncated-file", "a_000.jpg"),
    (cut_tiff, "truncated-file", "a_000.tif"),
    (cut_array, "truncated-file", "a_000.npy"),
    (damaged_inside, "cannot-be-decoded", FIRST),
    (other_size, "mask-of-another-size", FIRST),
    (one_of_another_scale, "mask-of-another-scale", FIRST),
    (turned_image, "mask-not-turned-like-its-image", FIRST),
    (upside_down_image, "turned-by-exif", FIRST),
    (one_coloured_mask, "masks-in-colours", FIRST),
    (float_masks, "floating-point-masks", "a_000.tif"),
    (huge_mask_values, "mask-values-beyond-16-bits", "a_000.npy"),
    (differing_values, "mask-values-differ", FIRST),
    (stray_value, "unexpected-mask-value", FIRST),
    (photographs_as_masks, "too-many-mask-values", FIRST),
    (missing_class, "class-never-occurs", None),
    (rare_class, "rare-class", FIRST),
    (mostly_empty, "mostly-empty-masks", FIRST),
    (all_empty, "all-masks-empty", FIRST),
    (full_mask, "full-masks", FIRST),
    (same_masks, "masks-all-alike", FIRST),
    (image_as_mask, "mask-is-the-image", FIRST),
    (image_as_gray_mask, "mask-is-the-image", FIRST),
    (little_foreground, "little-foreground", None),
    (twelve_of_sixteen_bits, "dark-16-bit-images", FIRST),
    (floating_point, "floating-point-images", "a_000.tif"),
    (nearly_black, "images-nearly-black", FIRST),
    (pages_that_differ, "cannot-be-decoded", "a_000.tif"),
    (tiny_image, "tiny-images", FIRST),
    (copied_image, "duplicate-images", "a_003.png"),
    (copied_across_groups, "duplicates-across-groups", SECOND),
    (copied_with_another_mask, "duplicates-with-different-masks", SECOND),
    (one_black_image, "constant-images", FIRST),
    (dead_channel, "constant-channel", FIRST),
    (other_channels, "channels-differ", "a_000.npy"),
]


@pytest.mark.parametrize(("plant", "code", "name"), PLANTED, ids=lambda value: getattr(value, "__name__", None))
def test_a_single_planted_problem_is_the_only_finding(discs, plant, code, name):
    images, masks = discs
    plant(images, masks)
    report = examine(images, masks)
    found = troubles(report)
    assert set(found) == {code}, found
    finding = found[code]
    assert report.exit_code == {"error": 2, "warning": 1}[finding.level]
    assert name is None or name in finding.files
    assert finding.remedy and "\n" not in finding.text


def test_a_clean_set_has_neither_errors_nor_warnings(discs):
    report = examine(*discs)
    assert not troubles(report) and report.exit_code == 0
    assert notes(report) == {"masks-0-255", "names-look-like-groups"}
    assert (report.pairs, report.facts["sampled"]) == (12, 12)
    assert report.facts["image_bands"] == {"3 bands of 8 bits": 12}
    assert report.facts["mask_bands"] == {"1 band of 8 bits": 12}
    assert report.facts["image_sizes"] == {"32×32": 12} and report.facts["mask_values"] == {0: 12, 255: 12}
    shares = report.facts["class_shares"]
    exact = np.mean([np.asarray(Image.open(path)) > 0 for path in discs[1].iterdir()])
    assert shares[255] == pytest.approx(exact) and sum(shares.values()) == pytest.approx(1)


def test_the_remedy_is_the_option_that_pairs_names_which_differ(discs):
    images, masks = discs
    wrong_suffix(images, masks)
    report = examine(images, masks)
    (finding,) = (f for f in report.findings if f.code == "masks-named-otherwise")
    assert finding.remedy == "--match '(.+?)(?:_seg)?$' pairs them"
    assert report.pairs == 12 and "--match '(.+?)(?:_seg)?$'" in report.suggestion.command


def test_names_that_have_only_a_number_in_common_are_matched_by_it(tmp_path):
    images, masks = make_discs(tmp_path / "d", 12)
    renamed(images, lambda stem: f"photo {int(stem[2:])}.png")
    renamed(masks, lambda stem: f"S{stem[2:]}.png")
    report = examine(images, masks)
    assert not troubles(report) and report.pairs == 12
    assert "--match '0*([0-9]+)[^0-9/]*$'" in report.suggestion.command


def test_swapped_folders_are_reported_and_examined_the_right_way_round(discs, tmp_path):
    images, masks = discs
    report = examine(masks, images)
    assert set(troubles(report)) == {"folders-swapped"}
    assert (report.images, report.masks) == (str(images), str(masks))
    assert f"--images {images} --masks {masks}" in report.suggestion.command
    renamed(masks, lambda stem: f"{stem}_mask.png")
    assert set(troubles(examine(masks, images))) == {"folders-swapped"}
    assert set(troubles(examine(images, masks))) == set()


def test_one_folder_may_hold_both(discs, tmp_path):
    images, masks = discs
    report = examine(tmp_path / "discs", tmp_path / "discs")
    assert not troubles(report) and "layout" in notes(report) and report.pairs == 12
    assert f"--images {images} --masks {masks}" in report.suggestion.command
    for path in masks.iterdir():
        path.rename(images / f"{path.stem}_mask.png")
    report = examine(images)
    assert not troubles(report) and report.pairs == 12
    assert (report.facts["images"], report.facts["masks"]) == (12, 12)
    for path in images.glob("*_mask.png"):
        path.rename(images / path.name.replace("_mask", "_label"))
    report = examine(images, images)
    assert not troubles(report) and report.pairs == 12
    assert f"--masks '{images}/*_label.png'" in report.suggestion.command


def test_images_alone_are_examined_too(discs):
    images, _ = discs
    (images / FIRST).write_bytes(b"")
    report = examine(images)
    assert set(troubles(report)) == {"empty-file"} and "no-masks" in notes(report)
    assert report.suggestion is None


def test_a_folder_without_images_and_one_that_is_not_there(discs, tmp_path):
    images, _ = discs
    empty = tmp_path / "empty"
    empty.mkdir()
    assert set(troubles(examine(images, empty))) == {"no-images", "too-few-pairs"}
    with pytest.raises(UserError, match="no such folder"):
        examine(images, tmp_path / "nowhere")


@pytest.mark.parametrize(("count", "level"), [(1, "error"), (4, "note"), (10, None)])
def test_few_pairs_are_reported(tmp_path, count, level):
    report = examine(*make_discs(tmp_path / "d", count))
    few = [finding.level for finding in report.findings if finding.code in ("few-pairs", "too-few-pairs")]
    assert few == ([] if level is None else [level])


def test_too_many_pixels_are_an_error(discs):
    assert set(troubles(examine(*discs, max_pixels=1000))) == {"too-many-pixels"}


def handled_palette(images, masks):
    for path in list(masks.iterdir()):
        mask = Image.fromarray(np.asarray(Image.open(path)) // 255, "P")
        mask.putpalette([0, 0, 0, 255, 255, 255])
        mask.save(path.with_name(f"{path.stem}_mask.gif"))
        path.unlink()


def handled_alpha(images, masks):
    every(images, lambda image: np.dstack([image, np.full(image.shape[:2], 255, np.uint8)]))


def handled_sixteen_bits(images, masks):
    for number, path in enumerate(sorted(images.iterdir())):
        save(path, noise(number, SIDE, SIDE, high=65536, dtype=np.uint16))


def handled_mixture(images, masks):
    save(images / FIRST, noise(1, SIDE, SIDE))
    Image.fromarray(noise(2)).quantize(16).save(images / SECOND)
    (images / "c_002.png").unlink()
    Image.fromarray(noise(3)).convert("CMYK").save(images / "c_002.jpg")
    frames = [Image.fromarray(noise(seed)) for seed in (4, 5)]
    (images / "a_003.png").unlink()
    frames[0].save(images / "a_003.webp", save_all=True, append_images=frames[1:])


def handled_void(images, masks):
    every(masks, lambda mask: np.where(np.arange(SIDE)[:, None] < 3, 255, mask // 255).astype(np.uint8))


def passed_over(images, masks):
    for name in ("x.raw", "y.dcm", "._a_000.png", "notes.txt"):
        (images / name).write_bytes(b"x")


def gray_in_colour(images, masks):
    every(images, lambda image: np.repeat(image[..., :1], 3, axis=2))


def some_empty(images, masks):
    save(masks / FIRST, np.zeros((SIDE, SIDE), np.uint8))


def inverted(images, masks):
    every(masks, lambda mask: 255 - mask)


def large_range(images, masks):
    save(images / FIRST, noise(1, 40, 200, 3))
    save(masks / FIRST, np.pad(disc(SIDE, (16, 16), 8) * 255, ((0, 8), (0, 168))))


@pytest.mark.parametrize(
    ("plant", "codes"),
    [
        (handled_palette, {"palette-masks"}),
        (missing_mask, {"image-without-mask"}),
        (orphan_mask, {"mask-without-image"}),
        (wrong_suffix, {"masks-named-otherwise"}),
        (wrong_start, {"masks-named-otherwise"}),
        (unheard_of_suffix, {"masks-named-otherwise"}),
        (other_folders, {"masks-named-otherwise"}),
        (jpeg_masks, {"masks-with-in-between-values"}),
        (smooth_masks, {"masks-with-in-between-values"}),
        (coloured_masks, {"masks-in-colours"}),
        (numbered_objects, {"masks-number-objects"}),
        (smaller_masks, {"mask-of-another-scale"}),
        (handled_alpha, {"alpha-channel"}),
        (handled_sixteen_bits, {"images-16-bit"}),
        (handled_mixture, {"gray-and-colour", "palette-images", "cmyk-images", "animations"}),
        (handled_void, {"ignore-value"}),
        (passed_over, {"files-passed-over"}),
        (gray_in_colour, {"gray-in-colour-files"}),
        (some_empty, {"empty-masks"}),
        (inverted, {"mostly-foreground"}),
        (large_range, {"sizes-differ-widely"}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_needs_no_action_is_a_note(discs, plant, codes):
    plant(*discs)
    report = examine(*discs)
    assert not troubles(report)
    assert notes(report) - {"masks-0-255"} == codes | {"names-look-like-groups"}


def test_neighbours_that_are_alike_are_kept_together(tmp_path):
    images, masks = make_discs(tmp_path / "d", 12)
    renamed(images, lambda stem: f"{stem[2:]}.png")
    renamed(masks, lambda stem: f"{stem[2:]}.png")
    assert "neighbours-alike" not in notes(examine(images, masks))
    for number, path in enumerate(sorted(images.iterdir())):
        save(path, np.dstack([disc(SIDE, (16, 2 * number), 9) * np.uint8(200)] * 3) + noise(number, high=9))
    report = examine(images, masks)
    assert not troubles(report) and "neighbours-alike" in notes(report)
    assert report.suggestion.config().data.split_order == "name"


def flags_of(command: str) -> tuple[str | None, list[tuple[str, str]]]:
    """The recipe and the settings that `unet-ray train` makes of a command."""
    words = shlex.split(command)
    assert words[:2] == ["unet-ray", "train"]
    pairs = list(zip(words[2::2], words[3::2], strict=True))
    names = {"--group-by": "data.group_by", "--image-size": "data.image_size", "--epochs": "train.epochs"}
    names |= {"--images": "data.images", "--masks": "data.masks", "--match": "data.match", "--split": "data.split"}
    settings = [(names[flag], value) for flag, value in pairs if flag in names]
    settings += [tuple(value.split("=", 1)) for flag, value in pairs if flag == "--set"]
    known = {*names, "--set", "--out", "--recipe"}
    assert {flag for flag, _ in pairs} <= known
    return dict(pairs)["--recipe"], settings


def three_classes(images, masks):
    every(masks, lambda mask: np.where(np.arange(SIDE)[:, None] < 8, 2, mask // 255).astype(np.uint8))


def odd_classes(images, masks):
    every(masks, lambda mask: np.where(np.arange(SIDE)[:, None] < 8, 200, mask // 255 * 100).astype(np.uint8))


def forty_classes(images, masks):
    for number, path in enumerate(sorted(masks.iterdir())):
        save(path, (np.arange(SIDE * SIDE).reshape(SIDE, SIDE) // 128 + 3 * number).astype(np.uint8))


def gray_images(images, masks):
    every(images, lambda image: image[..., 0])


def many_channels(images, masks):
    for number, path in enumerate(sorted(images.iterdir())):
        np.save(path.with_suffix(".npy"), noise(number, SIDE, SIDE, 6))
        path.unlink()


@pytest.mark.parametrize(
    ("plant", "recipe", "expected"),
    [
        (None, "carvana-fast", {"model.in_channels": 3, "model.num_classes": 1, "data.image_size": 128}),
        (gray_images, "isbi2012", {"model.in_channels": 1, "data.mask_values": None, "data.classes": ()}),
        (three_classes, "camvid", {"model.num_classes": 3, "data.mask_values": None, "data.ignore_index": None}),
        (odd_classes, "camvid", {"model.num_classes": 3, "data.mask_values": (0, 100, 200)}),
        (forty_classes, "camvid", {"model.num_classes": 41, "data.mask_values": None}),
        (handled_void, "carvana-fast", {"data.ignore_index": 255, "model.num_classes": 1}),
        (twelve_of_sixteen_bits, "isbi2012", {"data.value_range": (0.0, 4095.0)}),
        (floating_point, "isbi2012", {"model.in_channels": 1}),
        (many_channels, "carvana-fast", {"model.in_channels": 6}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_the_suggested_command_fits_the_data(discs, plant, recipe, expected):
    from unet_ray.data.masks import infer_values
    from unet_ray.data.rows import Decoder

    images, masks = discs
    if plant is not None:
        plant(images, masks)
    suggestion = examine(images, masks).suggestion
    name, settings = flags_of(suggestion.command)
    config = load_train_config(recipe=name, settings=settings)
    assert name == suggestion.recipe == recipe
    assert config.data.group_by is not None  # the names look like groups
    sections = config.to_dict()
    for setting, value in expected.items():
        section, key = setting.split(".")
        assert sections[section][key] == (list(value) if isinstance(value, tuple) else value), setting
    assert suggestion.config().train == config.train and suggestion.config().model == config.model
    # As a training goes on from here: split, values, rows.
    pairs = find_pairs(config.data)
    split_pairs([pair.key for pair in pairs], config.data, config.train.seed)
    values = config.data.mask_values or infer_values(
        [pair.mask for pair in pairs], config.model.num_classes, config.data
    )
    data = dict(sections["data"], mask_values=list(values))
    decoder = Decoder.of(load_train_config(settings=[*config_settings({**sections, "data": data})]))
    for pair in pairs[:3]:
        assert decoder(pair.image, pair.mask)["image"].shape[-1] == config.model.in_channels


def config_settings(sections: dict) -> list[tuple[str, object]]:
    return [(f"{section}.{key}", value) for section, values in sections.items() for key, value in values.items()]


def test_a_list_of_classes_names_the_void_value(discs):
    images, masks = discs
    three_classes(images, masks)
    (masks.parent / "classes.txt").write_text("0 Sky\n1 Road\n2 Unlabelled (void)\n")
    report = examine(images, masks)
    assert not troubles(report) and "ignore-value" in notes(report)
    assert report.suggestion.config().data.ignore_index == 2
    assert set(report.facts["class_shares"]) == {0, 1}


def test_a_folder_may_be_a_uri(discs):
    images, masks = discs
    (masks / SECOND).write_bytes(b"")
    stray_value(images, masks)
    report = doctor.examine(images.as_uri(), masks.as_uri(), timing=False)
    assert set(troubles(report)) == {"unexpected-mask-value", "empty-file"}


def test_of_many_files_a_sample_is_read_and_damage_to_others_is_still_seen(tmp_path):
    images, masks = make_discs(tmp_path / "d", 40, size=32)
    cut(images / "b_001.png")  # not among the 10, which are every fourth
    seen = []
    report = examine(images, masks, samples=10, on_progress=lambda *numbers: seen.append(numbers))
    assert report.facts["sampled"] == 10 and set(troubles(report)) == {"truncated-file"}
    assert "10 pairs" in doctor.table(report)
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert seen[-1][0] == seen[-1][2] and seen[-1][1] == 1


def test_the_table_is_80_columns_wide_and_the_json_is_plain(discs):
    images, masks = discs
    cut_png(images, masks)
    report = examine(images, masks)
    lines = doctor.table(report).splitlines()
    assert all(len(line) <= 80 for line in lines if str(images) not in line and str(masks) not in line)
    text = "\n".join(lines)
    assert text.index("12 images") < text.index("error ") < text.index("note ") < text.index("unet-ray train")
    assert any(line.startswith("         -> ") for line in lines)
    plain = json.loads(json.dumps(report.to_json()))
    assert plain["exit_code"] == 2 and plain["findings"][0]["code"] == "truncated-file"


def test_a_training_step_is_timed(tmp_path):
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two that wait for each other take a hundred times as long where others work too
    try:
        report = doctor.examine(*map(str, make_discs(tmp_path / "d", 2)))
    finally:
        torch.set_num_threads(threads)
    expected = report.expected
    assert 0 < expected.seconds_per_epoch < 600 and expected.fits
    assert expected.row_bytes == 2 * 128 * 128 * 4
    assert f"an epoch on {expected.device}" in " ".join(doctor.table(report).split())


def test_masks_of_turned_images_are_turned_by_an_option_if_their_size_tells(discs):
    turned_image(*discs)
    report = examine(*discs)
    assert "--set data.mask_turn=true" in report.suggestion.command
    assert not [finding for finding in report.findings if finding.level == "error"]


def test_if_the_size_of_masks_does_not_tell_how_they_were_drawn_one_pair_is_shown(discs):
    upside_down_image(*discs)
    report = examine(*discs)
    assert "data.mask_turn" not in report.suggestion.command
    [finding] = [finding for finding in report.findings if finding.code == "turned-by-exif"]
    picture = Path(re.search(r"look at (\S+\.png)", finding.remedy)[1])
    with Image.open(picture) as halves:
        assert halves.size == (2 * SIDE, SIDE)
        left, right = np.hsplit(np.asarray(halves).astype(int), 2)
    assert np.abs(left - right).max() > 50  # the masks lie elsewhere
    picture.unlink()


def test_slices_of_volumes_get_the_recipe_for_them_whatever_their_channels(tmp_path):
    from PIL.PngImagePlugin import PngInfo

    from unet_ray.data.volumes import CHANNELS

    text = PngInfo()
    text.add_text(CHANNELS, "flair,t1ce")
    for number in range(8):
        for folder, array in (("images", noise(number)[..., :2]), ("masks", disc(SIDE, (16, 16), 5 + number) * 2)):
            place = tmp_path / folder / f"patient{number % 4}"
            place.mkdir(parents=True, exist_ok=True)
            mask = array.copy() if folder == "masks" else array
            if folder == "masks":
                mask[16:] //= 2
            Image.fromarray(mask).save(place / f"{number}.png", pnginfo=text if folder == "images" else None)
    suggestion = examine(tmp_path / "images", tmp_path / "masks").suggestion
    assert suggestion.recipe == "brats"
    assert (suggestion.config().model.in_channels, suggestion.config().model.num_classes) == (2, 3)
