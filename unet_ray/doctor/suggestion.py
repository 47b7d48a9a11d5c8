"""Suggests settings for a data set, tries them on two pairs, and times a training step with them."""

from __future__ import annotations

import dataclasses
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from unet_ray.config import TrainConfig, UserError, ValueRange, is_list, locations
from unet_ray.data import storage
from unet_ray.data.masks import infer_values
from unet_ray.data.pairs import Pair
from unet_ray.data.rows import Decoder, fits_in_memory
from unet_ray.data.splits import divided, group_of
from unet_ray.doctor.layouts import Way
from unet_ray.doctor.masks import MUCH_FOREGROUND, Classes
from unet_ray.doctor.report import Expected, Finding, Suggestion, error
from unet_ray.doctor.words import yaml_text
from unet_ray.models.device import device_here, keep_freed_memory
from unet_ray.settings import load_train_config
from unet_ray.training.step import prepare

STEPS = 2500
"""The suggested epochs aim at this many steps in all, as many as `carvana-fast` takes on 3,200 pairs."""
AREA = 512**2
TIMED_SECONDS = 4.0
ORDER = (
    "model.in_channels",
    "model.num_classes",
    "data.image_size",
    "data.match",
    "data.several_masks",
    "data.mask_resize",
    "data.mask_turn",
    "data.mask_values",
    "data.mask_colors",
    "data.mask_nearest",
    "data.ignore_index",
    "data.classes",
    "data.split",
    "data.group_by",
    "data.split_order",
    "data.value_range",
)
"""Order of the settings in the suggested command."""
BY_CLASSES = ("model.num_classes", "data.classes", "data.mask_values", "data.mask_colors", "data.ignore_index")
"""Settings that `--classes` makes."""
FLAGS = {
    "data.match": "--match",
    "data.split": "--split",
    "data.group_by": "--group-by",
    "data.image_size": "--image-size",
    "train.epochs": "--epochs",
}


@dataclass(frozen=True, slots=True)
class Traits:
    """Traits of a data set that decide its settings."""

    channels: int
    """`model.in_channels`."""
    classes: Classes
    value_range: ValueRange
    group_by: str | None
    """Pattern of the groups; None if the names show none."""
    alike: bool
    """Images that follow each other by name are alike, as the slices of a volume are."""
    mask_resize: bool = False
    """See `DataConfig.mask_resize`."""
    split: str | None = None
    """See `DataConfig.split`."""
    volumes: bool = False
    """The images are slices that `unet-ray slices` has written."""
    mask_turn: bool = False
    """See `DataConfig.mask_turn`."""


