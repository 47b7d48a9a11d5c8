"""Finds the training pairs and the held-out pairs of a run."""

from __future__ import annotations

import dataclasses

from unet_ray.config import DataConfig, EvaluateConfig, UserError, shown_locations
from unet_ray.data import storage
from unet_ray.data.pairs import Pair, find_pairs
from unet_ray.data.splits import SPLIT, read_split
from unet_ray.models import checkpoint
from unet_ray.models.run_files import CONFIG, MODEL
from unet_ray.settings import load_train_config


def pairs_of(config: EvaluateConfig) -> list[Pair]:
    """Returns the pairs to score: those in the config's folders, or else the run's held-out pairs."""
    if config.images is not None and config.masks is not None:
        card = checkpoint.read_card(checkpoint.model_directory(storage.absolute(config.model)))
        given = {name: value for name in ("match", "rle_order") if (value := getattr(config, name)) is not None}
        of_masks = card.of_masks | given
        data = dataclasses.replace(card.data, images=config.images, masks=config.masks, **of_masks)
        return find_pairs(data, card.model.in_channels, say=True)
    return pairs_of_run(config.model, config.part)


def pairs_of_run(model: str, side: str) -> list[Pair]:
    """Returns the pairs of one side of a run's split, `train`, `val` or `test`. Raises UserError if one is gone."""
    location = storage.absolute(model)
    checkpoint.model_directory(location)
    trained = _trained(location)
    if trained is None:
        raise UserError(f"{location} is not a run directory, so it has no validation set: give --images and --masks")
    data, channels, sides = trained
    pairs = [pair for pair in find_pairs(data, channels) if sides.get(pair.key) == side]
    wanted = sum(other == side for other in sides.values())
    if not wanted:
        raise UserError(f"{location} has no images of the part {side} (see {SPLIT} in it): give --images and --masks")
    if len(pairs) != wanted:
        what = {"val": "validation", "train": "training"}.get(side, side)
        raise UserError(
            f"{shown_locations(data.images)}: {len(pairs)} of the {wanted} {what} images of {location} are still there"
        )
    return pairs


def _trained(location: str) -> tuple[DataConfig, int, dict[str, str]] | None:
    """Returns a run's data settings, the channels of its network, and the side (`train`, `val`, `test`) of each image
    key; None if `location` is neither a run directory nor the model in one."""
    if not storage.exists(storage.join(location, CONFIG)) and location.rstrip("/").endswith(f"/{MODEL}"):
        location = storage.parent(location)
    path = storage.join(location, CONFIG)
    if not storage.exists(path):
        return None
    config = load_train_config(config_file=storage.read_bytes(path).decode())
    return config.data, config.model.in_channels, read_split(storage.join(location, SPLIT))


def trained_on(model: str, pairs: list[Pair]) -> int:
    """Returns how many of the pairs a run was trained on; 0 if `model` is no run directory."""
    sides = images_of_run(model)
    return sum(sides.get(pair.image) == "train" for pair in pairs)


def images_of_run(model: str) -> dict[str, str]:
    """Returns location -> side (`train`, `val`, `test`) of the images that a run has masks of; nothing if `model` is no
    run directory, or if its folders are gone."""
    trained = _trained(storage.absolute(model))
    if trained is None:
        return {}
    data, channels, sides = trained
    try:
        return {pair.image: sides[pair.key] for pair in find_pairs(data, channels) if pair.key in sides}
    except UserError:
        return {}
