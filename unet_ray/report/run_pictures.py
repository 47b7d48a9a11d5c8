"""Draws the pictures on the page of a training run: ground truth, predicted mask and their differences."""

from __future__ import annotations

from typing import Literal

import numpy as np

from unet_ray.api import Segmenter
from unet_ray.config import IGNORE, MAX_PIXELS
from unet_ray.data import imaging, mask_files, pictures
from unet_ray.data.pairs import Pair
from unet_ray.inference.reader import Reader
from unet_ray.metrics import Scores
from unet_ray.models.checkpoint import ModelCard
from unet_ray.report.pictures import SIDE, data_uri, picture_uri
from unet_ray.report.sections import Group, Row, Section, anchor, short

WORST, MIDDLE, BEST = 6, 3, 3
"""Number of images of each kind that are shown."""
FALSE_POSITIVE, FALSE_NEGATIVE = (230, 60, 40), (60, 110, 255)


def compared(run: str, scores: Scores, pairs: dict[str, Pair], card: ModelCard, backend: Literal["torch"]) -> Section:
    """Returns the worst, the middle and the best images by Dice; `pairs`: path of the image -> pair."""
    dice = scores.each.means()["dice"]
    chosen = _chosen(np.argsort(dice, kind="stable").tolist())
    segmenter = Segmenter(run, backend=backend)
    groups = []
    for title in ("Worst", "In the middle", "Best"):
        rows = []
        for i in chosen[title]:
            path = scores.each.paths[i]
            rows.append(_row(segmenter, pairs[path], card, f"Dice {dice[i]:.4f}: {short(path)}"))
        if rows:
            groups.append(Group(title, rows=rows))
    return Section(
        title="Pictures",
        text="The picture, the true mask, the network's, and where they differ.",
        legend=_legend(card),
        groups=groups,
    )


def _chosen(order: list[int]) -> dict[str, list[int]]:
    """Returns the images of each group, no image twice; `order`: all images, the worst first."""
    middle = max(0, len(order) // 2 - MIDDLE // 2)
    wanted = {"Worst": order[:WORST], "Best": order[::-1][:BEST], "In the middle": order[middle : middle + MIDDLE]}
    chosen: dict[str, list[int]] = {}
    left = set(order)
    for title, images in wanted.items():
        chosen[title] = [i for i in images if i in left]
        left -= set(images)
    return chosen


def _legend(card: ModelCard) -> list[tuple[str, str]]:
    positive, negative = (f"rgb({red},{green},{blue})" for red, green, blue in (FALSE_POSITIVE, FALSE_NEGATIVE))
    if card.model.num_classes == 1:
        return [(positive, "drawn, but not there"), (negative, "there, but not drawn")]
    names = card.classes or tuple(f"class {k}" for k in range(card.model.num_classes))
    colours = np.frombuffer(pictures.palette(), np.uint8).reshape(256, 3).tolist()
    classes = [f"rgb({red},{green},{blue})" for red, green, blue in colours]
    return [(positive, "the wrong class"), *zip(classes, names, strict=False)]


def _row(segmenter: Segmenter, pair: Pair, card: ModelCard, caption: str) -> Row:
    """Returns the row: picture, ground truth, prediction, differences."""
    classes = card.model.num_classes
    data = imaging.read_file(pair.image)
    ground_truth, _ = imaging.decode_mask(mask_files.read(pair.mask), card.data, None, data)
    picture = Reader.of(card, MAX_PIXELS).picture(data, ground_truth.shape, SIDE)
    size_hw = picture.shape[:2]
    true_ids = imaging.resized_ids(ground_truth, size_hw)
    predicted_ids = imaging.resized_ids(segmenter(pair.image).mask, size_hw)
    valid_ids = np.where(true_ids != IGNORE, true_ids, 0).astype(np.uint8)
    shown = [
        (picture_uri(picture), "picture"),
        (data_uri(pictures.overlay(picture, valid_ids, classes)), "truth"),
        (data_uri(pictures.overlay(picture, predicted_ids, classes)), "prediction"),
        (picture_uri(_differences(picture, true_ids, predicted_ids, classes)), "differences"),
    ]
    return Row(anchor(pair.image), shown, caption)


def _differences(picture: np.ndarray, true_ids: np.ndarray, predicted_ids: np.ndarray, classes: int) -> np.ndarray:
    """Returns a paler picture, uint8 [H,W,3], with wrong pixels coloured, from class ids, uint8 [H,W]."""
    pale = picture.astype(np.float32) * 0.55 + 60
    valid = true_ids != IGNORE
    if classes == 1:
        pale[valid & (predicted_ids > true_ids)] = FALSE_POSITIVE
        pale[valid & (predicted_ids < true_ids)] = FALSE_NEGATIVE
    else:
        pale[valid & (predicted_ids != true_ids)] = FALSE_POSITIVE
    return pale.astype(np.uint8)
