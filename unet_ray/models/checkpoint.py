"""The model directory, and what a stopped training needs to go on. No pickle: safetensors and JSON.

model/model.safetensors  the weights, and in its header the card: one file, so the best model is whole or absent
model/model.json         the card, all else that predict needs, for people and other programs
model/cleanup.json       the clean-up of masks that validation has chosen, if it was asked
model/int8-*.xml, .bin   the network in int8 for OpenVINO, if `unet-ray quantize` has made it
model/int8.json          which that is, and its score beside the network's own; there only if that was good enough
last/state.safetensors   weights, their average, optimizer, scaler and place of the last finished epoch, in one file
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from unet_ray import __version__
from unet_ray.config import DataConfig, ModelConfig, TrainConfig, UserError, ValueRange
from unet_ray.data import storage
from unet_ray.models import SegmentationModel, build
from unet_ray.settings import from_mapping

FORMAT = 1
"""Raised when an older package could not read a newer directory."""
WEIGHTS, CARD, STATE = "model.safetensors", "model.json", "state.safetensors"
CLEANUP, INT8 = "cleanup.json", "int8.json"


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What `model.json` says: everything predict needs, so that no flag is repeated."""

    model: ModelConfig
    image_size: tuple[int, int]
    """(height, width) that images are resized to."""
    tile: int
    """See `DataConfig.tile`."""
    mask_values: tuple[int, ...]
    ignore_index: int | None
    value_range: ValueRange
    classes: tuple[str, ...]
    flips: str
    """What test-time flips may be used: `h`, `v` or both, as in training."""
    threshold: float
    """Sigmoid above which a pixel is the foreground (one class only)."""
    scores: dict[str, Any]
    """The line of metrics.jsonl of the epoch these weights are from."""
    weights_sha256: str
    """Of the data part of model.safetensors, all after the header."""

    @property
    def data(self) -> DataConfig:
        """How this model's images and masks are decoded."""
        return DataConfig(
            image_size=self.image_size,
            tile=self.tile,
            mask_values=self.mask_values,
            ignore_index=self.ignore_index,
            value_range=self.value_range,
            classes=self.classes,
        )


def save_model(
    location: str,
    model: nn.Module,
    config: TrainConfig,
    scores: dict[str, Any],
    threshold: float = 0.5,
) -> None:
    """Writes a model directory; an older one there is replaced."""
    data, augment = config.data, config.augment
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    assert data.mask_values is not None
    card = {
        "format": FORMAT,
        "package_version": __version__,
        "model": dataclasses.asdict(config.model),
        "image_size": list(data.size_hw),
        "tile": data.tile,
        "mask_values": list(data.mask_values),
        "ignore_index": data.ignore_index,
        "value_range": data.value_range,
        "classes": list(data.classes),
        "flips": "h" * bool(augment.hflip) + "v" * bool(augment.vflip or augment.quarter_turns),
        "threshold": threshold,
        "scores": scores,
        "weights_sha256": hashlib.sha256(_split(safetensors.torch.save(tensors))[1]).hexdigest(),
    }
    weights = safetensors.torch.save(tensors, {"card": json.dumps(card)})
    storage.write_bytes(storage.join(location, WEIGHTS), weights, durable=True)
    storage.write_bytes(storage.join(location, CARD), (json.dumps(card, indent=2) + "\n").encode(), durable=True)


def model_directory(location: str) -> str:
    """The model directory that a MODEL argument names: itself, or the best model of a run directory."""
    for candidate in (location, storage.join(location, "model")):
        if storage.exists(storage.join(candidate, CARD)):
            return candidate
    what = "no such folder" if not storage.exists(location) else "no model in it"
    raise UserError(f"{location}: {what}: name a run (--out of `unet-ray train`) or its model folder")


def read_card(location: str) -> ModelCard:
    """The card of a model directory. Raises UserError if it is not one that this version reads."""
    return _card(storage.read_bytes(storage.join(location, CARD)), storage.join(location, CARD))


def _card(data: bytes | str, where: str) -> ModelCard:
    try:
        # Cards of before there were these say nothing of them.
        values = {"value_range": None, "flips": "h", **json.loads(data)}
        if values["format"] > FORMAT:
            raise UserError(
                f"{where}: written by unet_ray {values['package_version']}, newer than this {__version__}: upgrade"
            )
        return ModelCard(
            model=from_mapping(ModelConfig, values["model"], "model."),
            image_size=tuple(values["image_size"]),
            tile=values["tile"],
            mask_values=tuple(values["mask_values"]),
            ignore_index=values["ignore_index"],
            value_range=from_mapping(DataConfig, {"value_range": values["value_range"]}).value_range,
            classes=tuple(values["classes"]),
            flips=values["flips"],
            threshold=values["threshold"],
            scores=values["scores"],
            weights_sha256=values["weights_sha256"],
        )
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"{where}: not a model card ({error!r})") from None


def load_model(location: str) -> tuple[SegmentationModel, ModelCard]:
    """The network of a model directory with its weights, on the CPU, and the card. Raises UserError."""
    path = storage.join(location, WEIGHTS)
    data = storage.read_bytes(path)
    try:
        card = _card(_metadata(data)["card"], path)
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: not a model's weights ({error!r}): copy the folder again, whole") from None
    if hashlib.sha256(_split(data)[1]).hexdigest() != card.weights_sha256:
        raise UserError(f"{path}: damaged (its checksum is another): copy the folder again, whole")
    # A training that was killed between the two files leaves the older model.json, of the same network.
    beside = read_card(location)
    if dataclasses.replace(beside, scores=card.scores, weights_sha256=card.weights_sha256) != card:
        raise UserError(f"{location}: {CARD} and {WEIGHTS} are of different models: copy the folder again, whole")
    model = build(dataclasses.replace(card.model, pretrained=False))
    model.load_state_dict(safetensors.torch.load(data))
    return model, card


