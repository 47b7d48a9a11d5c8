"""Images that look unlike those of a training are noticed: by predict, its report, evaluate and doctor."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import TINY, flags, make_discs, make_model
from PIL import Image
from runs import trained_on_discs

from unet_ray.cli import main
from unet_ray.config import UserError
from unet_ray.data.looks import differences, numbers_of_images, summary
from unet_ray.doctor import examine


def encoded(pixels: np.ndarray, file: Path) -> bytes:
    Image.fromarray(pixels).save(file)
    return file.read_bytes()


def test_the_numbers_of_images(tmp_path):
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2, 0] = 255
    looks = summary(numbers_of_images([encoded(stripes, tmp_path / "a.png"), b"no image", "gone"], 3, None))
    mean, sd = looks["brightness"]
    assert (mean, sd) == (pytest.approx(1 / 6, abs=1e-3), 0)
    assert looks["contrast"][0] == pytest.approx(1 / 6, abs=1e-3)
    assert looks["sharpness"][0] == pytest.approx(1 / 3, abs=1e-3), "between neighbours, in both directions"
    assert looks["share of red"][0] == pytest.approx(1 / 2 - 1 / 6, abs=1e-3)
    (gray,) = numbers_of_images([encoded(stripes[..., 0], tmp_path / "b.png")], 1, None)
    assert set(gray) == {"brightness", "contrast", "sharpness"}
    assert numbers_of_images([b"no image"], 3, None) == [] and summary([]) == {}
    assert numbers_of_images([encoded(stripes, tmp_path / "a.png")], 3, None, max_pixels=64 * 63) == []


def test_only_what_is_far_differs_and_the_farthest_comes_first():
    before = {"brightness": (0.5, 0.05), "contrast": (0.2, 0.001), "sharpness": (0.1, 0.05)}
    now = {"brightness": 0.2, "contrast": 0.23, "sharpness": 0.25}
    assert differences(before, 16 * [now]) == [
        "darker (0.20 of white, not 0.50 ± 0.05)",
        "sharper (0.25 of white, not 0.10 ± 0.05)",
    ]
    assert differences(before, 16 * [{"brightness": 0.55, "contrast": 0.2}]) == [] == differences({}, 16 * [now])
    assert differences(before, 8 * [now]) == [
        "darker (0.20 of white, not 0.50 ± 0.05)",
        "sharper (0.25 of white, not 0.10 ± 0.05)",
    ]
    assert len(differences(before, 7 * [now])) == 1, "the mean of a few is less certain"
    assert differences(before, [now]) == []


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return trained_on_discs(tmp_path_factory.mktemp("discs"), 30, unlabeled=10)


@pytest.fixture(scope="module")
def bright(tmp_path_factory) -> tuple[Path, Path]:
    images, masks = make_discs(tmp_path_factory.mktemp("bright"), 12, seed=1)
    for file in images.iterdir():
        Image.open(file).point(lambda value: 255 - value // 4).save(file)
    return images, masks


def invoke(*words: object, code: int = 0):
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == code, done.output
    return done


def test_predict_says_it_and_its_report_notes_it(run, bright, tmp_path, caplog):
    invoke("predict", run, run.parent / "images", "--out", tmp_path / "same", "--local")
    assert "look unlike" not in caplog.text
    assert json.loads((tmp_path / "same/summary.json").read_text())["unlike"] == []
    assert "look unlike" not in (tmp_path / "same/report.html").read_text()
    with caplog.at_level(logging.WARNING):
        invoke("predict", run, bright[0], "--out", tmp_path / "OUT", "--local")
    assert "these images look unlike those that" in caplog.text and "brighter (0." in caplog.text
    assert "--adapt may help" in caplog.text
    assert json.loads((tmp_path / "OUT/summary.json").read_text())["unlike"][0].startswith("brighter (0.")
    assert "The images look unlike those of the training: brighter (0." in (tmp_path / "OUT/report.html").read_text()
    invoke("predict", run, bright[0], "--out", tmp_path / "OUT", "--local")  # nothing is left to do
    assert "The images look unlike those of the training: brighter (0." in (tmp_path / "OUT/report.html").read_text()


def test_evaluate_says_it(run, bright, caplog):
    invoke("evaluate", run, "--images", bright[0], "--masks", bright[1], "--local")
    assert caplog.text.count("look unlike") == 1


def test_doctor_says_it_with_a_remedy(run, bright, tmp_path):
    same = examine(str(run.parent / "images"), against=str(run), timing=False)
    assert not [finding for finding in same.findings if finding.code == "unlike-the-training"]
    done = invoke("doctor", "--images", bright[0], "--against", run, code=1)
    assert "[unlike-the-training]" in done.output and "brighter" in done.output
    (finding,) = [f for f in examine(str(bright[0]), against=str(run)).findings if f.code == "unlike-the-training"]
    remedy = finding.remedy.split("`")[1].replace("IMAGES", str(bright[0])).replace("MASKS", str(bright[1]))
    invoke(*remedy.split()[1:], "--adapt", "--against", run, "--local")
    old = make_model(tmp_path / "old")
    with pytest.raises(UserError, match=r"it has no looks\.json"):
        examine(str(bright[0]), against=str(old))


def test_a_training_that_fails_before_its_first_epoch_can_be_given_again(tmp_path):
    images, masks = make_discs(tmp_path / "d", 8)
    file = sorted(images.iterdir())[3]
    whole = file.read_bytes()
    file.write_bytes(whole[:40])
    command = ["train", "--images", images, "--masks", masks, "--out", tmp_path / "RUN", "--local", "--no-report"]
    invoke(*command, *flags(TINY), code=2)
    file.write_bytes(whole)
    invoke(*command, *flags(TINY))
