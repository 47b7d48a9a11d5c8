"""`distill`: a small network learns what a run's network finds, and is accepted by its score."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import TINY, flags, make_model
from runs import lines, trained_on_discs, weights_sha256

from unet_ray.cli import main
from unet_ray.config import IGNORE
from unet_ray.evaluation.distillation import config_of
from unet_ray.models import checkpoint
from unet_ray.settings import load_train_config
from unet_ray.training.step import prepare
from unet_ray.training.teacher import distance

SMALL = flags([*(pair for pair in TINY if not pair[0].startswith("data.")), ("model.patch", 1)])


def test_the_distance_is_the_divergence_from_the_teachers_probabilities():
    ours, theirs = torch.tensor([[[[0.3, -2.0]]]]), torch.tensor([[[[1.5, -2.0]]]])
    p, q = theirs.sigmoid(), ours.sigmoid()
    expected = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    assert distance(ours, theirs, torch.ones(1)) == pytest.approx(float(expected))
    assert distance(theirs, theirs, torch.ones(1)) == pytest.approx(0, abs=1e-7)
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(3, 4, 5, 6, generator=generator) for _ in range(2))
    p, q = theirs.softmax(dim=1), ours.softmax(dim=1)
    found = distance(ours, theirs, torch.tensor([1.0, 0.0, 1.0]))
    assert torch.allclose(found[[0, 2]], (p * (p / q).log()).sum(dim=1).mean(dim=(1, 2))[[0, 2]], rtol=1e-4)
    assert found[1] == 0


def test_a_step_adds_the_distance_of_all_images_that_can_be_read(tmp_path):
    teacher = make_model(tmp_path / "teacher")
    config = load_train_config(settings=[*TINY, ("augment.hflip", 0), ("train.teacher", str(teacher))])
    generator = np.random.default_rng(0)
    arrays = {
        "image": generator.integers(0, 256, (4, 32, 32, 3)).astype(np.uint8),
        "mask": np.concatenate([np.ones((2, 32, 32)), np.full((1, 32, 32), IGNORE), np.zeros((1, 32, 32))]),
        "index": np.arange(4),
    }
    arrays["mask"] = arrays["mask"].astype(np.uint8)
    training = prepare(config, torch.device("cpu"))
    assert training.teacher is not None
    training.network.eval()
    found = float(training.backward(arrays, 1.0, epoch=1, labeled=2))
    with torch.no_grad():
        image = torch.from_numpy(arrays["image"]).permute(0, 3, 1, 2)
        logits, theirs = training.network(image), training.teacher(image)
        mask = torch.from_numpy(arrays["mask"])[:2]
        of_masks = float(training.loss(logits[:2], mask, None).mean())
        of_teacher = float(distance(logits, theirs, torch.tensor([1.0, 1.0, 1.0, 0.0])).mean())
    assert of_teacher > 0.001 and found == pytest.approx(of_masks + of_teacher, rel=1e-4)
    assert all(parameter.grad is None for parameter in training.teacher.parameters())


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run on 16 of 24 discs; the others have no masks."""
    settings = [("train.epochs", 8), ("data.val_fraction", 0.25), ("model.norm", "group")]
    return trained_on_discs(tmp_path_factory.mktemp("discs"), 24, *settings, unlabeled=8)


def distill(run: Path, out: Path, *more: object):
    words = ["distill", run, "--images", run.parent / "images", "--out", out, "--no-report", *SMALL]
    return CliRunner().invoke(main, [str(each) for each in [*words, "--set", "model.norm=group", *more]])


def test_a_small_network_is_accepted_or_refused_by_its_score_and_is_a_run(run, tmp_path):
    small = ["--local", "--set", "model.base_channels=2", "--epochs", 2]
    done = distill(run, tmp_path / "SMALL", *small, "--may-fall", 1)
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "SMALL/distilled.json").read_text())
    assert result["kept"] and result["gflop_small"] < result["gflop"] / 2 and result["images"] == 4
    names = set((tmp_path / "SMALL/unlabeled.txt").read_text().split())
    assert len(names) == 8, "those without masks"
    assert (tmp_path / "SMALL/split.csv").read_text() == (run / "split.csv").read_text()
    scored = CliRunner().invoke(main, ["evaluate", str(tmp_path / "SMALL"), "--local", "--json"])
    assert json.loads(scored.stdout)["dice"]["mean"] == pytest.approx(result["dice_small"], abs=1e-6)

    # As if it had been stopped before the scores were there.
    (tmp_path / "SMALL/distilled.json").unlink()
    assert distill(run, tmp_path / "SMALL", *small, "--may-fall", 1, "--resume").exit_code == 0
    assert json.loads((tmp_path / "SMALL/distilled.json").read_text()) == result

    refused = distill(run, tmp_path / "B", *small, "--may-fall", 0, "--set", "train.learning_rate=1e-9")
    assert refused.exit_code == 2 and "refused: " in refused.output
    assert (tmp_path / "B/model/model.safetensors").exists()