MAY_DIFFER = ("num_classes", "dropout", "pretrained")
"""Of `model.`, what a network may have otherwise than the one whose weights it starts from."""


def model_settings_of(location: str) -> list[tuple[str, Any]]:
    """The `model.` settings, dotted names and values, of the network in a run or model directory, for
    `load_train_config`. Raises UserError."""
    card = read_card(model_directory(storage.absolute(location)))
    values = dataclasses.asdict(dataclasses.replace(card.model, pretrained=False))
    return [(f"model.{name}", value) for name, value in values.items()]


def check_init(location: str, config: ModelConfig) -> str:
    """The model directory of `train.init`. Raises UserError unless a network of this config can start from it."""
    location = model_directory(storage.absolute(location))
    theirs = read_card(location).model
    for field in dataclasses.fields(ModelConfig):
        ours, other = getattr(config, field.name), getattr(theirs, field.name)
        if ours != other and field.name not in MAY_DIFFER:
            raise UserError(
                f"--init {location}: its model.{field.name} is {other}, not {ours}: set model.{field.name} to {other}"
            )
    return location


def start_from(location: str, network: SegmentationModel) -> None:
    """Gives a network the weights of a run or model directory; its last layer stays as it is where that has another
    number of classes. Raises UserError if they don't fit."""
    given, card = load_model(check_init(location, network.config))
    tensors = given.state_dict()
    if card.model.num_classes != network.config.num_classes:
        fresh = network.state_dict()
        tensors |= {name: fresh[name] for name in _of_head(network)}
    network.load_state_dict(tensors)


def _of_head(network: SegmentationModel) -> set[str]:
    """Names of the last layer's tensors."""
    mine = {id(tensor) for tensor in network.head.state_dict(keep_vars=True).values()}
    return {name for name, tensor in network.state_dict(keep_vars=True).items() if id(tensor) in mine}


def read_cleanup(location: str, card: ModelCard) -> str:
    """The clean-up that was chosen for the model in this directory; `none` if none was, or for other weights."""
    chosen = read_choice(location, CLEANUP, card)
    return "none" if chosen is None else chosen["cleanup"]


def read_choice(location: str, name: str, card: ModelCard) -> dict[str, Any] | None:
    """What validation has chosen for the model in this directory; None if nothing was, or for other weights."""
    path = storage.join(location, name)
    if not storage.exists(path):
        return None
    chosen = json.loads(storage.read_bytes(path))
    return chosen if chosen["weights_sha256"] == card.weights_sha256 else None


def save_choice(location: str, name: str, card: ModelCard, chosen: dict[str, Any]) -> None:
    """Keeps a choice for `read_choice`."""
    chosen = {**chosen, "weights_sha256": card.weights_sha256}
    storage.write_bytes(storage.join(location, name), (json.dumps(chosen, indent=2) + "\n").encode())


@dataclass(slots=True)
class TrainingState:
    """Where a training stands after a finished epoch."""

    epoch: int
    """Epochs finished."""
    best: float
    """Highest validation Dice so far."""
    settings: str
    """config.yaml of the run it belongs to."""


def save_state(
    location: str,
    state: TrainingState,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    ema: nn.Module | None,
) -> None:
    """Writes `last/`: one file, so a stop at any moment leaves the old state or the new one."""
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
    """Puts a saved state into all of these; None if there is none. Raises UserError if it does not fit."""
    path = storage.join(location, STATE)
    if not storage.exists(path):
        return None
    data = storage.read_bytes(path)
    try:
        metadata, tensors = _metadata(data), safetensors.torch.load(data)
        state = TrainingState(**json.loads(metadata["state"]))
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        model.load_state_dict(parts["model"])
        if ema is not None:
            ema.load_state_dict(parts["ema"])
        scaler.load_state_dict(json.loads(metadata["scaler"]))
        by_parameter: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts["optimizer"].items():
            index, _, key = name.partition(".")
            by_parameter.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({"state": by_parameter, "param_groups": json.loads(metadata["param_groups"])})
        # Fused optimizers walk parameter and state in the order of memory: a channels_last weight needs its momentum
        # in channels_last too, or the two are mixed up without a word.
        for parameter, values in optimizer.state.items():
            for name, value in values.items():
                if value.shape == parameter.shape:
                    values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: not the state of this training ({' '.join(str(error).split())[:200]})") from None
    return state


def has_state(location: str) -> bool:
    """Whether a training has saved its state there."""
    return storage.exists(storage.join(location, STATE))


def read_state(location: str) -> TrainingState | None:
    """Only the place of a saved state, without its tensors; None if there is none."""
    path = storage.join(location, STATE)
    if not storage.exists(path):
        return None
    return TrainingState(**json.loads(_metadata(storage.read_bytes(path))["state"]))


def _metadata(data: bytes) -> dict[str, str]:
    """The header's text entries."""
    return json.loads(_split(data)[0])["__metadata__"]


def _split(data: bytes) -> tuple[bytes, memoryview]:
    """Header (JSON) and data part of a safetensors file; it begins with the header's length in 8 bytes."""
    end = 8 + int.from_bytes(data[:8], "little")
    return data[8:end], memoryview(data)[end:]


METRICS, CONFIG, MODEL, LAST = "metrics.jsonl", "config.yaml", "model", "last"
