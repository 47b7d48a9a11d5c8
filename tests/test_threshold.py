"""The threshold: --threshold, `evaluate --choose-threshold`, and what predict does with it."""

import dataclasses
import json

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import TINY, flags, make_discs, make_model
from PIL import Image

import unet_ray
from unet_ray.cli import main
from unet_ray.config import EvaluateConfig, UserError
from unet_ray.evaluation.choose_threshold import (
    LEVELS,
    THRESHOLDS,
    USUAL,
    _choice,
    _counts,
    _nearest_that_is_as_good,
    choose_threshold,
)
from unet_ray.evaluation.evaluate import evaluate
from unet_ray.models import checkpoint
from unet_ray.ray_backend.session import LOCAL


def test_a_histogram_gives_the_counts_at_every_threshold():
    generator = np.random.default_rng(0)
    probability, truth = generator.integers(0, 256, (2, 500)), generator.integers(0, 2, (2, 500))
    histogram = np.stack(
        [np.bincount(t * LEVELS + p, minlength=2 * LEVELS) for t, p in zip(truth, probability, strict=True)]
    ).reshape(-1, 2, LEVELS)
    counts = _counts(histogram)
    for place, threshold in enumerate(THRESHOLDS):
        predicted = probability > threshold * 255
        expected = [(predicted & (truth == 1)), (predicted & (truth == 0)), (~predicted & (truth == 1))]
        assert (counts[:, place, 0] == np.stack([each.sum(axis=1) for each in expected], axis=-1)).all()


def test_a_threshold_that_gains_nothing_is_not_chosen():
    histogram = np.zeros((3, 2, LEVELS), np.int64)
    histogram[:, 0, 0], histogram[:, 1, 255] = 50, 50
    assert _choice(histogram).chosen == USUAL
    json.dumps(dataclasses.asdict(_choice(histogram)), allow_nan=False)
    histogram[:, 1, 255], histogram[:, 1, 80] = 0, 50  # all foreground has a probability of 0.31
    assert 0.05 <= _choice(histogram).chosen <= 0.31
    assert _choice(histogram).precision[-1] is None, "nothing is predicted there"


def test_of_thresholds_as_good_as_the_best_the_one_nearest_to_the_usual_is_chosen():
    generator = np.random.default_rng(0)
    dice = np.full((20, len(THRESHOLDS)), 0.9)
    dice[:, THRESHOLDS < 0.3] -= 0.1
    slopes = generator.normal(0, 0.1, (20, 1))
    noisy = dice + (slopes - slopes.mean() + 0.01) * (THRESHOLDS - USUAL)
    assert noisy.mean(axis=0).argmax() == len(THRESHOLDS) - 1
    assert THRESHOLDS[_nearest_that_is_as_good(noisy)] == USUAL, "better by chance only"
    dice[:, THRESHOLDS < 0.7] -= 0.05 + 0.01 * generator.random((20, 1))
    assert THRESHOLDS[_nearest_that_is_as_good(dice)] == 0.7, "better in every image"
    assert THRESHOLDS[_nearest_that_is_as_good(dice[:1])] == USUAL, "one image proves nothing"


@pytest.fixture(scope="module")
def shy(tmp_path_factory):
    """Returns images, masks and a run whose network is too shy: its last bias is lowered."""
    folder = tmp_path_factory.mktemp("shy")
    images, masks = make_discs(folder / "discs", 16)
    settings = flags([*TINY, ("train.epochs", 15), ("data.val_fraction", 0.5)])
    command = ["train", "--images", str(images), "--masks", str(masks), "--out", str(folder / "RUN"), "--local"]
    assert CliRunner().invoke(main, [*command, "--no-report", *settings]).exit_code == 0
    model, card = checkpoint.load_model(str(folder / "RUN/model"))
    model.head.bias.data -= 2
    config = unet_ray.settings.load_train_config(config_file=(folder / "RUN/config.yaml").read_text())
    checkpoint.save_model(str(folder / "RUN/model"), model, config, card.scores)
    return folder


def run(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(each) for each in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def dice(folder, **options) -> float:
    return evaluate(EvaluateConfig(model=str(folder / "RUN"), **options), runtime=LOCAL).dice.mean


def test_the_chosen_threshold_is_kept_with_the_model_and_used(shy, tmp_path):
    before = dice(shy)
    output = run("evaluate", shy / "RUN", "--choose-threshold", "--local")
    kept = json.loads((shy / "RUN/model/threshold.json").read_text())
    assert kept["threshold"] < 0.4 and "<- kept for predict" in output
    assert f"threshold {kept['threshold']:<10.2f}" in output
    place = kept["thresholds"].index(kept["threshold"])
    assert kept["dice"][kept["thresholds"].index(USUAL)] == pytest.approx(before, abs=2e-3)
    assert dice(shy) == pytest.approx(kept["dice"][place], abs=2e-3) and dice(shy) > before + 1e-3
    assert dice(shy, threshold=USUAL) == before
    assert f"above {kept['threshold']:g}" in run(
        "predict", shy / "RUN", shy / "discs/images", "--out", tmp_path / "a", "--local"
    )
    assert "a probability" not in run(
        "predict", shy / "RUN", shy / "discs/images", "--out", tmp_path / "b", "--threshold", 0.5, "--local"
    )
    result = CliRunner().invoke(
        main, ["predict", str(shy / "RUN"), str(shy / "discs/images"), "--out", str(tmp_path / "b"), "--local"]
    )
    assert result.exit_code == 2 and "other threshold" in result.output
    assert "precision" in (run("report", shy / "RUN") and (shy / "RUN/report.html").read_text().lower())


@pytest.mark.parametrize("options", [{}, {"tile": 16}])
def test_masks_are_the_probabilities_above_the_threshold(shy, tmp_path, options):
    unet_ray.predict(
        shy / "RUN", shy / "discs/images", tmp_path / "out", formats="png,prob", local=True, threshold=0.2, **options
    )
    for path in (tmp_path / "out/masks").iterdir():
        mask = np.asarray(Image.open(path)) > 0
        probability = np.asarray(Image.open(tmp_path / "out/probabilities" / path.name)) / 255
        assert (mask == (probability > 0.2))[abs(probability - 0.2) > 1 / 255].all()
    found = unet_ray.Segmenter(shy / "RUN", threshold=0.2, **options)(shy / "discs/images/a_000.png")
    assert (found.mask == (np.asarray(Image.open(tmp_path / "out/masks/a_000.png")) > 0)).all()


def test_ray_and_one_process_choose_the_same(shy, ray_cluster):
    config = EvaluateConfig(model=str(shy / "RUN"))
    assert choose_threshold(config) == choose_threshold(config, runtime=LOCAL)


def test_thresholds_that_cant_be_are_one_line(shy, tmp_path):
    several = make_model(tmp_path / "three", ("model.num_classes", 3), ("data.mask_values", [0, 127, 255]))
    pairs = ["--images", str(shy / "discs/images"), "--masks", str(shy / "discs/masks")]
    for options in (["--threshold", "0.3"], ["--choose-threshold"]):
        result = CliRunner().invoke(main, ["evaluate", str(several), *pairs, *options, "--local"])
        assert result.exit_code == 2 and "is for one class" in result.output and "Traceback" not in result.output
    with pytest.raises(UserError, match="between 0 and 1"):
        EvaluateConfig(model="RUN", threshold=1.5)
