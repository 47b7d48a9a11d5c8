"""`evaluate --predictions`: the masks of any tool, with our scores."""

import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import make_discs, make_model
from PIL import Image

from unet_ray.cli import main


def run(*arguments: object, code: int = 0):
    result = CliRunner().invoke(main, [str(each) for each in arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def folders(tmp_path):
    """Returns masks (0, 255), and the predictions of a model for their images in two forms."""
    images, masks = make_discs(tmp_path / "discs", 9)
    model = make_model(tmp_path / "model")
    run("predict", model, images, "--out", tmp_path / "OUT", "--local", "--no-report")
    return images, masks, model, tmp_path / "OUT/masks"


def test_the_scores_are_those_of_the_model_that_made_the_masks(folders):
    images, masks, model, predictions = folders
    ours = run("evaluate", model, "--images", images, "--masks", masks, "--local", "--json")
    theirs = run("evaluate", "--predictions", predictions, "--masks", masks, "--json")
    assert json.loads(theirs.stdout) == json.loads(ours.stdout)
    assert "0, 1 in the predictions, 0, 255 in the masks" in theirs.stderr


def test_two_tools_are_compared_on_the_same_images(folders, tmp_path):
    _, masks, _, predictions = folders
    better = tmp_path / "better"
    shutil.copytree(masks, better)
    for path in better.iterdir():  # the other tool writes 0 and 7
        Image.fromarray((np.asarray(Image.open(path)) > 0) * np.uint8(7)).save(path)
    result = json.loads(
        run("evaluate", "--predictions", better, "--masks", masks, "--against", predictions, "--json").stdout
    )
    assert result["dice"]["mean"] == 1 and result["against"]["comparison"]["better"] == 9
    assert result["against"]["comparison"]["p_value"] < 0.01
    next(predictions.iterdir()).unlink()
    lacking = run("evaluate", "--predictions", better, "--masks", masks, "--against", predictions, code=2)
    assert "no prediction of 1 of the images, such as a_000" in lacking.output


def test_class_ids_and_what_is_left_out(tmp_path):
    generator = np.random.default_rng(0)
    for folder in ("predictions", "masks"):
        (tmp_path / folder).mkdir()
    for number in range(4):
        truth = generator.integers(0, 4, (20, 30)).astype(np.uint8)
        predicted = truth.copy()
        predicted[:5] = 3
        truth[15:] = 255
        Image.fromarray(truth).save(tmp_path / f"masks/{number}_mask.png")
        Image.fromarray(predicted).save(tmp_path / f"predictions/{number}.png")
    result = run("evaluate", "--predictions", tmp_path / "predictions", "--masks", tmp_path / "masks", "--json")
    scores = json.loads(result.stdout)
    assert "4 classes" in result.stderr and list(scores["per_class"]) == ["class 0", "class 1", "class 2", "class 3"]
    assert scores["pixel_accuracy"]["mean"] == pytest.approx(1 - 5 / 15 * 0.75, abs=0.05)
    assert scores["per_class"]["class 3"]["recall"] == 1
    (tmp_path / "predictions/1.png").write_bytes(b"no image")
    Image.new("L", (7, 7)).save(tmp_path / "predictions/2.png")
    broken = run("evaluate", "--predictions", tmp_path / "predictions", "--masks", tmp_path / "masks", code=1)
    assert "7x7 pixels, and the mask has 30x20" in broken.output and "2 images" in broken.output


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["MODEL"], "leave MODEL out"),
        (["--tile", "64", "--tta"], "leave --tile, --tta out"),
        (["--choose-threshold"], "go without"),
        (["--images", "a"], "leave --images out"),
    ],
)
def test_what_does_not_go_together_is_one_line(folders, more, words):
    _, masks, _, predictions = folders
    result = run("evaluate", "--predictions", predictions, "--masks", masks, *more, code=2)
    assert words in result.output and "Traceback" not in result.output


def test_without_a_model_and_without_predictions_the_command_says_what_it_needs():
    assert "name a MODEL" in run("evaluate", code=2).output
    assert "--masks" in run("evaluate", "--predictions", ".", code=2).output
