"""The settings that fit a data set, whether they work, and how long an epoch takes with them."""

from __future__ import annotations

import dataclasses
import re
import shlex
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from unet_ray.config import TrainConfig, UserError, ValueRange
from unet_ray.data import storage
from unet_ray.data.masks import infer_values
from unet_ray.data.pairs import Pair
from unet_ray.data.rows import Decoder, fits_in_memory
from unet_ray.data.splits import group_of, split_pairs
from unet_ray.doctor.masks import MUCH_FOREGROUND, Classes
from unet_ray.doctor.report import Expected, Finding, Suggestion, error
from unet_ray.doctor.words import yaml_text
from unet_ray.models.device import device_here, keep_freed_memory
from unet_ray.settings import load_train_config
from unet_ray.training.loop import prepare
from unet_ray.training.sampler import MicroBatch

STEPS = 2500
"""Of a whole training, which the suggested epochs come near to: what `carvana-fast` takes on 3,200 pairs."""
AREA = 512**2
TIMED_SECONDS = 4.0
FLAGS = {"data.group_by": "--group-by", "data.image_size": "--image-size", "train.epochs": "--epochs"}


def suggest(
    images_at: str,
    masks_at: str,
    pairs: Sequence[Pair],
    sizes: Sequence[tuple[int, int]],
    *,
    channels: int,
    classes: Classes,
    value_range: ValueRange,
    group_by: str | None,
    alike: bool,
) -> Suggestion:
    """For two pairs and more, with images of these (width, height)."""
    values = classes.values
    count = len(values) if len(values) > 2 else 1
    recipe = _recipe(channels, count, len(pairs))
    base = load_train_config(recipe=recipe)
    names = [classes.names.get(value, "") for value in values]
    # At the deepest level more than one position must be left, for batch norm.
    image_size = _image_size(sizes, 2 * base.model.patch * 2**base.model.depth, square=base.augment.quarter_turns)
    own = base.data.mask_values if sorted(base.data.mask_values or ()) == values else None
    # In slices of membranes what there is less of is to be found.
    membranes = own is not None and count == 1 and alike and classes.shares[values[1]] > MUCH_FOREGROUND
    if count == 1:
        mask_values = own if membranes else None
    else:
        mask_values = own or (None if values == list(range(count)) else tuple(values))
    settings: dict[str, Any] = {
        "model.in_channels": channels,
        "model.num_classes": count,
        "data.image_size": image_size,
        "data.mask_values": mask_values,
        "data.ignore_index": classes.ignore,
        "data.classes": base.data.classes if membranes else tuple(names) if count > 1 and all(names) else (),
        "data.group_by": _same_groups(base.data.group_by, group_by, [pair.key for pair in pairs]),
        "data.split_order": "name" if alike else "hash",
        "data.value_range": value_range,
    }
    config = load_train_config(recipe=recipe, settings=settings.items())
    train, _ = split_pairs([pair.key for pair in pairs], config.data, config.train.seed)
    steps = -(-len(train) // config.train.batch_size)
    settings["train.epochs"] = max(base.train.epochs, min(40, round(STEPS / steps)))
    known = base.to_dict()
    changed = []
    for name, value in settings.items():
        section, key = name.split(".")
        if yaml_text(known[section][key]) != yaml_text(value):
            changed.append((name, yaml_text(value)))
    command = ["unet-ray", "train", "--images", storage.without_secrets(images_at)]
    command += ["--masks", storage.without_secrets(masks_at), "--out", "RUN", "--recipe", recipe]
    for name, text in changed:
        plain = isinstance(settings[name], (int, str)) and name in FLAGS
        command += [FLAGS[name], str(settings[name])] if plain else ["--set", f"{name}={text}"]
    return Suggestion(recipe, image_size, tuple(changed), shlex.join(command))


def _recipe(channels: int, classes: int, pairs: int) -> str:
    if channels == classes == 4:
        return "brats"
    if classes > 1:
        return "camvid"
    return "isbi2012" if channels == 1 and pairs < 200 else "carvana-fast"


def _same_groups(known: str | None, pattern: str | None, keys: Sequence[str]) -> str | None:
    """The recipe's own pattern where it makes the same groups, otherwise the other."""
    if known is None or not all(re.search(known, key) for key in keys):
        return pattern
    both = {(group_of(key, known), group_of(key, pattern)) for key in keys}
    return known if len({ours for ours, _ in both}) == len(both) == len({seen for _, seen in both}) else pattern


def _image_size(sizes: Sequence[tuple[int, int]], least: int, *, square: bool) -> int | tuple[int, int]:
    """`data.image_size`: a middling image's own size up to the area of 512²; larger photographs become squares of 512,
    as those of Carvana do, and so do images of different forms."""
    width, height = np.median(np.array(sizes or [(512, 512)]), axis=0).tolist()
    scale = min(1.0, float(np.sqrt(AREA / (width * height))))
    forms = np.percentile([size[0] / size[1] for size in sizes or [(1, 1)]], (10, 90))
    if square or forms[1] > 1.1 * forms[0] or (scale < 1 and 0.5 <= width / height <= 2):
        return max(least, round(scale * np.sqrt(width * height) / 16) * 16)
    sides = [max(least, round(scale * side / 8) * 8) for side in (height, width)]
    return sides[0] if sides[0] == sides[1] else (sides[0], sides[1])


def trial(suggestion: Suggestion, pairs: Sequence[Pair]) -> list[Finding]:
    """Reads two pairs as the suggested training will: it would stop at what this says."""
    config = suggestion.config()
    data = config.data
    try:
        values = data.mask_values or infer_values([pair.mask for pair in pairs], config.model.num_classes, data)
        decoder = Decoder.of(dataclasses.replace(config, data=dataclasses.replace(data, mask_values=values)))
        for pair in pairs[:2]:
            decoder(pair.image, pair.mask)
    except UserError as reason:
        return error("cannot-be-trained-on", str(reason), "a training with the suggested settings would stop at it")
    return []


def expected(suggestion: Suggestion, pairs: Sequence[Pair]) -> Expected:
    """Times a training step."""
    config = suggestion.config()
    decoder = Decoder.of(config)
    train, val = split_pairs([pair.key for pair in pairs], config.data, config.train.seed)
    batch, seconds, device = _timed_step(config, len(train))
    return Expected(
        # Of a step's work the forward pass, which validation is, is a third.
        seconds / batch * (len(train) + len(val) / 3),
        decoder.row_bytes() * len(pairs),
        fits_in_memory(len(pairs), decoder, config.compute.memory_fraction),
        device,
        f"a training step on {batch} image(s) took {seconds:.2f} s; validation counted as a third, decoding left out",
    )


def _timed_step(config: TrainConfig, count: int) -> tuple[int, float, str]:
    """Images of the batch, seconds of one training step on it, and the device."""
    device = device_here("auto", 1)
    if device.type == "cpu":
        keep_freed_memory(of_any_size=True)
    training = prepare(config, device)
    training.model.train()
    decoder = Decoder.of(config)
    generator = np.random.default_rng(0)

    def step(images: int) -> float:
        batch = decoder.empty(images)
        batch["image"] = generator.integers(0, 255, batch["image"].shape, np.uint8)
        indices = batch["index"] = np.arange(images)
        started = time.perf_counter()
        float(training.step([(batch, MicroBatch(indices, 1.0))], 1, 1))  # float: waits for a GPU
        return time.perf_counter() - started

    step(1)  # warms up
    size, seconds = 1, step(1)
    # A whole batch where there is time for it: part of a step's work does not depend on the images.
    whole = min(config.train.batch_size, count)
    if seconds * whole < TIMED_SECONDS:
        size, seconds = whole, min(step(whole) for _ in range(2))
    if device.type == "cuda":
        return size, seconds, torch.cuda.get_device_name(device)
    return size, seconds, f"{torch.get_num_threads()} CPU thread(s)"
