"""Builds the tables on the page of a training run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from unet_ray import metrics
from unet_ray.config import DataConfig, TrainConfig, locations
from unet_ray.data import storage
from unet_ray.metrics import Scores
from unet_ray.models.checkpoint import ModelCard
from unet_ray.models.operations import floating_point_operations
from unet_ray.report.charts import dice_histogram
from unet_ray.report.progress import duration
from unet_ray.report.sections import Section, Table, anchor, plural, short

OUTLIERS = 6
"""The most outliers that are linked to their pictures; `run_pictures.WORST` shows as many."""
UNETS = {"unet": "U-Net", "attention_unet": "Attention U-Net", "unet++": "U-Net++"}


def scores(scores: Scores) -> Section:
    """Returns the scores with their intervals, the histogram of the Dice, and links to the outliers."""
    labels = {
        **metrics.LABELS,
        "surface_dice": f"surface Dice, {scores.tolerance:g} pixels",
        "hd95": "95 % Hausdorff distance, pixels",
    }
    rows = []
    for name, label in labels.items():
        texts = scores.means[name].texts(2 if name == "hd95" else 4) or ("", "", "")
        rows.append([label, *(text or "–" for text in texts)])
    dice = scores.each.means()["dice"]
    outliers = _outliers(dice)
    paths = scores.each.paths
    return Section(
        title=f"Scores on {plural(scores.images, 'validation image')}",
        text="At each mask's own size: the mean over images, its bootstrap 95 % interval, and over all pixels at once.",
        table=Table(rows, ["", "mean", "95 % interval", "all pixels"]),
        charts=[dice_histogram(dice)],
        links_text="Far below the rest (more than 1.5 interquartile ranges below the lower quartile):"
        if outliers
        else "",
        links=[(anchor(paths[i]), short(paths[i]), f"{dice[i]:.4f}") for i in outliers],
        keep=True,
    )


def _outliers(dice: np.ndarray) -> list[int]:
    """Returns the images more than 1.5 interquartile ranges below the lower quartile, the worst first."""
    low, high = np.percentile(dice, [25, 75])
    worst = np.argsort(dice, kind="stable")[:OUTLIERS]
    return [i for i in worst if dice[i] < low - 1.5 * (high - low)]


def classes(scores: Scores) -> list[Section]:
    """Returns the scores of each class, if there are several."""
    if not scores.per_class:
        return []
    columns = {name: metrics.LABELS[name] for name in metrics.RATIOS} | {"iou_global": "IoU, all pixels"}
    counts = scores.each.counts.sum(axis=0)
    ground_truth = counts[:, 0] + counts[:, 2]
    shares = ground_truth / max(1, ground_truth.sum())
    rows = [
        [name, f"{share:.2%}", *("–" if row[column] is None else f"{row[column]:.4f}" for column in columns)]
        for (name, row), share in zip(scores.per_class.items(), shares, strict=True)
    ]
    head = ["class", "pixels", *columns.values()]
    return [Section(title="Classes", text="–: does not occur.", table=Table(rows, head), keep=True)]


def network(config: TrainConfig) -> str:
    """Returns `U-Net of 64 channels, 4 levels`."""
    model = config.model
    if model.name in UNETS:
        return f"{UNETS[model.name]} of {model.base_channels} channels, {model.depth} levels"
    return model.name


def settings(config: TrainConfig, card: ModelCard, sides: Counter[str]) -> Table:
    """Returns the most important settings; `sides`: number of images of `train` and `val`."""
    data, fit, (height, width) = config.data, config.train, config.data.size_hw
    operations = floating_point_operations(config.model, card.image_size)
    binary = card.model.num_classes == 1
    names = ", ".join(card.classes) or ("the foreground" if binary else str(card.model.num_classes))
    loss = fit.loss if fit.loss != "auto" else "bce+dice" if binary else "ce+dice"
    images, masks = (", ".join(map(storage.without_secrets, locations(each))) for each in (data.images, data.masks))
    rows = [
        ["images", f"{images} ({sides['train']} to train on, {sides['val']} to validate on)"],
        ["masks", f"{masks}, {_meaning(data)}"],
        ["split", _split(data)],
        ["network", network(config) + (f", {operations / 1e9:.3g} GFLOP an image" if operations else "")],
        ["classes", names],
        ["image size", f"tiles of {data.tile}" if data.tile else f"{width} × {height}"],
        ["loss", loss],
        ["optimizer", f"{fit.optimizer}, learning rate {fit.learning_rate:g} ({fit.schedule}), batch {fit.batch_size}"],
        ["epochs", str(fit.epochs)],
        ["precision", fit.precision],
        ["seed", str(fit.seed)],
    ]
    if data.ignored:
        rows.insert(2, ["ignored", f"pixels of value {', '.join(map(str, data.ignored))}"])
    return Table(rows)


def _meaning(data: DataConfig) -> str:
    """Returns the stored value, or the colour, of each class."""
    entries = data.mask_colors or data.mask_values or ()
    text = ", ".join(str([*entry]) if isinstance(entry, tuple) else str(entry) for entry in entries)
    return f"{'colours' if data.mask_colors else 'values'} {text}"


def _split(data: DataConfig) -> str:
    unit = f"whole groups, of names alike in {data.group_by}" if data.group_by else "image by image"
    return f"{unit}, one end of their order by name" if data.split_order == "name" else unit


def times(history: Sequence[dict[str, Any]]) -> Table:
    """Returns how the epochs spent their time; `history`: lines of metrics.jsonl."""
    whole = sum(line["seconds"] for line in history)
    training = sum(line["train_seconds"] for line in history)
    waiting = sum(line["wait_seconds"] for line in history)
    speeds = sorted(line["images_per_second"] for line in history)

    def row(name: str, seconds: float) -> list[str]:
        return [name, duration(seconds), f"{seconds / max(whole, 1e-9):.1%}"]

    rows = [
        row("training steps", training - waiting),
        row("waiting for images", waiting),
        row("validation and saving", whole - training),
        row("all epochs", whole),
        ["images/s while training (median epoch)", f"{speeds[len(speeds) // 2]:.1f}", ""],
    ]
    return Table(rows, ["", "time", "share"])
