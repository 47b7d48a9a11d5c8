"""Helps the tests of training: settings of short trainings of discs, and the contents of run directories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from click.testing import CliRunner
from conftest import TINY, flags, make_discs

from unet_ray.cli import main
from unet_ray.config import TrainConfig
from unet_ray.settings import load_train_config

TIMES = {"seconds", "train_seconds", "wait_seconds", "images_per_second"}
"""Fields of metrics.jsonl that differ between equal runs."""


def config_for(discs: tuple[Path, Path], *settings: tuple[str, Any]) -> TrainConfig:
    """Returns the settings of a training of two seconds on these images and masks."""
    images, masks = discs
    return load_train_config(settings=[("data.images", str(images)), ("data.masks", str(masks)), *TINY, *settings])


def lines(run: Path) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl without the times."""
    text = (run / "metrics.jsonl").read_text()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in text.splitlines()]


def weights_sha256(run: Path) -> str:
    """Returns the checksum of the best model's weights."""
    return json.loads((run / "model/model.json").read_text())["weights_sha256"]


def assert_same_state(one: Path, other: Path) -> None:
    """Asserts that weights, their average and the optimizer's state are equal to the last bit."""
    ours, theirs = (safetensors.torch.load_file(run / "last/state.safetensors") for run in (one, other))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(name.startswith("optimizer.0.") for name in ours)


def trained_on_discs(folder: Path, count: int, *settings: tuple[str, object], unlabeled: int = 0) -> Path:
    """Trains on `count` discs in `folder`, of which the last `unlabeled` have no mask. Returns the run directory."""
    images, masks = make_discs(folder, count)
    for path in sorted(masks.iterdir())[count - unlabeled :]:
        path.unlink()
    command = ["train", "--images", images, "--masks", masks, "--out", folder / "RUN", "--local", "--no-report"]
    done = CliRunner().invoke(main, [*map(str, command), *flags([*TINY, *settings])])
    assert done.exit_code == 0, done.output
    return folder / "RUN"
