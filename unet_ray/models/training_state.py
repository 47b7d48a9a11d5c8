"""Saves and loads the state of a training, so that a stopped one can be resumed. No pickle: safetensors.

last/state.safetensors holds the weights, their moving average, the optimizer, the gradient scaler and the epoch in one
file, so a stop at any moment leaves the old state or the new one.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from unet_ray.config import UserError
from unet_ray.data import storage
from unet_ray.models.checkpoint import read_text_entries, text_entries

STATE = "state.safetensors"


@dataclass(slots=True)
class TrainingState:
    """The state of a training after a finished epoch."""

    epoch: int
    """Number of finished epochs."""
    best: float
    """Highest validation Dice so far."""
    settings: str
    """config.yaml of the run."""


def save_state(
    location: str,
    state: TrainingState,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    ema: nn.Module | None,
) -> None:
    """Writes the state into the folder `location`, as one file."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    if ema is not None:
        tensors |= {f"ema.{name}": tensor for name, tensor in ema.state_dict().items()}
    saved = optimizer.state_dict()
    for index, values in saved["state"].items():
        for name, value in values.items():
            if value is not None:
                tensors[f"optimizer.{index}.{name}"] = torch.as_tensor(value)
    metadata = {
        "state": json.dumps(dataclasses.asdict(state)),
        "param_groups": json.dumps(saved["param_groups"]),
        "scaler": json.dumps(scaler.state_dict()),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    storage.write_bytes(storage.join(location, STATE), safetensors.torch.save(tensors, metadata), durable=True)


def load_state(
    location: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    ema: nn.Module | None,
) -> TrainingState | None:
    """Loads a saved state into the model, the optimizer, the scaler and the moving average.

    Returns None if there is no saved state. Raises UserError if it does not fit.
    """
    path = storage.join(location, STATE)
    if not storage.exists(path):
        return None
    data = storage.read_bytes(path)
    try:
        metadata, tensors = text_entries(data), _by_owner(safetensors.torch.load(data))
        state = TrainingState(**json.loads(metadata["state"]))
        model.load_state_dict(tensors["model"])
        if ema is not None:
            ema.load_state_dict(tensors["ema"])
        scaler.load_state_dict(json.loads(metadata["scaler"]))
        _load_optimizer(optimizer, tensors["optimizer"], json.loads(metadata["param_groups"]))
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: not the state of this training ({' '.join(str(error).split())[:200]})") from None
    return state


def has_state(location: str) -> bool:
    """Returns whether a training has saved its state in this folder."""
    return storage.exists(storage.join(location, STATE))


def read_state(location: str) -> TrainingState | None:
    """Reads a saved state without its tensors; None if there is none."""
    path = storage.join(location, STATE)
    if not storage.exists(path):
        return None
    return TrainingState(**json.loads(read_text_entries(path)["state"]))


def _by_owner(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Groups the file's tensors by owner (`model`, `ema`, `optimizer`), under the names that the owner gives them."""
    owners: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        owner, _, own_name = name.partition(".")
        owners[owner][own_name] = tensor
    return owners


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], param_groups: list[dict]) -> None:
    """Loads an optimizer's state from tensors named `<index of the parameter>.<name>`."""
    by_parameter: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        by_parameter.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": by_parameter, "param_groups": param_groups})
    # Fused optimizers walk parameter and state in the order of memory. A channels_last weight needs its momentum in
    # channels_last too; otherwise the two are mixed up without an error.
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
