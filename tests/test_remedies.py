"""What a message tells the user to type works when it is typed."""

import json
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from conftest import TINY, flags, make_discs, make_model

from unet_ray.cli import main
from unet_ray.config import TrainConfig
from unet_ray.models import checkpoint
from unet_ray.training.results import rounded


@pytest.fixture
def train(tmp_path):
    """Returns a function that trains on discs into tmp_path/RUN, and returns exit code and output."""
    images, masks = make_discs(tmp_path / "discs", 12)

    def run(*more: object) -> tuple[int, str]:
        command = ["train", "--images", images, "--masks", masks, "--out", tmp_path / "RUN", "--local", "--no-report"]
        result = CliRunner().invoke(main, [str(each) for each in [*command, *flags(TINY), *more]])
        assert "Traceback" not in result.output
        return result.exit_code, result.output

    return run


def history(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "RUN/metrics.jsonl").read_text().splitlines()]


def test_a_rate_that_spoils_the_network_keeps_nothing_of_that_epoch_and_resume_goes_on(train, tmp_path):
    assert train("--epochs", 2)[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "RUN").rglob("*.safetensors")}
    code, output = train("--epochs", 4, "--lr", 1e30, "--resume")
    assert code == 2 and "with --resume, which goes on after epoch 2, and a lower --lr" in output
    assert {path: path.read_bytes() for path in (tmp_path / "RUN").rglob("*.safetensors")} == before
    assert train("--epochs", 4, "--lr", 1e-3, "--resume")[0] == 0
    lines = history(tmp_path)
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4] and lines[-1]["learning_rate"] == 1e-3
    assert "learning_rate: 0.001" in (tmp_path / "RUN/config.yaml").read_text()


def test_a_first_epoch_that_fails_can_be_begun_again(train, tmp_path):
    code, output = train("--lr", 1e30)
    assert code == 2 and "in epoch 1: give the command again with --resume, and a lower --lr" in output
    assert not (tmp_path / "RUN/model").exists()
    assert train("--lr", 1e-3, "--resume")[0] == 0
    assert len(history(tmp_path)) == 2


def test_metrics_hold_null_and_no_nan():
    assert json.dumps(rounded({"a": float("nan"), "b": float("inf"), "c": 1 / 3}), allow_nan=False) == (
        '{"a": null, "b": null, "c": 0.33333333}'
    )


def test_a_run_that_stopped_early_says_so_and_takes_another_patience(train, tmp_path):
    still = ["--lr", 1e-12, "--set", "model.norm=none", "--set", "train.patience=2"]
    assert train("--epochs", 9, *still)[0] == 0
    done = len(history(tmp_path))
    assert done < 9
    code, output = train("--epochs", 12, *still, "--resume")
    assert code == 2 and f"stopped early after epoch {done}" in output
    printed = re.search(r"--set (train\.patience=\d+)", output)[1]
    assert train("--epochs", 12, *still, "--set", printed, "--resume")[0] == 0
    assert len(history(tmp_path)) == done + 2


def test_a_schedule_that_begins_to_rise_again_says_so(train, tmp_path, caplog):
    cosine = ["--set", "train.schedule=cosine"]
    assert train("--epochs", 3, *cosine)[0] == 0 and "rises" not in caplog.text
    assert train("--epochs", 8, *cosine, "--resume")[0] == 0
    said = [record.message for record in caplog.records if "the learning rate rises again, from" in record.message]
    assert len(said) == 1 and "(schedule cosine, to epoch 8)" in said[0]


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_a_norm_with_one_value_is_one_line_and_its_remedy_works(train, tmp_path, norm):
    small = ["--image-size", 16, "--set", "model.depth=4", "--batch-size", 1, "--set", "model.base_channels=8"]
    code, output = train(*small, "--set", f"model.norm={norm}")
    assert code == 2 and f"norm {norm}, batch size 1, image size 16, 4 levels" in output
    printed = re.search(r"--set (model\.norm=\w+)", output)[1]
    assert train(*small, "--set", printed, "--out", tmp_path / "OTHER")[0] == 0


def test_weights_that_are_not_finite_are_refused_and_an_edited_card_is_named(tmp_path):
    model = make_model(tmp_path / "model")
    images, _ = make_discs(tmp_path / "discs", 2)
    card = json.loads((model / "model.json").read_text())
    (model / "model.json").write_text(json.dumps({**card, "threshold": 0.3, "classes": ["background", "x"]}))

    def predict(out: str) -> str:
        command = ["predict", str(model), str(images), "--out", str(tmp_path / out), "--local", "--backend", "torch"]
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 2 and "Traceback" not in result.output
        return result.output

    assert "has another classes, threshold than model.safetensors" in predict("a")
    network, _ = checkpoint.load_model(str(make_model(tmp_path / "other")))
    with torch.no_grad():
        next(network.parameters())[0] = float("nan")
    (model / "model.json").write_text(json.dumps(card))
    checkpoint.save_model(str(model), network, TrainConfig(), {})
    assert safetensors.torch.load_file(str(model / "model.safetensors"))
    assert "some weights are not finite" in predict("b")
