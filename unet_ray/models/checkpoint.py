"""Saves and loads a model directory, which holds all that predict needs. No pickle: safetensors and JSON.

model/model.safetensors  the weights; the card is in its header too, so one file holds a whole model
model/model.json         the card, for people and other programs
model/cleanup.json       the clean-up of masks that `evaluate --choose-cleanup` has chosen
model/threshold.json     the threshold that `evaluate --choose-threshold` has chosen
model/looks.json         how the images look that the model was trained on (`data.looks`)
model/int8-*.xml, .bin   the network in int8 for OpenVINO, made by `unet-ray quantize`
model/int8.json          which int8 network to use, its score and the network's own; absent if it was refused
model/fastest.json       whether torch or OpenVINO was faster, under all conditions under which they were timed
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import nn

from unet_ray import __version__, custom_parts
from unet_ray.config import DataConfig, ModelConfig, TrainConfig, UserError, ValueRange
from unet_ray.data import storage
from unet_ray.data.looks import Looks
from unet_ray.models import SegmentationModel, build
from unet_ray.registry import is_custom
from unet_ray.settings import from_mapping

log = logging.getLogger("unet_ray")

FORMAT = 1
"""Version of the directory's layout. Raise it when an older package can no longer read a new directory."""
WEIGHTS, CARD = "model.safetensors", "model.json"
WEIGHTS_OF_OTHERS = (".pth", ".pt", ".ckpt")
MOST_HEADER_BYTES = 100 * 2**20
"""As safetensors itself allows."""
CLEANUP, THRESHOLD, INT8 = "cleanup.json", "threshold.json", "int8.json"
FASTEST, LOOKS = "fastest.json", "looks.json"
ALWAYS = ("mask_values", "ignore_index")
MASK_SETTINGS = (
    *ALWAYS, "mask_colors", "mask_nearest", "mask_resize", "mask_turn", "several_masks", "match", "overlap_order",
    "rle_order",
)  # fmt: skip
"""Settings of `DataConfig` by which a model's masks are found and read; all but the first two only if they are used."""


@dataclass(frozen=True, slots=True)
class ModelCard:
    """The contents of `model.json`: everything predict needs, so that no flag is repeated."""

    model: ModelConfig
    image_size: tuple[int, int]
    """(height, width) that images are resized to."""
    tile: int
    """See `DataConfig.tile`."""
    of_masks: dict[str, Any]
    """What the values of mask files mean: the settings of `MASK_SETTINGS`."""
    value_range: ValueRange
    classes: tuple[str, ...]
    flips: str
    """Flips that test-time augmentation may use: `h`, `v`, both or neither, as in training."""
    threshold: float
    """A pixel is foreground where its sigmoid is above this (one class only)."""
    scores: dict[str, Any]
    """The line of metrics.jsonl of the epoch that these weights come from."""
    weights_sha256: str
    """SHA-256 of the data part of model.safetensors, which is everything after the header."""
    code_sha256: str = ""
    """Of a network of the user's own (`custom_parts`): SHA-256 of the file with its code."""

    @property
    def data(self) -> DataConfig:
        """Settings to decode this model's images and masks with."""
        return DataConfig(
            image_size=self.image_size,
            tile=self.tile,
            value_range=self.value_range,
            classes=self.classes,
            **self.of_masks,
        )


def _of_masks(data: DataConfig) -> dict[str, Any]:
    """Returns the settings of `MASK_SETTINGS` that are used."""
    default = DataConfig()
    return {
        name: value
        for name in MASK_SETTINGS
        if (value := getattr(data, name)) != getattr(default, name) or name in ALWAYS
    }


def save_model(
    location: str,
    model: nn.Module,
    config: TrainConfig,
    scores: dict[str, Any],
    threshold: float = 0.5,
) -> None:
    """Writes a model directory and replaces an older one there."""
    data, augment = config.data, config.augment
    card = {
        "format": FORMAT,
        "package_version": __version__,
        "model": dataclasses.asdict(config.model),
        "image_size": list(data.size_hw),
        "tile": data.tile,
        **_of_masks(data),
        "value_range": data.value_range,
        "classes": list(data.classes),
        "flips": "h" * bool(augment.hflip) + "v" * bool(augment.vflip or augment.quarter_turns),
        "threshold": threshold,
        "scores": scores,
    }
    if is_custom(config.model.name):
        card["code_sha256"] = custom_parts.source_sha256(config.model.name)
    _write(location, _tensors(model), card)


def save_copy(location: str, source: str, card: ModelCard, model: nn.Module) -> None:
    """Writes a model directory with all of `source`, whose card is `card`, but other weights of the same network."""
    _write(location, _tensors(model), json.loads(storage.read_bytes(storage.join(source, CARD))))
    copy = read_card(location)
    for name in (CLEANUP, THRESHOLD):
        if (chosen := read_choice(source, name, card)) is not None:
            save_choice(location, name, copy, chosen)
    if looks := read_looks(source):
        save_looks(location, looks)


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}


