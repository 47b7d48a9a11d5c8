"""The training loop without Ray: plans, schedules, the run directory, resuming."""

import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys

import numpy as np
import pytest
import ray
import safetensors.torch
import torch
from conftest import RUN_FILES, TINY, make_model

from unet_ray.config import AugmentConfig, ModelConfig, OptimizationConfig, UserError
from unet_ray.data import rows
from unet_ray.data.pairs import find_pairs
from unet_ray.data.rows import Decoder, MemoryRows, StreamedRows
from unet_ray.models import build, checkpoint, device
from unet_ray.models.device import ONE_HEAP
from unet_ray.ray_backend.session import LOCAL
from unet_ray.settings import load_train_config
from unet_ray.training.augment import augment
from unet_ray.training.loop import _compiles, prepare
from unet_ray.training.muon import Muon, orthogonalise
from unet_ray.training.optimizers import average_of, build_optimizer
from unet_ray.training.run import Callbacks, train
from unet_ray.training.sampler import MicroBatch, batch_plan
from unet_ray.training.schedules import learning_rate_at, plateau_factor


@pytest.mark.parametrize("count", [1, 7, 12, 13])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_rank_takes_as_many_steps_and_each_row_counts_once(count, world, accumulate):
    plans = [
        batch_plan(count, 4, seed=1, epoch=2, rank=rank, world=world, accumulate=accumulate) for rank in range(world)
    ]
    assert len({len(plan) for plan in plans}) == 1
    seen = []
    for steps in zip(*plans, strict=True):
        parts = [part for step in steps for part in step]
        assert all(1 <= len(step) <= accumulate for step in steps)
        assert sum(part.share for part in parts) == pytest.approx(world)
        batch = [int(i) for part in parts if part.share for i in part.indices]
        assert 1 <= len(batch) <= 4
        seen += batch
    assert sorted(seen) == list(range(count))


def test_batches_do_not_depend_on_the_number_of_workers_but_on_the_epoch():
    def batches(world, epoch):
        plans = [batch_plan(13, 4, seed=1, epoch=epoch, rank=rank, world=world) for rank in range(world)]
        return [{int(i) for [p] in steps if p.share for i in p.indices} for steps in zip(*plans, strict=True)]

    assert batches(1, 1) == batches(2, 1) == batches(3, 1)
    assert batches(1, 1) != batches(1, 2)


def test_batches_of_an_epoch_are_equally_large_give_or_take_one():
    assert {len(part.indices) for [part] in batch_plan(13, 4, seed=0, epoch=1)} == {3, 4}


def test_one_cycle_goes_up_and_down_to_zero():
    config = OptimizationConfig(learning_rate=1.0, schedule="one_cycle")
    rates = [learning_rate_at(config, p) for p in np.linspace(0, 1, 101)]
    assert rates[0] == pytest.approx(1 / 25)
    assert np.argmax(rates) == 15 and max(rates) == pytest.approx(1)
    assert rates[100] == pytest.approx(0, abs=1e-9)
    assert learning_rate_at(OptimizationConfig(learning_rate=1.0, schedule="cosine"), 0.5) == pytest.approx(0.5)
    assert learning_rate_at(OptimizationConfig(learning_rate=1.0), 0.7) == 1.0


def test_warm_up_poly_and_plateau_by_hand():
    warm = OptimizationConfig(learning_rate=1.0, warm_up=0.2, schedule="cosine")
    assert [learning_rate_at(warm, p) for p in (0, 0.1, 0.2, 0.6, 1)] == pytest.approx([0.04, 0.52, 1, 0.5, 0])
    poly = OptimizationConfig(learning_rate=2.0, schedule="poly")
    assert [learning_rate_at(poly, p) for p in (0, 0.5, 1)] == pytest.approx([2, 2 * 0.5**0.9, 0])
    assert learning_rate_at(OptimizationConfig(learning_rate=2.0, schedule="plateau"), 0.5, factor=0.25) == 0.5