def test_it_goes_on_after_a_stop_with_the_same_network(run, tmp_path):
    options = ["--local", "--may-fall", 1, "--set", "train.schedule=constant"]
    assert distill(run, tmp_path / "whole", *options, "--epochs", 4).exit_code == 0
    # As if it had been stopped after the second epoch.
    assert distill(run, tmp_path / "two", *options, "--epochs", 2).exit_code == 0
    assert distill(run, tmp_path / "two", *options, "--epochs", 4, "--resume").exit_code == 0
    assert lines(tmp_path / "two") == lines(tmp_path / "whole")
    assert weights_sha256(tmp_path / "two") == weights_sha256(tmp_path / "whole")


def test_it_does_not_go_on_with_a_teacher_that_was_trained_again(run, tmp_path):
    shutil.copytree(run, tmp_path / "RUN")
    (tmp_path / "images").symlink_to(run.parent / "images")
    options = ["--local", "--may-fall", 1, "--set", "train.schedule=constant"]
    assert distill(tmp_path / "RUN", tmp_path / "SMALL", *options, "--epochs", 1).exit_code == 0
    for name in (checkpoint.CARD, checkpoint.WEIGHTS):
        shutil.copy(tmp_path / "SMALL/model" / name, tmp_path / "RUN/model" / name)
    for epochs in (1, 2):  # finished before, or not
        done = distill(tmp_path / "RUN", tmp_path / "SMALL", *options, "--epochs", epochs, "--resume")
        assert done.exit_code == 2 and "RUN/model have changed since" in done.output, done.output


def test_two_workers_on_ray_take_the_same_steps(run, tmp_path, ray_cluster):
    options = ["--may-fall", 1, "--epochs", 2]
    assert distill(run, tmp_path / "one", *options, "--local").exit_code == 0
    assert distill(run, tmp_path / "two", *options, "--workers", 2).exit_code == 0
    losses = [[line["train_loss"] for line in lines(tmp_path / name)] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


def test_a_run_on_few_images_gets_more_epochs_unless_they_are_given(run):
    settings = [("model.depth", "2")]
    assert config_of(str(run), "small", settings).train.epochs == 667, "12 images, 4 in a step"
    assert config_of(str(run), "small", [*settings, ("train.epochs", "5")]).train.epochs == 5


def test_wrong_teachers_are_named_before_the_first_epoch(run, tmp_path):
    model = make_model(tmp_path / "model")
    done = distill(model, tmp_path / "A")
    assert done.exit_code == 2 and "is not a run directory" in done.output
    done = distill(tmp_path / "none", tmp_path / "A")
    assert done.exit_code == 2 and "no such folder" in done.output
    for setting, text in (
        (("model.in_channels", 1), r"teacher's model.in_channels is 3, not 1"),
        (("data.image_size", 64), r"teacher's data.image_size is (32, 32), not (64, 64)"),
    ):
        command = ["train", "--images", run.parent / "images", "--masks", run.parent / "masks", "--local"]
        settings = flags([*TINY, ("train.teacher", str(run)), setting])
        done = CliRunner().invoke(main, [*map(str, command), "--out", str(tmp_path / "C"), *settings])
        assert done.exit_code == 2 and text in done.output, done.output
    command = ["train", "--images", run.parent / "images", "--masks", run.parent / "masks", "--local"]
    settings = flags([*TINY, ("train.teacher", str(run)), ("data.mask_values", [255, 0])])
    done = CliRunner().invoke(main, [*map(str, command), "--out", str(tmp_path / "C"), *settings])
    assert done.exit_code == 2 and "[0, 255], in another order than [255, 0]" in done.output, done.output
    assert not (tmp_path / "C").exists() and not (tmp_path / "A").exists()


def test_settings_of_the_run_are_not_changed_and_a_run_is_not_its_own_small_one(run, tmp_path):
    for setting in ("data.image_size=64", "augment.rotation=5", "train.seed=1", "model.in_channels=1"):
        done = distill(run, tmp_path / "A", "--set", setting)
        assert done.exit_code == 2 and f"--set {setting.partition('=')[0]}: it is that of" in done.output, done.output
    done = distill(run, run, "--local", "--resume", "--epochs", 1)
    assert done.exit_code == 2 and "is the run itself" in done.output
    # A finished training of other settings is not scored as if it were this one.
    assert distill(run, tmp_path / "B", "--local", "--may-fall", 1, "--epochs", 1).exit_code == 0
    done = distill(run, tmp_path / "B", "--local", "--epochs", 1, "--resume", "--batch-size", 2)
    assert done.exit_code == 2 and "trained with other settings" in done.output


def test_a_run_that_held_nothing_out_and_foreign_code_are_refused(run, tmp_path):
    shutil.copytree(run, tmp_path / "RUN")
    split = (tmp_path / "RUN/split.csv").read_text()
    (tmp_path / "RUN/split.csv").write_text(split.replace(",val", ",train"))
    done = distill(tmp_path / "RUN", tmp_path / "A")
    assert done.exit_code == 2 and "has held out no images" in done.output
    (tmp_path / "RUN/split.csv").write_text(split)
    config = tmp_path / "RUN/config.yaml"
    config.write_text(config.read_text().replace("custom: null", "custom: mine:speckle"))
    done = distill(tmp_path / "RUN", tmp_path / "A")
    assert done.exit_code == 2 and "add --allow-code" in done.output, done.output
