"""The Python interface: its examples run, single images get the masks that a folder gets, errors are one line."""

import doctest
import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import TINY, make_discs, make_model
from PIL import Image

import unet_ray
from unet_ray import api
from unet_ray.api import Segmenter, evaluate, predict, train
from unet_ray.config import EvaluateConfig, PredictConfig, UserError
from unet_ray.data import masks, pictures
from unet_ray.models import checkpoint
from unet_ray.ray_backend.session import LOCAL, Runtime
from unet_ray.settings import load_train_config


def photo(height: int, width: int, seed: int = 0, channels: int = 3) -> np.ndarray:
    """Returns smooth noise, uint8 [H,W,C]."""
    noise = np.random.default_rng(seed).integers(0, 255, (5, 6, channels)).astype(np.uint8)
    bands = [Image.fromarray(noise[..., c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(channels)]
    return np.dstack([np.asarray(band) for band in bands])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Has photos/, JPEG and PNG, smaller and larger than the models' 32 pixels; one/ and three/ are models."""
    folder = tmp_path_factory.mktemp("api")
    (folder / "photos").mkdir()
    for number, size in enumerate([(300, 211), (64, 64), (20, 45), (32, 32)]):
        for ext in ("png", "jpg"):
            Image.fromarray(photo(*size, seed=number)).save(folder / f"photos/{ext}{number}.{ext}")
    Image.fromarray(photo(50, 61)[..., 0]).save(folder / "photos/gray.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(photo(70, 40)).save(folder / "photos/turned.jpg", exif=turned)
    make_model(folder / "one", ("augment.vflip", 0.5), seed=5)
    make_model(folder / "three", ("model.num_classes", 3), ("data.mask_values", [0, 1, 2]))
    return folder


def test_the_examples_run(tmp_path, monkeypatch):
    make_discs(tmp_path, 12)
    make_discs(tmp_path / "more", 5, seed=1)
    monkeypatch.chdir(tmp_path)
    for example in (
        train,
        predict,
        unet_ray.select,
        evaluate,
        unet_ray.load_network,
        Segmenter,
        Segmenter.batch,
        unet_ray.export,
    ):  # in this order: the first writes RUN
        for test in doctest.DocTestFinder(recurse=False).find(example, globs={}):
            output = io.StringIO()
            result = doctest.DocTestRunner().run(test, out=output.write)
            assert result.failed == 0 and result.attempted >= 2, output.getvalue()
    assert sorted(path.name for path in (tmp_path / "MASKS/overlays").iterdir())[0] == "a_000.jpg"
    with Image.open("mask.png") as mask:
        assert mask.size == (32, 32)


OPTIONS = [
    {},
    {"tile": 32},
    {"tile": 16, "overlap": 0.25, "cleanup": "largest+holes"},
    {"cleanup": "area=20"},
    {"backend": "torch", "precision": "fp32"},
]


@pytest.mark.parametrize("name", ["one", "three"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_single_images_get_the_bytes_that_predict_writes(folder, tmp_path, name, options):
    summary = unet_ray.predict(
        folder / name, folder / "photos", tmp_path / "out", formats=["png", "prob"], local=True, **options
    )
    assert (summary.images, summary.failed) == (10, 0)
    segmenter = unet_ray.Segmenter(folder / name, **options)
    seen = set()
    for path in sorted((folder / "photos").iterdir()):
        expected = (tmp_path / f"out/masks/{path.stem}.png").read_bytes()
        result = segmenter(path, probabilities=True)
        result.save(tmp_path / "mask.png")
        assert (tmp_path / "mask.png").read_bytes() == expected, path.name
        maps = [f"{path.stem}.png"] if name == "one" else [f"{path.stem}.{k}.png" for k in range(3)]
        for values, file in zip(result.probabilities, maps, strict=True):
            assert pictures.encode_gray(values) == (tmp_path / "out/probabilities" / file).read_bytes()
        if path.suffix == ".png":
            with Image.open(path) as image:
                pixels = np.asarray(image)
                for given in (pixels, image):
                    assert pictures.encode_png(segmenter(given).mask, result.num_classes) == expected, path.name
        seen |= set(np.unique(result.mask).tolist())
    assert len(seen) > 1  # empty masks would be equal for any network


def test_flips_and_an_ensemble_give_what_predict_gives(folder, tmp_path):
    make_model(tmp_path / "two", seed=3)
    options = {"tta": True, "ensemble": [str(tmp_path / "two")]}
    unet_ray.predict(folder / "one", folder / "photos", tmp_path / "out", local=True, **options)
    segmenter = unet_ray.Segmenter(folder / "one", **options)
    plain = unet_ray.Segmenter(folder / "one")
    differ = 0
    for path in sorted((folder / "photos").iterdir()):
        found = segmenter(str(path)).mask
        assert pictures.encode_png(found, 1) == (tmp_path / f"out/masks/{path.stem}.png").read_bytes()
        differ += int((found != plain(path).mask).sum())
    assert differ


def test_a_chosen_cleanup_is_used_as_predict_does(folder, tmp_path):
    model = make_model(tmp_path / "model", seed=5)
    card = checkpoint.read_card(str(model))
    before = unet_ray.Segmenter(model)(photo(90, 90)).mask
    checkpoint.save_choice(str(model), checkpoint.CLEANUP, card, {"cleanup": "largest+holes"})
    after = unet_ray.Segmenter(model)(photo(90, 90)).mask
    assert (after != before).any()
    assert (after == masks.clean(before, unet_ray.Segmenter(model).pipeline.cleanup)).all()


def test_an_opened_jpeg_is_left_as_it_is_and_turned_as_its_file_is(folder):
    segmenter = unet_ray.Segmenter(folder / "one")
    with Image.open(folder / "photos/turned.jpg") as image:
        result = segmenter(image)
        assert result.mask.shape == (40, 70)
        assert image.size == (40, 70) and image.format == "JPEG"  # (width, height): neither turned nor made smaller
    assert (result.mask == segmenter(folder / "photos/turned.jpg").mask).mean() > 0.95


def test_images_of_many_channels_are_arrays(tmp_path):
    model = make_model(tmp_path / "model", ("model.in_channels", 5))
    image = photo(50, 40, channels=5)
    np.save(tmp_path / "image.npy", image)
    segmenter = unet_ray.Segmenter(model)
    assert (segmenter(image).mask == segmenter(tmp_path / "image.npy").mask).all()
    with pytest.raises(UserError, match=r"the image: 3 channel\(s\), the model takes 5"):
        segmenter(image[..., :3])


def test_a_segmented_image_describes_and_shows_itself(folder):
    segmenter = unet_ray.Segmenter(folder / "three")
    assert segmenter.classes == ("class 0", "class 1", "class 2")
    image = photo(60, 90)
    result = segmenter(image)
    assert result.probabilities is None
    assert (segmenter(image, probabilities=True).probabilities.argmax(axis=0) == result.mask).mean() > 0.9
    share = (result.mask == 1).mean()
    assert repr(result).startswith("SegmentedImage: 90x60 pixels, ") and f"class 1 {share:.1%}" in repr(result)
    with Image.open(io.BytesIO(result._repr_jpeg_())) as shown:
        assert shown.format == "JPEG" and shown.size == (90, 60)
        assert result.overlay() == shown
    assert "one (unet at 32x32 pixels, classes background, foreground), on" in repr(unet_ray.Segmenter(folder / "one"))


def test_a_picture_whose_file_is_gone_is_not_shown(folder, tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(photo(30, 30)).save(path)
    result = unet_ray.Segmenter(folder / "one")(path)
    assert result._repr_jpeg_() is not None
    path.unlink()
    assert result._repr_jpeg_() is None
    with pytest.raises(UserError, match="No such file"):
        result.overlay()


def test_results_describe_themselves_and_what_comes_next(tmp_path):
    images, true_masks = make_discs(tmp_path / "discs", 12)
    run = tmp_path / "run"
    result = unet_ray.train(images, true_masks, run, settings=dict(TINY), local=True)
    best = result.best
    assert repr(result).splitlines() == [
        f"TrainResult: 2 epochs, best: epoch {best['epoch']}, validation Dice {best['val_dice']:.4f}",
        f"  model: {run}/model",
        f"  next: unet_ray.predict('{run}', 'FOLDER', 'MASKS'), unet_ray.evaluate('{run}'), "
        f"unet_ray.Segmenter('{run}')(image)",
    ]
    (images / "page.png").write_text("no image")
    summary = unet_ray.predict(run, images, tmp_path / "out", local=True)
    first, reason, where = repr(summary).splitlines()
    assert first.startswith("PredictSummary: 12 of 13 images segmented, 1 failed, ") and first.endswith(" images/s")
    assert reason.startswith("  1 x not an image") and where.endswith(str(tmp_path / "out"))
    repeated = repr(unet_ray.predict(run, images, tmp_path / "out", local=True))
    assert "1 failed (13 of them by an earlier run)" in repeated
    (images / "page.png").unlink()
    scores = unet_ray.evaluate(run, local=True)
    table = repr(scores).splitlines()
    assert table[0].startswith(f"{scores.images} images")
    low, high = scores.dice.ci95
    dice = [f"{value:.4f}" for value in (scores.dice.mean, low, high, scores.dice.total)]
    assert table[1].split() == ["Dice", dice[0], dice[1], "–", *dice[2:]]


def test_functions_build_the_settings_of_the_commands(monkeypatch, tmp_path):
    """Checks what the functions that the commands call are given."""
    called = {}
    monkeypatch.setattr(api.training, "train", lambda config, out, **how: called.update(train=(config, out, how)))
    monkeypatch.setattr(api.prediction, "predict", lambda config, **how: called.update(predict=(config, how)))
    monkeypatch.setattr(api.evaluation, "evaluate", lambda config, **how: called.update(evaluate=(config, how)))

    (tmp_path / "mine.yaml").write_text("train: {epochs: 7, seed: 1}")
    unet_ray.train("no: yaml", "m", "o", config=tmp_path / "mine.yaml", settings={"train.seed": 5}, resume=True)
    config, out, how = called["train"]
    expected = load_train_config(settings=[("train.epochs", 7), ("train.seed", 5), ("data.masks", "m")])
    assert config.data.images == "no: yaml" and out == "o" and how["resume"] and how["runtime"] == Runtime()
    assert (config.train, config.data.masks) == (expected.train, "m")
    unet_ray.train(out="o", config=expected, settings={"train.seed": 9})
    assert (called["train"][0].train.epochs, called["train"][0].train.seed) == (7, 9)
    unet_ray.train("i", "m", "o", recipe="carvana")
    assert called["train"][0].model == load_train_config(recipe="carvana").model

    unet_ray.predict("m", ["a", tmp_path], "o", formats="png, rle", tile=64, tta=True, overwrite=True)
    assert called["predict"][0] == PredictConfig(
        model="m", inputs=("a", str(tmp_path)), out="o", formats=("png", "rle"), tile=64, tta=True, overwrite=True
    )
    unet_ray.evaluate("m", "i", "t", mask_values=[0, 7], local=True)
    assert called["evaluate"][0] == EvaluateConfig(model="m", images="i", masks="t", mask_values=(0, 7))
    assert called["evaluate"][1]["runtime"] == LOCAL


def test_a_mistake_is_one_line_that_names_the_remedy(folder, tmp_path):
    def mistakes():
        segmenter = unet_ray.Segmenter(folder / "one")
        yield "out is missing", lambda: unet_ray.train("i", "m")
        yield "give one of them", lambda: unet_ray.train("i", "m", "o", recipe="carvana", config="c.yaml")
        yield "config none.yaml: No such file", lambda: unet_ray.train("i", "m", "o", config="none.yaml")
        yield "did you mean 'train.epochs'", lambda: unet_ray.train("i", "m", "o", settings={"train.epoch": 3})
        yield "no such folder", lambda: unet_ray.train("i", "m", "o", init=tmp_path / "none")
        yield "did you mean 'tile'", lambda: unet_ray.predict("m", "i", "o", tiles=3)
        yield "tile is '3': int is needed", lambda: unet_ray.predict("m", "i", "o", tile="3")
        yield "'pgn' is not one", lambda: unet_ray.predict("m", "i", "o", formats="pgn")
        yield "did you mean 'tolerance'", lambda: unet_ray.evaluate("m", tolerence=3)
        yield "go together", lambda: unet_ray.evaluate("m", "i", local=True)
        yield "no such folder", lambda: unet_ray.Segmenter(tmp_path / "none")
        yield "one of auto, cpu, cuda", lambda: unet_ray.Segmenter(folder / "one", device="gpu")
        yield (
            "trained without flips",
            lambda: unet_ray.Segmenter(make_model(tmp_path / "unflipped", ("augment.hflip", 0.0)), tta=True),
        )
        yield f"{tmp_path}/none.png: .*No such file", lambda: segmenter(tmp_path / "none.png")
        yield f"{tmp_path}: a folder|{tmp_path}: not a regular file", lambda: segmenter(tmp_path)
        yield "the image: an array \\[2, 3, 4, 3\\]", lambda: segmenter(np.zeros((2, 3, 4, 3), np.uint8))
        yield "float32 from 0 to 0|channel", lambda: segmenter(np.zeros((2, 3, 3), np.float32))
        yield "segmenter.batch\\(images\\)", lambda: segmenter([1, 2])
        yield "permute\\(1, 2, 0\\).cpu\\(\\).numpy", lambda: segmenter(torch.zeros(3, 8, 9))
        yield "transpose\\(1, 2, 0\\)", lambda: segmenter(np.zeros((3, 8, 9), np.uint8))
        yield "not set", lambda: segmenter({1, 2})
        yield "not an array of object", lambda: segmenter(np.array([None]))
        yield "end with .png", lambda: segmenter(photo(9, 9)).save(tmp_path / "mask.jpg")
        yield "cannot be written", lambda: segmenter(photo(9, 9)).save(folder / "one/model.json/mask.png")
        yield "900 pixels, more than", lambda: unet_ray.Segmenter(folder / "one", max_pixels=899)(photo(30, 30))

    for message, mistake in mistakes():
        with pytest.raises(UserError, match=message) as error:
            mistake()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("options", [{}, {"tile": 16}], ids=["whole", "tiles"])
def test_several_images_of_all_kinds_give_what_each_gives_alone(folder, options):
    segmenter = unet_ray.Segmenter(folder / "one", precision="fp32", **options)
    path = next(path for path in sorted((folder / "photos").iterdir()) if path.suffix == ".png")
    with Image.open(path) as opened:
        array = np.asarray(opened.convert("RGB"))
    given = [path, b"no image", array, "none.png", path.read_bytes(), [1], Image.fromarray(array[:20])]
    found = segmenter.batch(given)
    assert [isinstance(each, UserError) for each in found] == [False, True, False, True, False, True, False]
    assert "none.png: cannot be read" in str(found[3]) and "not an image" in str(found[1])
    for image, result in zip(given, found, strict=True):
        if not isinstance(result, UserError):
            assert result.png() == segmenter(image).png() and result.overlay().size == result.mask.shape[::-1]
    assert segmenter.batch([]) == []


def test_the_bytes_of_a_file_are_an_image(folder):
    segmenter = unet_ray.Segmenter(folder / "one")
    path = folder / "photos/png1.png"
    assert (segmenter(path.read_bytes()).mask == segmenter(path).mask).all()


def test_the_package_lists_its_names_before_anything_is_loaded():
    code = (
        "import sys, unet_ray\n"
        "assert {'train', 'Segmenter', '__version__'} <= set(dir(unet_ray)) and unet_ray.__version__\n"
        "assert not {'torch', 'ray', 'numpy'} & set(sys.modules)\n"
        "assert unet_ray.UserError.__name__ == 'UserError' and 'torch' not in sys.modules\n"
        "from unet_ray import *\n"
        "assert train is unet_ray.api.train and Segmenter.__name__ == 'Segmenter' and 'ray' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = unet_ray.trian


@pytest.mark.parametrize(
    ("image", "conversion"),
    [
        (np.full((32, 32, 3), 0.5), "(255 * image).round().astype(np.uint8)"),
        (np.full((32, 32, 3), 200.0, np.float32), "image.round().astype(np.uint8)"),
        (np.full((32, 32, 3), 200), "image.astype(np.uint8)"),
        (np.full((32, 32), 200, np.uint16), "image.astype(np.uint8)"),
    ],
)
def test_an_array_that_would_be_seen_in_black_is_refused_with_the_conversion(tmp_path, image, conversion):
    segmenter = Segmenter(make_model(tmp_path / "model"), precision="fp32")
    with pytest.raises(UserError) as refused:
        segmenter(image)
    assert str(refused.value).endswith(f"pass {conversion}")
    converted = eval(conversion, {"image": image, "np": np})
    assert segmenter(converted).mask.shape == (32, 32)