def test_the_plateau_schedule_is_torchs():
    config = OptimizationConfig(schedule="plateau", plateau_factor=0.5, plateau_patience=2)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode="max", factor=0.5, patience=2, threshold=0, threshold_mode="abs"
    )
    dices = [0.1, 0.3, 0.2, 0.3, 0.3, 0.1, 0.1, 0.5, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4]
    for count in range(1, len(dices) + 1):
        scheduler.step(dices[count - 1])
        assert plateau_factor(config, dices[:count]) == optimizer.param_groups[0]["lr"]
    assert optimizer.param_groups[0]["lr"] == 1 / 8
    assert plateau_factor(OptimizationConfig(), dices) == 1


def test_biases_and_norms_do_not_decay():
    model = build(ModelConfig(base_channels=4, depth=1))
    decayed, kept = build_optimizer(OptimizationConfig(weight_decay=0.1), model).param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0)
    assert all(p.ndim > 1 for p in decayed["params"]) and all(p.ndim == 1 for p in kept["params"])


def test_muons_steps_are_orthogonal_and_its_other_parameters_take_adamws_steps():
    matrix = torch.randn(8, 36, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(orthogonalise(matrix))
    assert singular.min() > 0.6 and singular.max() < 1.3
    assert torch.allclose(orthogonalise(matrix.T), orthogonalise(matrix).T, atol=1e-6)

    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 5)) for _ in range(2))
    optimizers = [
        Muon([{"params": [ours], "orthogonal": False, "weight_decay": 0.1}], lr=0.05),
        torch.optim.AdamW([theirs], lr=0.05, weight_decay=0.1),
    ]
    for _ in range(4):
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            (parameter**3).sum().backward()
            optimizer.step()
    assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 36), (36, 8), (16, 16), (1, 5)])
