"""The training loop in one process: the run directory, resuming, each setting."""

import dataclasses
import json

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import RUN_FILES, TINY
from runs import assert_same_state, config_for, lines, weights_sha256

from unet_ray.config import ModelConfig, UserError
from unet_ray.data import rows
from unet_ray.models import checkpoint, device, training_state
from unet_ray.ray_backend.session import LOCAL
from unet_ray.settings import load_train_config
from unet_ray.training.loop import _compiles
from unet_ray.training.run import Callbacks, train
from unet_ray.training.sampler import Sampler


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_a_run_directory_has_all_that_is_promised_and_learns(discs, tmp_path):
    config = config_for(discs, ("train.epochs", 40), ("train.schedule", "one_cycle"))
    reported = []
    result = train(config, str(tmp_path / "run"), runtime=LOCAL, callbacks=Callbacks(on_epoch=reported.append))
    assert [name for name in files(tmp_path / "run") if not name.startswith("tensorboard/")] == RUN_FILES
    assert result.epochs == len(reported) == len(result.history) == 40
    assert result.best["val_dice"] > 0.8
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"] / 2
    for name in (
        "epoch",
        "train_loss",
        "val_loss",
        "val_dice",
        "val_iou",
        "val_pixel_accuracy",
        "learning_rate",
        "images_per_second",
        "wait_seconds",
        "seconds",
    ):
        assert name in result.history[0]
    card = json.loads((tmp_path / "run/model/model.json").read_text())
    assert (card["mask_values"], card["image_size"], card["threshold"]) == ([0, 255], [32, 32], 0.5)
    assert card["scores"]["epoch"] == result.best["epoch"]


def test_a_runs_config_runs_again_and_the_same_command_gives_the_same_figures(discs, tmp_path):
    train(config_for(discs), str(tmp_path / "one"), runtime=LOCAL)
    again = load_train_config(config_file=(tmp_path / "one/config.yaml").read_text())
    train(again, str(tmp_path / "two"), runtime=LOCAL)
    assert lines(tmp_path / "one") == lines(tmp_path / "two")
    assert weights_sha256(tmp_path / "one") == weights_sha256(tmp_path / "two")


def test_a_compiled_training_takes_the_same_steps(discs, tmp_path, caplog):
    lines = []
    for name, compiled in (("plain", False), ("compiled", True)):
        # All batches have one size and the network is small: each batch size and each kind of layer takes seconds to
        # compile.
        config = config_for(discs, ("compute.compile", compiled), ("train.batch_size", 5), ("model.depth", 1))
        lines.append(train(config, str(tmp_path / name), runtime=LOCAL).best)
    assert lines[1]["train_loss"] == pytest.approx(lines[0]["train_loss"], rel=1e-3)
    assert not [record for record in caplog.records if "compiled" in record.getMessage()]


def test_training_is_compiled_where_that_saves_more_than_it_costs(monkeypatch):
    monkeypatch.setattr(device, "bf16_is_fast", lambda _device: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    large = load_train_config(settings=[("model.base_channels", 64), ("model.depth", 4), ("data.image_size", 512)])

    def compiles(config, rows):
        return _compiles(config, Sampler.of(config.train, rows), torch.device("cpu"))

    assert not compiles(large, 50)
    assert compiles(large, 5000)
    assert not compiles(load_train_config(settings=TINY), 5000)
    off = dataclasses.replace(large, compute=dataclasses.replace(large.compute, compile=False))
    assert not compiles(off, 5000)


def test_early_stopping_waits_as_long_as_asked_and_resuming_does_not_wait_anew(discs, tmp_path):
    config = config_for(discs, ("train.epochs", 30), ("train.patience", 3), ("train.learning_rate", 1e-9))
    result = train(config, str(tmp_path / "run"), runtime=LOCAL)
    assert result.epochs == result.best["epoch"] + 3 < 30
    with pytest.raises(UserError, match=f"stopped early after epoch {result.epochs}"):
        train(config, str(tmp_path / "run"), runtime=LOCAL, resume=True)


def test_a_batch_in_parts_is_the_same_batch(discs, tmp_path):
    for name, parts in (("whole", 1), ("parts", 3)):
        config = config_for(
            discs,
            ("model.norm", "none"),
            ("train.accumulate", parts),
            ("train.clip_norm", 0.5),
            ("train.loss", "focal"),
        )
        train(config, str(tmp_path / name), runtime=LOCAL)
    for ours, theirs in zip(lines(tmp_path / "whole"), lines(tmp_path / "parts"), strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)
        assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-4)


