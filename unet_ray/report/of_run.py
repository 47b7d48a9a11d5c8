"""The page of a training run."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from unet_ray import __version__, metrics
from unet_ray.api import Segmenter
from unet_ray.config import IGNORE, MAX_PIXELS, DataConfig, EvaluateConfig, TrainConfig, UserError
from unet_ray.data import imaging, pictures, storage
from unet_ray.data.inputs import evenly
from unet_ray.data.pairs import Pair
from unet_ray.data.splits import SPLIT, read_split
from unet_ray.evaluation.evaluate import evaluate
from unet_ray.evaluation.run_pairs import pairs_of_run
from unet_ray.inference.pipeline import OnProgress
from unet_ray.inference.reader import Reader
from unet_ray.metrics import Scores
from unet_ray.models import checkpoint, compiling
from unet_ray.models.checkpoint import ModelCard
from unet_ray.ray_backend.session import Runtime
from unet_ray.report.content import (
    FALSE_NEGATIVE,
    FALSE_POSITIVE,
    INK,
    SIDE,
    TRAINED,
    VALIDATED,
    Chart,
    Group,
    Row,
    Section,
    Table,
    anchor,
    embedded,
    jpeg,
    name_of,
    page,
    plural,
    short,
    small,
    svg,
)
from unet_ray.report.progress import duration
from unet_ray.settings import load_train_config
from unet_ray.training.results import result_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes


SCORED = 128
"""Validation images that are scored again, at their own size, for the page; evenly spaced where there are more."""
BACKEND: Literal["torch"] = "torch"
"""Loading and compiling for OpenVINO takes longer than so few images."""
WORST, MIDDLE, BEST = 6, 3, 3


# --- a training run ---


def of_run(run: str, runtime: Runtime, on_progress: OnProgress) -> str:
    config = load_train_config(config_file=storage.read_bytes(storage.join(run, checkpoint.CONFIG)).decode())
    result = result_of(run)
    card = checkpoint.read_card(checkpoint.model_directory(run))
    sides = Counter(read_split(storage.join(run, SPLIT)).values())
    notes = []
    scores: Scores | None = None
    pairs: list[Pair] = []
    try:
        pairs = pairs_of_run(run, "val")
        some = evenly(pairs, SCORED)
        how = EvaluateConfig(model=run, backend=BACKEND)
        scores = evaluate(how, pairs=some, runtime=runtime, on_progress=on_progress)
    except UserError as error:  # images that have been moved since, say: there is still the rest to see
        reason = str(error)
        for place in (run, config.data.images, config.data.masks):
            reason = reason.replace(place, storage.without_secrets(place))
        notes.append(f"The validation images could not be scored again: {reason}")
    best, history = result.best, result.history
    if scores is not None and scores.dice.mean is not None and scores.dice.ci95[0] is not None:
        dice = f"{scores.dice.mean:.4f}"
        low, high = scores.dice.ci95
        label = f"Dice, 95 % {low:.4f} – {high:.4f}"
        if len(pairs) > scores.images + len(scores.failures):
            notes.append(f"Scored at their own size: {scores.images} of {len(pairs)} validation images, evenly spaced.")
        if scores.failures:
            path, reason = scores.failures[0]
            notes.append(f"{len(scores.failures)} could not be scored; the first: {short(path)}: {reason}")
    else:
        dice, label = f"{best['val_dice']:.4f}", "Dice at the network's size"
    seconds = sum(line["seconds"] for line in history)
    again = storage.without_secrets(storage.join(run, checkpoint.CONFIG))
    sections = [Section(title="How it went", charts=_curves(history, best["epoch"]), keep=True)]
    if scores is not None:
        sections += [_score_section(scores), *_class_section(scores)]
        sections.append(_pictures_section(run, scores, {pair.image: pair for pair in some}, card))
    sections += [
        Section(title="What was trained on what", table=Table(_settings(config, card, sides)), keep=True),
        Section(title="Time", table=_times(history), keep=True),
        Section(
            title="The same again",
            text="All settings are in config.yaml; the split of the images depends on their names alone.",
            command=f"unet-ray train --config {shlex.quote(again)} --out NEW_RUN",
            keep=True,
        ),
    ]
    return page(
        title=f"{name_of(run)}: {_network(config)}",
        subtitle=f"Trained by unet-ray {__version__}: {storage.without_secrets(run)}",
        tiles=[
            (dice, label),
            (f"{best['epoch']} of {len(history)}", "best epoch of all"),
            (f"{sides['train']} + {sides['val']}", "images trained + validated on"),
            (duration(seconds), f"on {plural(history[-1]['workers'], 'process', 'processes')}"),
        ],
        notes=notes,
        sections=sections,
    )


def _network(config: TrainConfig) -> str:
    model = config.model
    if model.name in ("unet", "attention_unet", "unet++"):
        names = {"unet": "U-Net", "attention_unet": "Attention U-Net", "unet++": "U-Net++"}
        return f"{names[model.name]} of {model.base_channels} channels, {model.depth} levels"
    return model.name


def _split_text(data: DataConfig) -> str:
    what = f"whole groups, of names alike in {data.group_by}" if data.group_by else "image by image"
    return f"{what}, one end of their order by name" if data.split_order == "name" else what


def _settings(config: TrainConfig, card: ModelCard, sides: Counter[str]) -> list[list[str]]:
    data, fit, (height, width) = config.data, config.train, config.data.size_hw
    operations = compiling.floating_point_operations(config.model, card.image_size)
    one = card.model.num_classes == 1
    classes = ", ".join(card.classes) or ("the foreground" if one else str(card.model.num_classes))
    loss = fit.loss if fit.loss != "auto" else "bce+dice" if one else "ce+dice"
    rows = [
        [
            "images",
            f"{storage.without_secrets(data.images)} ({sides['train']} to train on, {sides['val']} to validate on)",
        ],
        ["masks", f"{storage.without_secrets(data.masks)}, values {', '.join(map(str, data.mask_values or ()))}"],
        ["split", _split_text(data)],
        ["network", f"{_network(config)}, {operations / 1e9:.3g} GFLOP an image"],
        ["classes", classes],
        ["image size", f"tiles of {data.tile}" if data.tile else f"{width} × {height}"],
        ["loss", loss],
        ["optimizer", f"{fit.optimizer}, learning rate {fit.learning_rate:g} ({fit.schedule}), batch {fit.batch_size}"],
        ["epochs", str(fit.epochs)],
        ["precision", fit.precision],
        ["seed", str(fit.seed)],
    ]
    if data.ignore_index is not None:
        rows.insert(2, ["ignored", f"pixels of value {data.ignore_index}"])
    return rows


def _curves(history: Sequence[dict[str, Any]], best: int) -> list[Chart]:
    epochs = [line["epoch"] for line in history]

    def loss(axes: Axes) -> None:
        axes.plot(epochs, [line["train_loss"] for line in history], ".-", color=TRAINED, label="training")
        axes.plot(epochs, [line["val_loss"] for line in history], ".-", color=VALIDATED, label="validation")
        axes.legend(frameon=False)

    def dice(axes: Axes) -> None:
        axes.plot(epochs, [line["val_dice"] for line in history], ".-", color=VALIDATED, label="Dice")
        axes.plot(epochs, [line["val_iou"] for line in history], ".-", color="#8a63d2", label="IoU")
        axes.axvline(best, color=INK, linewidth=0.8, linestyle=":")
        axes.legend(frameon=False, loc="lower right")

    def rate(axes: Axes) -> None:
        axes.plot(epochs, [line["learning_rate"] for line in history], ".-", color=TRAINED)
        axes.set_ylim(bottom=0)

    return [
        Chart(svg(loss, "epoch"), "Loss."),
        Chart(svg(dice, "epoch"), f"Validation scores at the network's size; best at epoch {best}."),
        Chart(svg(rate, "epoch"), "Learning rate at the end of each epoch."),
    ]


def _score_section(scores: Scores) -> Section:
    labels = {
        **metrics.LABELS,
        "surface_dice": f"surface Dice, {scores.tolerance:g} pixels",
        "hd95": "95 % Hausdorff distance, pixels",
    }
    rows = []
    for name, label in labels.items():
        texts = scores.means[name].texts(2 if name == "hd95" else 4) or ("", "", "")
        rows.append([label, *(text or "–" for text in texts)])
    values = scores.each.means()["dice"]

    def histogram(axes: Axes) -> None:
        from matplotlib.ticker import MaxNLocator

        low = np.floor(min(values.min(), 0.95) * 20) / 20
        axes.hist(values, bins=np.linspace(low, 1, 25).tolist(), color=VALIDATED)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))

    order = np.argsort(values, kind="stable")
    quartiles = np.percentile(values, [25, 75])
    limit = quartiles[0] - 1.5 * (quartiles[1] - quartiles[0])
    outliers = [i for i in order[:WORST] if values[i] < limit]
    return Section(
        title=f"Scores on {plural(scores.images, 'validation image')}",
        text="At each mask's own size: the mean over images, its bootstrap 95 % interval, and over all pixels at once.",
        table=Table(rows, ["", "mean", "95 % interval", "all pixels"]),
        charts=[Chart(svg(histogram, "Dice"), "Images by their Dice.")],
        links_text="Far below the rest (more than 1.5 interquartile ranges below the lower quartile):"
        if outliers
        else "",
        links=[(anchor(scores.each.paths[i]), short(scores.each.paths[i]), f"{values[i]:.4f}") for i in outliers],
        keep=True,
    )


def _class_section(scores: Scores) -> list[Section]:
    if not scores.per_class:
        return []
    columns = {name: metrics.LABELS[name] for name in metrics.RATIOS} | {"iou_global": "IoU, all pixels"}
    counts = scores.each.counts.sum(axis=0)
    truth = counts[:, 0] + counts[:, 2]
    rows = [
        [name, f"{share:.2%}", *("–" if row[c] is None else f"{row[c]:.4f}" for c in columns)]
        for (name, row), share in zip(scores.per_class.items(), truth / max(1, truth.sum()), strict=True)
    ]
    head = ["class", "pixels", *columns.values()]
    return [Section(title="Classes", text="–: does not occur.", table=Table(rows, head), keep=True)]


def _pictures_section(run: str, scores: Scores, pairs: dict[str, Pair], card: ModelCard) -> Section:
    values = scores.each.means()["dice"]
    order = np.argsort(values, kind="stable").tolist()
    middle = max(0, len(order) // 2 - MIDDLE // 2)
    chosen: dict[str, list[int]] = {}
    left = set(order)
    for title, wanted in (
        ("Worst", order[:WORST]),
        ("Best", order[::-1][:BEST]),
        ("In the middle", order[middle : middle + MIDDLE]),
    ):
        chosen[title] = [i for i in wanted if i in left]
        left -= set(wanted)
    segmenter = Segmenter(run, backend=BACKEND)
    groups = []
    for title in ("Worst", "In the middle", "Best"):
        rows = []
        for i in chosen[title]:
            path = scores.each.paths[i]
            rows.append(_compared(segmenter, pairs[path], card, f"Dice {values[i]:.4f}: {short(path)}"))
        if rows:
            groups.append(Group(title, rows=rows))
    binary = card.model.num_classes == 1
    wrong = [("rgb(230,60,40)", "drawn, but not there"), ("rgb(60,110,255)", "there, but not drawn")]
    legend = wrong if binary else [("rgb(230,60,40)", "the wrong class"), *_class_colours(card)]
    return Section(
        title="Pictures",
        text="The picture, the true mask, the network's, and where they differ.",
        legend=legend,
        groups=groups,
    )


def _class_colours(card: ModelCard) -> list[tuple[str, str]]:
    names = card.classes or tuple(f"class {k}" for k in range(card.model.num_classes))
    colours = np.frombuffer(pictures.palette(), np.uint8).reshape(256, 3).tolist()
    return [(f"rgb({red},{green},{blue})", name) for name, (red, green, blue) in zip(names, colours, strict=False)]


def _compared(segmenter: Segmenter, pair: Pair, card: ModelCard, caption: str) -> Row:
    """picture | truth | prediction | where they differ."""
    classes = card.model.num_classes
    data = storage.read_bytes(pair.image)
    truth, _ = imaging.decode_mask(storage.read_bytes(pair.mask), card.data, None)
    predicted = segmenter(pair.image).mask
    picture = Reader.of(card, MAX_PIXELS).picture(data, truth.shape, SIDE)
    small_truth, small_predicted = (small(ids, picture.shape[:2]) for ids in (truth, predicted))
    shown = picture.astype(np.float32) * 0.55 + 60
    valid = small_truth != IGNORE
    if classes == 1:
        shown[valid & (small_predicted > small_truth)] = FALSE_POSITIVE
        shown[valid & (small_predicted < small_truth)] = FALSE_NEGATIVE
    else:
        shown[valid & (small_predicted != small_truth)] = FALSE_POSITIVE
    return Row(
        anchor(pair.image),
        [
            (jpeg(picture), "picture"),
            (embedded(pictures.overlay(picture, np.where(valid, small_truth, 0).astype(np.uint8), classes)), "truth"),
            (embedded(pictures.overlay(picture, small_predicted, classes)), "prediction"),
            (jpeg(shown.astype(np.uint8)), "differences"),
        ],
        caption,
    )


def _times(history: Sequence[dict[str, Any]]) -> Table:
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