def test_muons_steps_are_the_sources_also_where_directions_are_missing(shape):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(side, side, generator=generator))[0] for side in shape)
    rank = min(shape)
    size = torch.logspace(0, -5, rank)
    size[rank // 2 :] = 0 if rank > 1 else 1
    matrix = left[:, :rank] * size @ right[:rank]
    expected = matrix.double() / matrix.double().norm()
    for _ in range(5):
        square = expected @ expected.T
        expected = 3.4445 * expected + (-4.7750 * square + 2.0315 * square @ square) @ expected
    # The source computes in bfloat16, which is off by 1e-2.
    assert torch.allclose(orthogonalise(matrix), expected.float(), atol=1e-3)
    assert not orthogonalise(torch.zeros(shape)).any()


def test_muon_leaves_the_last_layer_biases_and_norms_to_adamw():
    model = build(ModelConfig(base_channels=4, depth=1))
    hidden, head, others = build_optimizer(OptimizationConfig(optimizer="muon"), model).param_groups
    assert hidden["orthogonal"] and all(p.ndim == 4 for p in hidden["params"])
    assert [p is model.head.weight for p in head["params"]] == [True] and not head["orthogonal"]
    assert all(p.ndim == 1 for p in others["params"]) and not others["orthogonal"]
    assert sum(len(g["params"]) for g in (hidden, head, others)) == len(list(model.parameters()))


def test_flips_move_image_and_mask_together_and_depend_on_seed_epoch_and_image_only():
    image = torch.arange(4 * 4 * 6 * 1, dtype=torch.uint8).reshape(4, 4, 6, 1)
    config = AugmentConfig(hflip=0.5, vflip=0.5)

    def flipped(rows, epoch=1):
        arrays = {"image": image[rows], "mask": image[rows, ..., 0]}
        return tuple(augment(arrays, rows, config=config, seed=3, epoch=epoch).values())

    whole_image, whole_mask = flipped([0, 1, 2, 3])
    assert torch.equal(whole_image[..., 0], whole_mask)
    for row in range(4):
        assert torch.equal(flipped([row])[0][0], whole_image[row])
    assert any(not torch.equal(flipped([0, 1, 2, 3], epoch)[0], whole_image) for epoch in range(2, 6))
    arrays = {"image": image, "mask": image[..., 0]}
    always = augment(arrays, [0, 1, 2, 3], config=AugmentConfig(hflip=1), seed=0, epoch=1)
    assert torch.equal(always["image"], image.flip(2))


def config_for(discs, *settings):
    images, masks = discs
    return load_train_config(settings=[("data.images", str(images)), ("data.masks", str(masks)), *TINY, *settings])


def test_rows_in_memory_and_streamed_rows_are_the_same(discs):
    config = config_for(discs, ("data.mask_values", "[0, 255]"))
    pairs = find_pairs(config.data.images, config.data.masks)
    decoder = Decoder.of(config)
    plan = [part.indices for [part] in batch_plan(len(pairs), 5, seed=0, epoch=1)]
    kinds = [list(kind(pairs, decoder).batches(plan)) for kind in (MemoryRows, StreamedRows)]
    assert len(kinds[0]) == len(kinds[1]) == 3
    for one, other in zip(*kinds, strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in ("image", "mask", "index"))
        assert one["image"].dtype == one["mask"].dtype == np.uint8


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


TIMES = {"seconds", "train_seconds", "wait_seconds", "images_per_second"}


def lines(run):
    return [
        {k: v for k, v in json.loads(line).items() if k not in TIMES}
        for line in (run / "metrics.jsonl").read_text().splitlines()
    ]


def weights(run):
    """The checksum of the best model's weights."""
    return json.loads((run / "model/model.json").read_text())["weights_sha256"]


def assert_same_state(one, other):
    """To the last bit: weights, their average, optimizer."""
    ours, theirs = (safetensors.torch.load_file(run / "last/state.safetensors") for run in (one, other))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(name.startswith("optimizer.0.") for name in ours)


def test_a_run_directory_has_all_that_is_promised_and_learns(discs, tmp_path):
    config = config_for(discs, ("train.epochs", 40), ("train.schedule", "one_cycle"))
    told = []
    result = train(config, str(tmp_path / "run"), runtime=LOCAL, callbacks=Callbacks(on_epoch=told.append))
    assert [name for name in files(tmp_path / "run") if not name.startswith("tensorboard/")] == RUN_FILES
    assert result.epochs == len(told) == len(result.history) == 40
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
    assert weights(tmp_path / "one") == weights(tmp_path / "two")


@pytest.mark.slow
def test_a_compiled_training_takes_the_same_steps(discs, tmp_path, caplog):
    lines = []
    for name, compiled in (("plain", False), ("compiled", True)):
        config = config_for(discs, ("compute.compile", compiled))
        lines.append(train(config, str(tmp_path / name), runtime=LOCAL).best)
    assert lines[1]["train_loss"] == pytest.approx(lines[0]["train_loss"], rel=1e-3)
    assert not [record for record in caplog.records if "compiled" in record.getMessage()]


def test_training_is_compiled_where_that_saves_more_than_it_costs(monkeypatch):
    monkeypatch.setattr(device, "bf16_is_fast", lambda _device: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    large = load_train_config(settings=[("model.base_channels", 64), ("model.depth", 4), ("data.image_size", 512)])
    cpu = torch.device("cpu")
    assert not _compiles(large, 50, 1, cpu)
    assert _compiles(large, 5000, 1, cpu)
    assert not _compiles(load_train_config(settings=TINY), 5000, 1, cpu)
    off = dataclasses.replace(large, compute=dataclasses.replace(large.compute, compile=False))
    assert not _compiles(off, 5000, 1, cpu)


FEWEST_FAULTS = """
import resource, sys, threading
import torch
from unet_ray.models.device import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def take():
    # More than glibc gives other threads at once, and more than it by itself ever takes from a heap.
    took = []
    for turn in range(10):
        before = faults()
        arrays = [torch.empty(size * 2**20, dtype=torch.uint8).fill_(1) for size in (40, 100, 300)]
        del arrays
        took.append(faults() - before)
    print(min(took))

if sys.argv[1] == "kept":
    keep_freed_memory(of_any_size=True)
if sys.argv[2] == "thread":
    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
else:
    take()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the heap is glibc's")
@pytest.mark.parametrize(
    "kept, where, environment, again",
    [
        ("never", "main", {}, True),
        ("kept", "main", {}, False),
        ("kept", "thread", {}, True),
        ("kept", "thread", ONE_HEAP, False),
    ],
)
def test_memory_that_was_freed_is_not_taken_from_the_system_again(kept, where, environment, again):
    ran = subprocess.run(
        [sys.executable, "-c", FEWEST_FAULTS, kept, where],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    pages = 440 * 2**20 // os.sysconf("SC_PAGE_SIZE")
    assert (int(ran.stdout) > pages // 2) == again


def test_early_stopping_waits_as_long_as_asked_and_resuming_does_not_wait_anew(discs, tmp_path):
    config = config_for(discs, ("train.epochs", 30), ("train.patience", 3), ("train.learning_rate", 1e-9))
    result = train(config, str(tmp_path / "run"), runtime=LOCAL)
    assert result.epochs == result.best["epoch"] + 3 < 30
    again = train(config, str(tmp_path / "run"), runtime=LOCAL, resume=True)
    assert again.epochs == result.epochs


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


def test_gradients_are_cut_to_the_norm_asked_for(discs):
    config = config_for(discs, ("train.clip_norm", 1e-3), ("train.optimizer", "sgd"), ("train.momentum", 0))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, learning_rate=1.0, weight_decay=0.0))
    run = prepare(config, torch.device("cpu"))
    before = [p.detach().clone() for p in run.network.parameters()]
    run.model.train()
    batch = {
        "image": np.full((2, 32, 32, 3), 9, np.uint8),
        "mask": np.ones((2, 32, 32), np.uint8),
        "index": np.arange(2),
    }
    run.step([(batch, MicroBatch(np.arange(2), 1.0))], 1, epoch=1)
    moved = sum(((p - q) ** 2).sum() for p, q in zip(run.network.parameters(), before, strict=True)).sqrt()
    assert moved.item() == pytest.approx(1e-3, rel=1e-3)


def test_the_average_of_the_weights_by_hand():
    network = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.BatchNorm1d(1, affine=False))
    average = average_of(network, decay=0.9)
    expected = None
    for step in range(30):
        torch.nn.init.constant_(network[0].weight, float(step))
        network[1].running_mean.fill_(10.0 * step)
        average.update_parameters(network)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = float(step) if expected is None else decay * expected + (1 - decay) * step
    assert average.module[0].weight.item() == pytest.approx(expected, rel=1e-5)
    assert average.module[1].running_mean.item() == pytest.approx(10 * expected, rel=1e-5)


def test_with_an_average_it_is_what_is_scored_and_saved(discs, tmp_path):
    config = config_for(discs, ("train.ema", 0.99), ("train.epochs", 3))
    train(config, str(tmp_path / "run"), runtime=LOCAL)
    state = safetensors.torch.load_file(tmp_path / "run/last/state.safetensors")
    model, card = checkpoint.load_model(str(tmp_path / "run/model"))
    assert card.scores["epoch"] == 3 or lines(tmp_path / "run")[-1]["val_dice"] <= card.scores["val_dice"]
    if card.scores["epoch"] == 3:
        assert torch.equal(model.head.weight, state["ema.module.head.weight"])
    assert not torch.equal(state["ema.module.head.weight"], state["model.head.weight"])


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


def test_fp16_on_a_cpu_is_refused(discs, tmp_path):
    with pytest.raises(UserError, match="fp16 is for CUDA"):
        train(config_for(discs, ("train.precision", "fp16")), str(tmp_path / "run"), runtime=LOCAL)


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
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    assert_same_state(tmp_path / "parts", tmp_path / "whole")


def test_a_stop_between_metrics_and_state_repeats_the_epoch(discs, tmp_path, monkeypatch):
    config = config_for(discs, ("train.epochs", 2))
    train(config, str(tmp_path / "whole"), runtime=LOCAL)
    save, calls = checkpoint.save_state, []

    def stopped_save(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        save(*arguments)

    monkeypatch.setattr(checkpoint, "save_state", stopped_save)
    with pytest.raises(KeyboardInterrupt):
        train(config, str(tmp_path / "parts"), runtime=LOCAL)
    monkeypatch.setattr(checkpoint, "save_state", save)
    train(config, str(tmp_path / "parts"), runtime=LOCAL, resume=True)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


def test_an_out_that_holds_something_is_refused(discs, tmp_path):
    config, run = config_for(discs, ("train.epochs", 1)), tmp_path / "run"
    train(config, str(run), runtime=LOCAL)
    with pytest.raises(UserError, match="holds another run: choose another --out, or --resume"):
        train(config, str(run), runtime=LOCAL)
    with pytest.raises(UserError, match="is finished"):
        train(config, str(run), runtime=LOCAL, resume=True)
    with pytest.raises(UserError, match="other settings"):
        train(config_for(discs, ("train.epochs", 2), ("model.norm", "none")), str(run), runtime=LOCAL, resume=True)
    for folder in discs:
        (folder / "z_new.png").write_bytes((folder / "a_000.png").read_bytes())
    with pytest.raises(UserError, match="images have come, gone or changed sides"):
        train(config_for(discs, ("train.epochs", 2)), str(run), runtime=LOCAL, resume=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    with pytest.raises(UserError, match="holds other files"):
        train(config, str(tmp_path / "mine"), runtime=LOCAL)


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


def test_weights_of_another_model_are_refused(discs, tmp_path):
    train(config_for(discs, ("train.epochs", 1)), str(tmp_path / "run"), runtime=LOCAL)
    model = tmp_path / "run/model"
    good = (model / "model.safetensors").read_bytes()
    for bad, message in ((good[:-4] + b"\0\0\0\0", "damaged"), (good[:-4], "damaged"), (good[:40], "not a model's")):
        (model / "model.safetensors").write_bytes(bad)
        with pytest.raises(UserError, match=message):
            checkpoint.load_model(str(model))
    (model / "model.safetensors").write_bytes(good)
    card = json.loads((model / "model.json").read_text())
    (model / "model.json").write_text(json.dumps({**card, "mask_values": [0, 7]}))
    with pytest.raises(UserError, match="of different models"):
        checkpoint.load_model(str(model))
    (model / "model.json").write_text("{}")
    with pytest.raises(UserError, match="not a model card"):
        checkpoint.load_model(str(model))


def test_a_kill_between_the_two_files_of_the_best_model_leaves_a_model(discs, tmp_path):
    train(config_for(discs, ("train.epochs", 3)), str(tmp_path / "run"), runtime=LOCAL)
    card = json.loads((tmp_path / "run/model/model.json").read_text())
    older = {**card, "scores": {"epoch": 1}, "weights_sha256": "0" * 64}
    (tmp_path / "run/model/model.json").write_text(json.dumps(older))
    _, loaded = checkpoint.load_model(str(tmp_path / "run/model"))
    assert (loaded.scores, loaded.weights_sha256) == (card["scores"], card["weights_sha256"])


# --- train.init: weights to start from ---


@pytest.fixture
def given(tmp_path):
    """A model directory whose weights and running statistics are like no fresh network's."""
    location = make_model(tmp_path / "given", ("model.num_classes", 3), ("data.mask_values", [0, 1, 2]), seed=99)
    model, _ = checkpoint.load_model(str(location))
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor += 0.125
    config = load_train_config(
        settings=[*TINY, *checkpoint.model_settings_of(str(location)), ("data.mask_values", [0, 1, 2])]
    )
    checkpoint.save_model(str(location), model, config, {})
    return str(location)


def prepared(location, *settings, resumes=False):
    """The networks, trained and averaged, before their first step; as tensors by name."""
    settings = [*TINY, *checkpoint.model_settings_of(location), ("train.init", location), ("train.ema", 0.9), *settings]
    training = prepare(load_train_config(settings=settings), torch.device("cpu"), resumes=resumes)
    return [network.state_dict() for network in training.networks]


def test_a_training_starts_from_the_weights_of_init_and_so_does_their_average(given):
    expected = checkpoint.load_model(given)[0].state_dict()
    for tensors in prepared(given, ("model.dropout", 0.2)):
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    fresh = prepared(given, resumes=True)[0]  # a state has the weights then
    assert not any(torch.equal(fresh[name], expected[name]) for name in expected if name.endswith("weight"))


def test_a_last_layer_of_other_classes_is_left_as_it_is_initialised(given):
    expected = checkpoint.load_model(given)[0].state_dict()
    tensors = prepared(given, ("model.num_classes", 1))[0]
    fresh = prepared(given, ("model.num_classes", 1), resumes=True)[0]
    assert tensors["head.weight"].shape[0] == 1
    for name in expected:
        assert torch.equal(tensors[name], fresh[name] if name.startswith("head.") else expected[name]), name


def test_the_last_layer_of_other_networks_is_found_too():
    model = build(ModelConfig(name="fcn"))
    assert checkpoint._of_head(model) == {"network.classifier.4.weight", "network.classifier.4.bias"}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (("model.base_channels", 8), "its model.base_channels is 4, not 8: set model.base_channels to 4"),
        (("model.norm", "group"), "its model.norm is batch, not group"),
        (("model.pixel_mean", 0), "its model.pixel_mean is 0.5, not 0.0"),
        (("train.init", "none"), "none: no such folder"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_anything_is_written(discs, given, tmp_path, setting, message):
    settings = [*checkpoint.model_settings_of(given), ("model.num_classes", 1), ("train.init", given), setting]

    with pytest.raises(UserError, match=message) as error:
        train(config_for(discs, *settings), str(tmp_path / "run"))
    assert not ray.is_initialized()
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_fine_tuned_run_resumes_without_the_weights_it_began_with(discs, given, tmp_path, monkeypatch):
    settings = [*checkpoint.model_settings_of(given), ("model.num_classes", 1), ("train.epochs", 4)]
    monkeypatch.chdir(tmp_path)
    config = config_for(discs, *settings, ("train.init", "given"))
    train(config, "whole", runtime=LOCAL)
    stopped = dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=2))
    train(stopped, "run", runtime=LOCAL)
    kept = load_train_config(config_file=(tmp_path / "run/config.yaml").read_text())
    assert kept.train.init == given  # absolute
    shutil.rmtree(given)
    train(config, "run", runtime=LOCAL, resume=True)
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    assert_same_state(tmp_path / "run", tmp_path / "whole")
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, init=None, epochs=5))
    with pytest.raises(UserError, match="trained with other settings"):
        train(other, "run", runtime=LOCAL, resume=True)


def test_the_settings_of_a_network_build_it_again(given):
    settings = dict(checkpoint.model_settings_of(given))
    assert (settings["model.num_classes"], settings["model.base_channels"]) == (3, 4)
    assert load_train_config(settings=settings.items()).model == checkpoint.read_card(given).model
    with pytest.raises(UserError, match="no such folder"):
        checkpoint.model_settings_of(given + "/none")