def test_with_an_average_it_is_what_is_scored_and_saved(discs, tmp_path):
    config = config_for(discs, ("train.ema", 0.99), ("train.epochs", 1))  # one epoch, so that the best is the last
    train(config, str(tmp_path / "run"), runtime=LOCAL)
    state = safetensors.torch.load_file(tmp_path / "run/last/state.safetensors")
    model, card = checkpoint.load_model(str(tmp_path / "run/model"))
    assert card.scores["epoch"] == 1
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[f"ema.module.{name}"]), name
    assert not torch.equal(model.head.weight, state["model.head.weight"])


def test_every_setting_of_training_at_once_trains(discs, tmp_path):
    config = config_for(
        discs,
        ("model.name", "attention_unet"),
        ("data.tile", 24),
        ("augment.elastic", 3),
        ("augment.rotation", 20),
        ("augment.quarter_turns", "true"),
        ("augment.brightness", 0.1),
        ("train.loss", "bce+dice+focal+tversky"),
        ("train.class_weights", "inverse"),
        ("train.border_weight", 10),
        ("train.optimizer", "muon"),
        ("train.schedule", "poly"),
        ("train.warm_up", 0.1),
        ("train.clip_norm", 1),
        ("train.accumulate", 2),
        ("train.ema", 0.9),
        ("train.checkpoint_activations", "true"),
        ("train.epochs", 20),
    )
    result = train(config, str(tmp_path / "run"), runtime=LOCAL)
    assert result.history[-1]["train_loss"] < 0.7 * result.history[0]["train_loss"]
    written = load_train_config(config_file=(tmp_path / "run/config.yaml").read_text())
    background, foreground = written.train.class_weights
    assert background < 1 < foreground