def _write(location: str, tensors: dict[str, torch.Tensor], card: dict[str, Any]) -> None:
    """Writes weights and card, with the checksum of these weights."""
    card = {**card, "weights_sha256": hashlib.sha256(_split(safetensors.torch.save(tensors))[1]).hexdigest()}
    weights = safetensors.torch.save(tensors, {"card": json.dumps(card)})
    storage.write_bytes(storage.join(location, WEIGHTS), weights, durable=True)
    storage.write_bytes(storage.join(location, CARD), (json.dumps(card, indent=2) + "\n").encode(), durable=True)


def model_directory(location: str) -> str:
    """Returns the model directory that a MODEL argument names: itself, or the best model of a run directory.

    Raises UserError if there is none.
    """
    for candidate in (location, storage.join(location, "model")):
        if storage.exists(storage.join(candidate, CARD)):
            return candidate
    if storage.exists(location) and storage.split_options(location)[0].lower().endswith(WEIGHTS_OF_OTHERS):
        place = shlex.quote(storage.without_secrets(location))
        raise UserError(
            f"{location}: weights of another program. Of milesial/Pytorch-UNet, `unet-ray import {place} --out MODEL "
            "--image-size 512` makes a model of them: name that"
        )
    what = "no such folder" if not storage.exists(location) else "no model in it"
    raise UserError(f"{location}: {what}: name a run (--out of `unet-ray train`) or its model folder")


def read_card(location: str) -> ModelCard:
    """Reads the card of a model directory. Raises UserError if this version can't read it."""
    return _parse_card(storage.read_bytes(storage.join(location, CARD)), storage.join(location, CARD))


def _parse_card(data: bytes | str, where: str) -> ModelCard:
    try:
        # The oldest cards lack these two.
        values = {"value_range": None, "flips": "h", **json.loads(data)}
        if values["format"] > FORMAT:
            raise UserError(
                f"{where}: written by unet_ray {values['package_version']}, newer than this {__version__}: upgrade"
            )
        return ModelCard(
            model=from_mapping(ModelConfig, values["model"], "model."),
            image_size=tuple(values["image_size"]),
            tile=values["tile"],
            of_masks=_of_card(values),
            value_range=from_mapping(DataConfig, {"value_range": values["value_range"]}).value_range,
            classes=tuple(values["classes"]),
            flips=values["flips"],
            threshold=values["threshold"],
            scores=values["scores"],
            weights_sha256=values["weights_sha256"],
            code_sha256=values.get("code_sha256", ""),
        )
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"{where}: not a model card ({error!r})") from None


