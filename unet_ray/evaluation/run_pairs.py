"""The pairs that a run was trained on and those that it held out."""

from __future__ import annotations

from unet_ray.config import DataConfig, EvaluateConfig, UserError
from unet_ray.data import storage
from unet_ray.data.pairs import Pair, find_pairs
from unet_ray.data.splits import SPLIT, read_split
from unet_ray.models import checkpoint
from unet_ray.models.checkpoint import CONFIG
from unet_ray.settings import load_train_config


def pairs_of(config: EvaluateConfig) -> list[Pair]:
    """The pairs to score: of the folders that the config names, or those that the run held out."""
    if config.images is not None and config.masks is not None:
        return find_pairs(config.images, config.masks)
    return pairs_of_run(config.model, "val")


def pairs_of_run(model: str, part: str) -> list[Pair]:
    """The pairs of one part of a run, `train` or `val`. Raises UserError if they are not all there any more."""
    location = storage.absolute(model)
    checkpoint.model_directory(location)
    trained = _trained(location)
    if trained is None:
        raise UserError(f"{location} is not a run directory, so it has no validation set: give --images and --masks")
    data, parts = trained
    pairs = [pair for pair in find_pairs(data.images, data.masks) if parts.get(pair.key) == part]
    wanted = sum(other == part for other in parts.values())
    if len(pairs) != wanted:
        what = "validation" if part == "val" else "training"
        raise UserError(f"{data.images}: {len(pairs)} of the {wanted} {what} images of {location} are still there")
    return pairs


def _trained(location: str) -> tuple[DataConfig, dict[str, str]] | None:
    """What a run was trained on, and which image was on which side; None for what is no run directory."""
    path = storage.join(location, CONFIG)
    if not storage.exists(path):
        return None
    data = load_train_config(config_file=storage.read_bytes(path).decode()).data
    return data, read_split(storage.join(location, SPLIT))


def trained_on(model: str, pairs: list[Pair]) -> int:
    """How many of the images a run was trained on, as far as its directory says."""
    trained = _trained(storage.absolute(model))
    if trained is None:
        return 0
    data, parts = trained
    used = {storage.join(data.images, key) for key, part in parts.items() if part == "train"}
    return sum(pair.image.rpartition(".")[0] in used for pair in pairs)