def suggest(way: Way, pairs: Sequence[Pair], sizes: Sequence[tuple[int, int]], traits: Traits) -> Suggestion:
    """Suggests a recipe and settings for at least two pairs. `sizes`: (width, height) of their images."""
    keys = [pair.key for pair in pairs]
    recipe = _recipe(traits, len(pairs))
    base = load_train_config(recipe=recipe)
    # Batch norm needs more than one position at the deepest level.
    image_size = _image_size(sizes, 2 * base.model.patch * 2**base.model.depth, square=base.augment.quarter_turns)
    settings: dict[str, Any] = {
        "model.in_channels": traits.channels,
        "data.match": way.match,
        "data.several_masks": way.several,
        "data.mask_resize": traits.mask_resize,
        "data.mask_turn": traits.mask_turn,
        "data.mask_colors": (),
        "data.mask_nearest": False,
        **_class_settings(base, traits),
        "data.image_size": image_size,
        "data.split": traits.split,
        "data.group_by": _same_groups(base.data.group_by, traits.group_by, keys),
        "data.split_order": "name" if traits.alike else "hash",
        "data.value_range": traits.value_range,
    }
    settings = {name: settings[name] for name in ORDER}
    config = load_train_config(recipe=recipe, settings=settings.items())
    train, _, _ = divided(keys, config.data, config.train.seed)
    steps = -(-len(train) // config.train.batch_size)
    settings["train.epochs"] = max(base.train.epochs, min(40, round(STEPS / steps)))
    known = base.to_dict()
    changed = []
    if way.classes:  # `--classes` says the rest
        settings |= {"data.classes": ("background", *way.classes), "data.mask_values": None, "data.ignore_index": None}
    for name, value in settings.items():
        section, key = name.split(".")
        if yaml_text(known[section][key]) != yaml_text(value):
            changed.append((name, yaml_text(value)))
    command = _command(way, recipe, [each for each in changed if not (way.classes and each[0] in BY_CLASSES)], settings)
    return Suggestion(recipe, image_size, tuple(changed), command)


def _class_settings(base: TrainConfig, traits: Traits) -> dict[str, Any]:
    """Returns the settings of the classes, based on the recipe's."""
    classes = traits.classes
    values, names = classes.values, [classes.names.get(value, "") for value in classes.values]
    count = classes.count
    if classes.settings:
        if classes.folders:
            names = ["background", *classes.folders]
        elif classes.settings.get("data.mask_values"):
            names = []
        return {
            "model.num_classes": count,
            "data.mask_values": None,
            "data.ignore_index": classes.ignore,
            "data.classes": tuple(names) if count > 1 and names and all(names) else (),
            **classes.settings,
        }
    own = base.data.mask_values if sorted(base.data.mask_values or ()) == values else None
    # In slices of membranes, the smaller of the two classes is the one to find.
    shares = traits.classes.shares
    membranes = own is not None and count == 1 and traits.alike and shares[values[1]] > MUCH_FOREGROUND
    if count == 1:
        mask_values = own if membranes else None
    else:
        mask_values = own or (None if values == list(range(count)) else tuple(values))
    return {
        "model.num_classes": count,
        "data.mask_values": mask_values,
        "data.ignore_index": traits.classes.ignore,
        "data.classes": base.data.classes if membranes else tuple(names) if count > 1 and all(names) else (),
    }


def _command(way: Way, recipe: str, changed: Sequence[tuple[str, str]], settings: Mapping[str, Any]) -> str:
    """Returns the command that trains with these settings, quoted for a shell."""
    command = ["unet-ray", "train"]
    for images, masks in zip(locations(way.images), locations(way.masks), strict=True):
        command += ["--images", storage.without_secrets(images)]
        if not (masks == images and is_list(images)):
            command += ["--masks", storage.without_secrets(masks)]
    command += ["--out", "RUN", "--recipe", recipe]
    if way.classes:
        command += ["--classes", ",".join(way.classes)]
    if way.by_area:
        command += ["--overlap-order", "area"]
    for name, text in changed:
        plain = isinstance(settings[name], (int, str)) and name in FLAGS
        command += [FLAGS[name], str(settings[name])] if plain else ["--set", f"{name}={text}"]
    return shlex.join(command)


def _recipe(traits: Traits, pairs: int) -> str:
    classes = traits.classes.count
    if classes > 1 and (traits.volumes or (traits.channels == 4 and classes >= 4)):
        return "brats"
    if classes > 1:
        return "camvid"
    return "isbi2012" if traits.channels == 1 and pairs < 200 else "carvana-fast"


def _same_groups(known: str | None, pattern: str | None, keys: Sequence[str]) -> str | None:
    """Returns the recipe's own pattern if it makes the same groups, otherwise the one seen in the names."""
    if known is None or not all(re.search(known, key) for key in keys):
        return pattern
    both = {(group_of(key, known), group_of(key, pattern)) for key in keys}
    return known if len({ours for ours, _ in both}) == len(both) == len({seen for _, seen in both}) else pattern


def _image_size(sizes: Sequence[tuple[int, int]], least: int, *, square: bool) -> int | tuple[int, int]:
    """Chooses `data.image_size`: the median image's own size up to an area of 512².

    Larger images become squares of 512, as those of Carvana do, and so do images of different aspect ratios.
    """
    width, height = np.median(np.array(sizes or [(512, 512)]), axis=0).tolist()
    scale = min(1.0, float(np.sqrt(AREA / (width * height))))
    forms = np.percentile([size[0] / size[1] for size in sizes or [(1, 1)]], (10, 90))
    if square or forms[1] > 1.1 * forms[0] or (scale < 1 and 0.5 <= width / height <= 2):
        return max(least, round(scale * np.sqrt(width * height) / 16) * 16)
    sides = [max(least, round(scale * side / 8) * 8) for side in (height, width)]
    return sides[0] if sides[0] == sides[1] else (sides[0], sides[1])


def trial(suggestion: Suggestion, pairs: Sequence[Pair]) -> list[Finding]:
    """Reads two pairs as the suggested training will. A finding is an error that would stop that training."""
    config = suggestion.config()
    data = config.data
    try:
        values = data.mask_values
        if values is None and not data.mask_colors:
            values = infer_values([pair.mask for pair in pairs], config.model.num_classes, data)
        decoder = Decoder.of(dataclasses.replace(config, data=dataclasses.replace(data, mask_values=values)))
        for pair in pairs[:2]:
            decoder(pair.image, pair.mask)
    except UserError as reason:
        return error("cannot-be-trained-on", str(reason), "a training with the suggested settings would stop at it")
    return []


def expected(suggestion: Suggestion, pairs: Sequence[Pair]) -> Expected:
    """Times a training step with the suggested settings, and estimates an epoch from it."""
    config = suggestion.config()
    decoder = Decoder.of(config)
    train, val, _ = divided([pair.key for pair in pairs], config.data, config.train.seed)
    batch, seconds, device = _timed_step(config, len(train))
    return Expected(
        # Validation is a forward pass, which is a third of a training step's work.
        seconds / batch * (len(train) + len(val) / 3),
        decoder.row_bytes() * len(pairs),
        fits_in_memory(len(pairs), decoder, config.compute.memory_fraction),
        device,
        f"a training step on {batch} image(s) took {seconds:.2f} s; validation counted as a third, decoding left out",
    )


def _timed_step(config: TrainConfig, count: int) -> tuple[int, float, str]:
    """Returns the images in a batch, the seconds of one training step on it, and the device's name."""
    device = device_here("auto", 1)
    if device.type == "cpu":
        keep_freed_memory(of_any_size=True)
    training = prepare(config, device)
    training.ddp_network.train()
    decoder = Decoder.of(config)
    generator = np.random.default_rng(0)

    def step(images: int) -> float:
        batch = decoder.empty(images)
        batch["image"] = generator.integers(0, 255, batch["image"].shape, np.uint8)
        batch["index"] = np.arange(images)
        started = time.perf_counter()
        loss = training.backward(batch, 1.0, epoch=1)
        training.update()
        float(loss)  # waits for a GPU
        return time.perf_counter() - started

    step(1)  # warms up
    size, seconds = 1, step(1)
    # Time a whole batch if that is fast enough, since part of a step's work does not depend on the images.
    whole = min(config.train.batch_size, count)
    if seconds * whole < TIMED_SECONDS:
        size, seconds = whole, min(step(whole) for _ in range(2))
    if device.type == "cuda":
        return size, seconds, torch.cuda.get_device_name(device)
    return size, seconds, f"{torch.get_num_threads()} CPU thread(s)"
