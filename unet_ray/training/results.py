"""metrics.jsonl and the result of a training."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from unet_ray.data import storage
from unet_ray.models import training_state
from unet_ray.models.run_files import LAST, METRICS, MODEL


@dataclass(frozen=True, slots=True)
class TrainResult:
    """A finished training, as `train` returns it."""

    out: str
    """The run directory."""
    epochs: int
    best: dict[str, Any]
    """The line of metrics.jsonl of the epoch whose weights are in `model/`: that with the highest validation Dice, or
    the last one if no image is validated on."""
    history: list[dict[str, Any]]
    """All lines of metrics.jsonl, one per epoch."""
    problem: str = ""
    """The likely reason, in the data or in the settings, why the network finds nothing; empty: it finds something."""

    def __repr__(self) -> str:
        out = storage.without_secrets(self.out)
        return (
            f"TrainResult: {self.epochs} epochs, {self.kept}\n"
            f"  model: {storage.join(out, MODEL)}\n"
            f"  next: unet_ray.predict({out!r}, 'FOLDER', 'MASKS'), unet_ray.evaluate({out!r}), "
            f"unet_ray.Segmenter({out!r})(image)"
        )

    @property
    def kept(self) -> str:
        """Which epoch's weights are in `model/`, in words."""
        epoch = self.best["epoch"]
        if "val_dice" not in self.best:
            return f"kept: epoch {epoch}, the last one; no image was held out to validate on"
        return f"best: epoch {epoch}, validation Dice {self.best['val_dice']:.4f}"


def read_metrics(out: str) -> list[dict[str, Any]]:
    """Returns the lines of a run's metrics.jsonl; empty if there is no such file."""
    path = storage.join(out, METRICS)
    if not storage.exists(path):
        return []
    return [json.loads(line) for line in storage.read_bytes(path).splitlines()]


def write_metrics(out: str, history: Iterable[dict[str, Any]]) -> None:
    """Writes the whole of metrics.jsonl, because nothing can be appended to a file in a bucket."""
    text = "".join(json.dumps(line) + "\n" for line in history)
    storage.write_bytes(storage.join(out, METRICS), text.encode(), durable=True)


def rounded(line: dict[str, Any]) -> dict[str, Any]:
    """Rounds the numbers of a line to 8 significant digits; one that is not finite becomes None, as JSON has no NaN."""

    def short(value: Any) -> Any:
        if not isinstance(value, float):
            return value
        return float(f"{value:.8g}") if math.isfinite(value) else None

    return {key: short(value) for key, value in line.items()}


def result_of(out: str) -> TrainResult:
    """Reads the result of a run directory."""
    history = read_metrics(out)
    best = max(history, key=lambda line: line["val_dice"]) if "val_dice" in history[-1] else history[-1]
    return TrainResult(out=out, epochs=len(history), best=best, history=history)


def epochs_done(out: str) -> int:
    """Returns the number of epochs that a run has finished, as `last/` says; 0 if there is no `last/`."""
    state = training_state.read_state(storage.join(out, LAST))
    return state.epoch if state else 0