@pytest.mark.parametrize(
    ("optimizer", "more"),
    [
        ("adamw", [("train.ema", 0.9)]),
        ("adam", [("train.schedule", "plateau"), ("train.plateau_patience", 0), ("augment.elastic", 2)]),
        ("sgd", [("train.schedule", "poly")]),
        ("rmsprop", []),
        ("muon", []),
    ],
)
def test_resumed_is_uninterrupted(discs, tmp_path, optimizer, more):
    config = config_for(
        discs,
        ("train.epochs", 4),
        ("model.dropout", "0.2"),
        ("train.schedule", "cosine"),
        ("train.optimizer", optimizer),
        ("train.learning_rate", 1e-4 if optimizer == "sgd" else 3e-3),
        *more,
    )
    train(config, str(tmp_path / "whole"), runtime=LOCAL)

    def stop_after_two(line):
        if line["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, str(tmp_path / "parts"), runtime=LOCAL, callbacks=Callbacks(on_epoch=stop_after_two))
    ran = []
    train(
        config,
        str(tmp_path / "parts"),
        runtime=LOCAL,
        resume=True,
        callbacks=Callbacks(on_epoch=lambda line: ran.append(line["epoch"])),
    )
    assert ran == [3, 4]
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    assert weights_sha256(tmp_path / "parts") == weights_sha256(tmp_path / "whole")
    assert_same_state(tmp_path / "parts", tmp_path / "whole")


def test_a_stop_between_metrics_and_state_repeats_the_epoch(discs, tmp_path, monkeypatch):
    config = config_for(discs, ("train.epochs", 2))
    train(config, str(tmp_path / "whole"), runtime=LOCAL)
    save, calls = training_state.save_state, []

    def stopped_save(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        save(*arguments)

    monkeypatch.setattr(training_state, "save_state", stopped_save)
    with pytest.raises(KeyboardInterrupt):
        train(config, str(tmp_path / "parts"), runtime=LOCAL)
    monkeypatch.setattr(training_state, "save_state", save)
    train(config, str(tmp_path / "parts"), runtime=LOCAL, resume=True)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


def test_what_does_not_fit_in_memory_is_streamed_with_the_same_result(discs, tmp_path, monkeypatch):
    train(config_for(discs), str(tmp_path / "memory"), runtime=LOCAL)
    monkeypatch.setattr(rows, "MemoryRows", None)  # must not be used
    train(config_for(discs, ("compute.memory_fraction", "0")), str(tmp_path / "stream"), runtime=LOCAL)
    assert lines(tmp_path / "memory") == lines(tmp_path / "stream")


def test_several_classes_with_ignored_pixels_train(discs, tmp_path):
    from PIL import Image

    _, masks = discs
    for path in masks.iterdir():
        mask = np.asarray(Image.open(path)) // 255
        mask = np.where(mask == 1, np.where(np.arange(32) < 16, 1, 2), 0).astype(np.uint8)
        mask[:2] = 11
        Image.fromarray(mask).save(path)
    config = config_for(
        discs, ("model.num_classes", 3), ("data.ignore_index", 11), ("data.classes", "[background, left, right]")
    )
    result = train(config, str(tmp_path / "run"), runtime=LOCAL)
    assert result.history[0]["val_pixels"] == result.history[0]["val_images"] * 30 * 32
    assert len(result.history[0]["val_counts"]) == 3


def test_the_2015_network_trains_on_mirrored_tiles(discs, tmp_path):
    size = next(s for s in range(24, 40) if ModelConfig(padding="valid", depth=2).fits(s))
    config = config_for(discs, ("model.padding", "valid"), ("data.image_size", size), ("train.epochs", 1))
    assert train(config, str(tmp_path / "run"), runtime=LOCAL).epochs == 1


def test_a_loss_that_explodes_is_an_error_with_the_remedy(discs, tmp_path):
    config = config_for(discs, ("train.learning_rate", 1e30), ("train.optimizer", "sgd"), ("model.norm", "none"))
    with pytest.raises(UserError, match="lower --lr"):
        train(config, str(tmp_path / "run"), runtime=LOCAL)


def test_without_validation_everything_is_trained_on_and_the_last_epoch_is_kept(discs, tmp_path):
    config = config_for(discs, ("data.val_fraction", 0), ("train.epochs", 3))
    run = tmp_path / "run"
    started = []
    result = train(config, str(run), runtime=LOCAL, callbacks=Callbacks(on_start=started.append))
    assert [(len(split.train), len(split.val)) for split in started] == [(12, 0)]
    assert result.best["epoch"] == 3
    assert not [name for name in result.best if name.startswith("val_")]
    assert repr(result).startswith("TrainResult: 3 epochs, kept: epoch 3, the last one; no image was held out")
    assert json.loads((run / "model/model.json").read_text())["scores"]["epoch"] == 3
    stopped = tmp_path / "stopped"
    for epochs in (1, 3):
        longer = dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=epochs))
        train(longer, str(stopped), runtime=LOCAL, resume=epochs > 1)
    assert weights_sha256(run) == weights_sha256(stopped)


@pytest.mark.parametrize("setting", [("train.patience", 2), ("train.schedule", "plateau")])
def test_settings_that_go_by_validation_need_some(discs, tmp_path, setting):
    config = config_for(discs, ("data.val_fraction", 0), setting)
    with pytest.raises(UserError, match=rf"{setting[0]}={setting[1]} goes by validation scores"):
        train(config, str(tmp_path / "run"), runtime=LOCAL)
    assert not (tmp_path / "run").exists()
