"""What a training says about its images before it begins."""

import numpy as np
from conftest import TINY, make_discs, make_model
from PIL import Image

import unet_ray
from unet_ray.data.pairs import find_pairs
from unet_ray.settings import load_train_config
from unet_ray.training.first_look import look


def said(images, masks, caplog, *settings: tuple[str, object]) -> str:
    caplog.clear()
    folders = [("data.images", str(images)), ("data.masks", str(masks)), ("data.mask_values", [0, 255])]
    config = load_train_config(settings=[*TINY, *folders, *settings])
    look(find_pairs(config.data), config)
    return caplog.text


def test_images_that_are_turned_alone_are_said(tmp_path, caplog):
    images, masks = make_discs(tmp_path / "d", 6)
    assert said(images, masks, caplog) == ""
    exif = Image.Exif()
    exif[0x0112] = 3
    for path in sorted(images.iterdir())[:2]:
        Image.open(path).save(path, exif=exif)
    assert "2 of 6 sampled images are turned by their EXIF orientation" in said(images, masks, caplog)
    for path in sorted(masks.iterdir())[:2]:
        Image.open(path).save(path, exif=exif)
    assert said(images, masks, caplog) == ""


def test_images_that_are_nearly_black_as_they_are_read_are_said(tmp_path, caplog):
    images, masks = make_discs(tmp_path / "d", 6)
    for number, path in enumerate(sorted(images.iterdir())):
        dark = np.random.default_rng(number).integers(0, 4000, (32, 32)).astype(np.uint16)
        Image.fromarray(dark).save(path)
    assert "no value of 6 sampled images is above 15 of 255" in said(images, masks, caplog, ("model.in_channels", 1))
    bright = ("data.value_range", [0, 4095])
    assert said(images, masks, caplog, ("model.in_channels", 1), bright) == ""
    sorted(images.iterdir())[0].write_bytes(b"damaged")
    assert said(images, masks, caplog, ("model.in_channels", 1), bright) == ""


def test_objects_that_are_too_small_for_the_network_are_said(tmp_path, caplog):
    images, masks = make_discs(tmp_path / "d", 6, size=256)
    for number, path in enumerate(sorted(masks.iterdir())):
        mask = np.zeros((256, 256), np.uint8)
        mask[10 + number, 100] = 255 * (number < 5)
        Image.fromarray(mask).save(path)
    text = said(images, masks, caplog)
    assert (
        "% of the pixels at 32x32, and nothing is left of it in " in text and "of 5 masks: raise --image-size" in text
    )
    mask[100:103, 100:103] = 255  # 0.01 % of the pixels at its own size, and at the network's
    for path in masks.iterdir():
        Image.fromarray(mask).save(path)
    assert "covers 0.01 % of the pixels at 256x256, and nothing is left of it in 0 of 6 masks" in said(
        images, masks, caplog, ("data.image_size", 256)
    )
    mask[100:120, 100:120] = 255
    for path in masks.iterdir():
        Image.fromarray(mask).save(path)
    assert said(images, masks, caplog, ("data.image_size", 256)) == said(images, masks, caplog) == ""


def test_predict_and_evaluate_say_that_deep_images_look_black_to_the_model(tmp_path, caplog):
    images, masks = make_discs(tmp_path / "d", 6)
    for number, path in enumerate(sorted(images.iterdir())):
        dark = np.random.default_rng(number).integers(0, 4000, (32, 32)).astype(np.uint16)
        Image.fromarray(dark).save(path)
    model = make_model(tmp_path / "model", ("model.in_channels", 1))
    text = "no value of 4 images is above 15 of 255 as this model reads them: `unet-ray doctor`"
    unet_ray.predict(model, images, tmp_path / "out", local=True)
    assert text in caplog.text
    caplog.clear()
    unet_ray.predict(model, images, tmp_path / "out", local=True)  # nothing is left to do
    assert text not in caplog.text
    unet_ray.evaluate(model, images, masks, local=True)
    assert text in caplog.text
    caplog.clear()
    ranged = make_model(tmp_path / "ranged", ("model.in_channels", 1), ("data.value_range", [0, 4095]))
    unet_ray.predict(ranged, images, tmp_path / "other", local=True)
    assert caplog.text == ""