def _of_card(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `ModelCard.of_masks` from the values of a model card."""
    given = {name: values[name] for name in MASK_SETTINGS if name in ALWAYS or name in values}
    data = from_mapping(DataConfig, given, "data.")
    return {name: getattr(data, name) for name in given}


def load_model(location: str, *, allow_code: bool = False) -> tuple[SegmentationModel, ModelCard]:
    """Returns the network of a model directory, with its weights and on the CPU, and its card.

    Raises UserError if a file is damaged, if the two files belong to different models, or if the network's code is none
    of ours and not allowed (`custom_parts`).
    """
    path = storage.join(location, WEIGHTS)
    data = storage.read_bytes(path)
    try:
        card = _parse_card(text_entries(data)["card"], path)
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: not a model's weights ({error!r}): copy the folder again, whole") from None
    if hashlib.sha256(_split(data)[1]).hexdigest() != card.weights_sha256:
        raise UserError(f"{path}: damaged (its checksum differs): copy the folder again, whole")
    # A training that was killed between its two writes leaves the older model.json, of the same network.
    json_card = read_card(location)
    names = [field.name for field in dataclasses.fields(card) if field.name not in ("scores", "weights_sha256")]
    if changed := [name for name in names if getattr(card, name) != getattr(json_card, name)]:
        raise UserError(
            f"{location}: {CARD} has another {', '.join(changed)} than {WEIGHTS}, which holds a card of its own: it"
            f" was edited, or the files are of different models. Put back the {CARD} of these weights (--threshold and "
            "--cleanup are options of each command)"
        )
    custom_parts.check_permission(location, card.model.name, allow_code)
    with torch.random.fork_rng([]):  # the first weights draw from the process's random numbers; these are a host's
        model = build(dataclasses.replace(card.model, pretrained=False))
    weights = safetensors.torch.load(data)
    if not all(torch.isfinite(weight).all() for weight in weights.values()):
        raise UserError(f"{path}: some weights are not finite: the training went wrong, so train with a lower --lr")
    _fill(model, weights, path)
    say_if_code_changed(location, card)
    return model, card


def say_if_code_changed(location: str, card: ModelCard) -> None:
    """Says once if the code of a network of the user's own is not that of its training."""
    if card.code_sha256 and custom_parts.source_sha256(card.model.name) != card.code_sha256:
        _say_changed(location, card.model.name)


@functools.cache
def _say_changed(location: str, name: str) -> None:
    log.warning("%s: the code of %s has changed since it was trained", location, name)


def _fill(network: SegmentationModel, weights: Mapping[str, torch.Tensor], where: str) -> None:
    """Gives a network its weights. Raises UserError if one of the user's own has others."""
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        name = network.config.name
        if not is_custom(name):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{where}: the weights don't fit {name}; its code may have changed: {reason}") from None


MAY_DIFFER = ("num_classes", "dropout", "pretrained")
"""`model.` settings in which a network may differ from the one whose weights it starts from."""


def model_settings_of(location: str) -> list[tuple[str, Any]]:
    """Returns the `model.` settings of the network in a run or model directory, for `load_train_config`.

    Each setting is (dotted name, value). Raises UserError if there is no model.
    """
    card = read_card(model_directory(storage.absolute(location)))
    values = dataclasses.asdict(dataclasses.replace(card.model, pretrained=False))
    if is_custom(card.model.name):  # code that the user has to name, see `check_init`
        del values["name"]
    return [(f"model.{name}", value) for name, value in values.items()]


def check_init(location: str, config: ModelConfig) -> str:
    """Returns the model directory of `train.init`. Raises UserError if a network of `config` can't start from it."""
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
    """Loads the weights of a run or model directory into a network.

    The last layer stays as it is if the number of classes differs. Raises UserError if the weights don't fit.
    """
    given, card = load_model(check_init(location, network.config))
    tensors = given.state_dict()
    if card.model.num_classes != network.config.num_classes:
        fresh = network.state_dict()
        tensors |= {name: fresh[name] for name in _of_head(network)}
    _fill(network, tensors, location)


def _of_head(network: SegmentationModel) -> set[str]:
    """Returns the names of the last layer's tensors."""
    mine = {id(tensor) for tensor in network.head.state_dict(keep_vars=True).values()}
    return {name for name, tensor in network.state_dict(keep_vars=True).items() if id(tensor) in mine}


def save_looks(location: str, looks: Looks) -> None:
    """Writes how the images of a training look into its model directory."""
    storage.write_bytes(storage.join(location, LOOKS), (json.dumps(looks, indent=2) + "\n").encode(), durable=True)


def read_looks(location: str) -> Looks:
    """Returns how the images look that a model was trained on; nothing if it is not known."""
    path = storage.join(location, LOOKS)
    found = json.loads(storage.read_bytes(path)) if storage.exists(path) else {}
    return {name: tuple(pair) for name, pair in found.items()}


def read_cleanup(location: str, card: ModelCard) -> str:
    """Returns the clean-up chosen for the model in this directory; `none` if none was chosen for these weights."""
    chosen = read_choice(location, CLEANUP, card)
    return "none" if chosen is None else chosen["cleanup"]


def read_threshold(location: str, card: ModelCard) -> float:
    """Returns the threshold chosen for the model in this directory; its card's if none was chosen for these weights."""
    chosen = read_choice(location, THRESHOLD, card)
    return card.threshold if chosen is None else chosen["threshold"]


def read_choice(location: str, name: str, card: ModelCard) -> dict[str, Any] | None:
    """Returns the choice in file `name` that validation made for this model; None if none is for these weights."""
    path = storage.join(location, name)
    if not storage.exists(path):
        return None
    chosen = json.loads(storage.read_bytes(path))
    now = _of_network(card)
    return chosen if all(chosen.get(name, "") == value for name, value in now.items()) else None


def save_choice(location: str, name: str, card: ModelCard, chosen: dict[str, Any]) -> None:
    """Writes a choice that `read_choice` reads."""
    chosen = {**chosen, **_of_network(card)}
    storage.write_bytes(storage.join(location, name), (json.dumps(chosen, indent=2) + "\n").encode(), durable=True)


def _of_network(card: ModelCard) -> dict[str, str]:
    """Returns what a choice holds for: the weights, and the code of a network of the user's own."""
    code = custom_parts.source_sha256(card.model.name)
    return {"weights_sha256": card.weights_sha256, **({"code_sha256": code} if code else {})}


def text_entries(data: bytes) -> dict[str, str]:
    """Returns the text entries in the header of a safetensors file."""
    return json.loads(_split(data)[0])["__metadata__"]


def read_text_entries(location: str) -> dict[str, str]:
    """Returns the text entries of a safetensors file. It reads only the header, which may be a millionth of it.

    Raises UserError if the file is damaged.
    """
    with storage.reading(location) as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            if length > MOST_HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes")
            return json.loads(stream.read(length))["__metadata__"]
        except (ValueError, KeyError) as error:
            raise UserError(f"{location}: damaged ({error}): restore it, or choose another --out") from None


def _split(data: bytes) -> tuple[bytes, memoryview]:
    """Returns header (JSON) and data part of a safetensors file. It begins with the header's length in 8 bytes."""
    end = 8 + int.from_bytes(data[:8], "little")
    return data[8:end], memoryview(data)[end:]
