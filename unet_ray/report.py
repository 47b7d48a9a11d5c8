"""report.html: one self-contained page that shows a training run or a prediction.

Charts are SVG in the page's own text colour, so that they are right in light and dark; pictures are small JPEGs, a
bounded number of them, so that the page stays small however large the run.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib import resources
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from unet_ray import (
    __version__,
    checkpoint,
    compiling,
    engine,
    evaluation,
    imaging,
    ledger,
    masks,
    metrics,
    prediction,
    records,
    stages,
    storage,
)
from unet_ray.api import Segmenter
from unet_ray.checkpoint import ModelCard
from unet_ray.config import IGNORE, MAX_PIXELS, DataConfig, EvaluateConfig, TrainConfig, UserError, load_train_config
from unet_ray.imaging import ImageError
from unet_ray.metrics import Scores
from unet_ray.progress import duration
from unet_ray.records import Pair

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCORED = 128
"""Validation images that are scored again, at their own size, for the page; evenly spaced where there are more."""
BACKEND: Literal["torch"] = "torch"
"""Loading and compiling for OpenVINO takes longer than so few images."""
WORST, MIDDLE, BEST = 6, 3, 3
GALLERY = 12
PARTS = 64
"""Parts of a manifest that are read, 4,096 images each; evenly spaced where there are more."""
NAMES, REASONS = 5, 20
"""File names for each reason of failure, and reasons."""
SIDE = 360
"""Longer side of the pictures, pixels."""
INK = "#010203"
"""What matplotlib draws text and axes in; the page's own colour is put in its place."""
TRAINED, VALIDATED = "#d9822b", "#2f80d0"
FALSE_POSITIVE, FALSE_NEGATIVE = (230, 60, 40), (60, 110, 255)


@dataclass(frozen=True, slots=True)
class Chart:
    svg: str
    caption: str


@dataclass(frozen=True, slots=True)
class Table:
    rows: list[list[str]]
    head: list[str] = field(default_factory=list)
    words: bool = False
    """All columns are text: no numbers to put below each other."""


@dataclass(frozen=True, slots=True)
class Row:
    """Pictures beside each other, of one image."""

    anchor: str
    pictures: list[tuple[str, str]]
    caption: str


@dataclass(frozen=True, slots=True)
class Group:
    title: str
    rows: list[Row] = field(default_factory=list)
    pictures: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    title: str
    text: str = ""
    legend: list[tuple[str, str]] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    links_text: str = ""
    links: list[tuple[str, str, str]] = field(default_factory=list)
    table: Table | None = None
    groups: list[Group] = field(default_factory=list)
    command: str = ""
    keep: bool = False
    """Not broken over two printed pages."""


def write(
    location: str,
    *,
    local: bool = True,
    cluster: AbstractContextManager[None] = nullcontext(),
    on_progress: prediction.OnProgress = lambda _done, _failed, _all: None,
) -> str:
    """Writes report.html into a run directory or a prediction's folder. Returns where it lies.

    Of a run, up to `SCORED` validation images are scored: in this process, or with `local=False` through Ray Data,
    where `cluster` is as of `evaluation.evaluate`. Raises UserError if it is neither.
    """
    location = storage.absolute(location)
    if storage.exists(storage.join(location, engine.METRICS)):
        page = _of_run(location, local, cluster, on_progress)
    elif storage.exists(storage.join(location, prediction.SUMMARY)):
        page = _of_prediction(location)
    elif storage.exists(location):
        raise UserError(
            f"{location}: neither a finished training (--out of `train`) nor prediction (--out of `predict`)"
        )
    else:
        raise UserError(f"{location}: no such folder")
    path = storage.join(location, prediction.REPORT)
    storage.write_bytes(path, page.encode())
    return path


def _page(**content: Any) -> str:
    import jinja2

    source = resources.files("unet_ray").joinpath("report.html.j2").read_text()
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(source).render(**content)


# --- a training run ---


def _of_run(run: str, local: bool, cluster: AbstractContextManager[None], on_progress: prediction.OnProgress) -> str:
    config = load_train_config(config_file=storage.read_bytes(storage.join(run, engine.CONFIG)).decode())
    result = engine.result_of(run)
    card = checkpoint.read_card(checkpoint.model_directory(run))
    sides = Counter(records.read_split(storage.join(run, records.SPLIT)).values())
    notes = []
    scores: Scores | None = None
    pairs: list[Pair] = []
    try:
        pairs = evaluation.pairs_of_run(run, "val")
        some = records.evenly(pairs, SCORED)
        how = EvaluateConfig(model=run, backend=BACKEND)
        scores = evaluation.evaluate(how, pairs=some, local=local, cluster=cluster, on_progress=on_progress)
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
            notes.append(f"{len(scores.failures)} could not be scored; the first: {_short(path)}: {reason}")
    else:
        dice, label = f"{best['val_dice']:.4f}", "Dice at the network's size"
    seconds = sum(line["seconds"] for line in history)
    again = storage.without_secrets(storage.join(run, engine.CONFIG))
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
    return _page(
        title=f"{_name(run)}: {_network(config)}",
        subtitle=f"Trained by unet-ray {__version__}: {storage.without_secrets(run)}",
        tiles=[
            (dice, label),
            (f"{best['epoch']} of {len(history)}", "best epoch of all"),
            (f"{sides['train']} + {sides['val']}", "images trained + validated on"),
            (duration(seconds), f"on {_plural(history[-1]['workers'], 'process', 'processes')}"),
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
        Chart(_svg(loss, "epoch"), "Loss."),
        Chart(_svg(dice, "epoch"), f"Validation scores at the network's size; best at epoch {best}."),
        Chart(_svg(rate, "epoch"), "Learning rate at the end of each epoch."),
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
        title=f"Scores on {_plural(scores.images, 'validation image')}",
        text="At each mask's own size: the mean over images, its bootstrap 95 % interval, and over all pixels at once.",
        table=Table(rows, ["", "mean", "95 % interval", "all pixels"]),
        charts=[Chart(_svg(histogram, "Dice"), "Images by their Dice.")],
        links_text="Far below the rest (more than 1.5 interquartile ranges below the lower quartile):"
        if outliers
        else "",
        links=[(_anchor(scores.each.paths[i]), _short(scores.each.paths[i]), f"{values[i]:.4f}") for i in outliers],
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
            rows.append(_compared(segmenter, pairs[path], card, f"Dice {values[i]:.4f}: {_short(path)}"))
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
    colours = np.frombuffer(masks.palette(), np.uint8).reshape(256, 3).tolist()
    return [(f"rgb({red},{green},{blue})", name) for name, (red, green, blue) in zip(names, colours, strict=False)]


def _compared(segmenter: Segmenter, pair: Pair, card: ModelCard, caption: str) -> Row:
    """picture | truth | prediction | where they differ."""
    classes = card.model.num_classes
    data = storage.read_bytes(pair.image)
    truth, _ = imaging.decode_mask(storage.read_bytes(pair.mask), card.data, None)
    predicted = segmenter(pair.image).mask
    picture = stages.Reader.of(card, MAX_PIXELS).picture(data, truth.shape, SIDE)
    small_truth, small_predicted = (_small(ids, picture.shape[:2]) for ids in (truth, predicted))
    shown = picture.astype(np.float32) * 0.55 + 60
    valid = small_truth != IGNORE
    if classes == 1:
        shown[valid & (small_predicted > small_truth)] = FALSE_POSITIVE
        shown[valid & (small_predicted < small_truth)] = FALSE_NEGATIVE
    else:
        shown[valid & (small_predicted != small_truth)] = FALSE_POSITIVE
    return Row(
        _anchor(pair.image),
        [
            (_jpeg(picture), "picture"),
            (_embedded(masks.overlay(picture, np.where(valid, small_truth, 0).astype(np.uint8), classes)), "truth"),
            (_embedded(masks.overlay(picture, small_predicted, classes)), "prediction"),
            (_jpeg(shown.astype(np.uint8)), "differences"),
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


# --- a prediction ---


def _of_prediction(out: str) -> str:
    summary = json.loads(storage.read_bytes(storage.join(out, prediction.SUMMARY)))
    settings = json.loads(storage.read_bytes(storage.join(out, prediction.SETTINGS)))
    book = ledger.Ledger(out, ())
    parts = book.parts()
    names = ["path", "status", "error", "height", "width", "output", "pixels", "confidence", "milliseconds"]
    some = records.evenly(parts, PARTS)
    seen = _Seen()
    for part in some:
        for table in book.manifest(names, [part]):
            seen.add(table.append_column("location", book.locations(part)))
    notes = []
    if len(some) < len(parts):
        notes.append(
            f"Names, pictures and distributions are of {seen.count} of {summary['images']} images, evenly spaced."
        )
    rate = summary["images_per_second"]
    new = summary["images"] - summary["already_done"]
    tiles = [
        (str(summary["images"]), "images"),
        (str(summary["ok"]), "segmented"),
        (str(summary["failed"]), "failed"),
        (f"{rate:.1f}/s" if new else "–", f"in {duration(summary['seconds'])}, start included"),
    ]
    if summary["already_done"]:
        notes.append(f"{summary['already_done']} of the images were done by an earlier run.")
    if summary["cleanup"] != "none":
        notes.append(f"Masks were cleaned up: {summary['cleanup']}.")
    classes = max(2, len(seen.pixels))
    sections = []
    if summary["failures"]:
        rows = [
            [str(count), reason, ", ".join(map(_short, seen.names[reason])) or "–"]
            for reason, count in list(summary["failures"].items())[:REASONS]
        ]
        more = len(summary["failures"]) - REASONS
        sections.append(
            Section(
                title="What failed",
                text="In the manifest each has its row" + (f"; {more} more reasons are there." if more > 0 else "."),
                table=Table(rows, ["images", "reason", "for example"], words=True),
            )
        )
    least, drawn = seen.least_confident(), seen.random()
    shower = _Shower(out, classes)
    for title, text, chosen in (
        ("Least confident", "Where the network was least sure, pixel by pixel on average: worth a look.", least),
        ("A random dozen", "", drawn),
    ):
        pictures = list(shower.pictures(chosen))
        if pictures:
            sections.append(Section(title=title, text=text, groups=[Group("", pictures=pictures)]))
    if seen.ok:
        sections.append(_distributions(seen))
    sections.append(_prediction_times(summary))
    shown = [["model", summary["model"]]]
    shown += [
        [name, value if isinstance(value, str) else ", ".join(value) if isinstance(value, list) else json.dumps(value)]
        for name, value in settings.items()
        if value
    ]
    sections.append(Section(title="How it was made", table=Table(shown)))
    return _page(
        title=f"{_name(out)}: {_plural(summary['images'], 'image')} segmented",
        subtitle=f"Predicted by unet-ray {__version__}: {storage.without_secrets(out)}",
        tiles=tiles,
        notes=notes,
        sections=sections,
    )


class _Seen:
    """What the page needs of the manifest's rows, a bounded amount of it."""

    def __init__(self) -> None:
        self.count = self.ok = 0
        self.names: dict[str, list[str]] = {}
        self.pixels: np.ndarray = np.zeros(0, np.int64)
        self.shares: list[np.ndarray] = []
        self.confidences: list[np.ndarray] = []
        self._least: list[tuple[float, str, dict[str, Any]]] = []
        self._drawn: list[tuple[str, str, dict[str, Any]]] = []

    def add(self, table: pa.Table) -> None:
        self.count += len(table)
        failed = table.filter(pc.equal(table["status"], "failed"))
        for path, error in zip(failed["path"].to_pylist(), failed["error"].to_pylist(), strict=True):
            names = self.names.setdefault(error, [])
            if len(names) < NAMES:
                names.append(path)
        good = table.filter(pc.equal(table["status"], "ok"))
        if not len(good):
            return
        self.ok += len(good)
        pixels = np.stack(good["pixels"].to_pylist())
        self.pixels = pixels.sum(axis=0) + (self.pixels if len(self.pixels) else 0)
        self.shares.append(1 - pixels[:, 0] / np.maximum(1, pixels.sum(axis=1)))
        confidence = good["confidence"].to_numpy()
        self.confidences.append(confidence)
        for i in np.argsort(confidence, kind="stable")[:GALLERY].tolist():
            row = good.slice(i, 1).to_pylist()[0]
            self._least.append((row["confidence"], row["path"], row))
        self._least = sorted(self._least, key=lambda entry: entry[:2])[:GALLERY]
        # By a hash of the name: the same dozen on every machine and in every run.
        hashes = [hashlib.sha256(path.encode()).hexdigest() for path in good["path"].to_pylist()]
        for i in np.argsort(hashes)[:GALLERY].tolist():
            row = good.slice(i, 1).to_pylist()[0]
            self._drawn.append((hashes[i], row["path"], row))
        self._drawn = sorted(self._drawn, key=lambda entry: entry[:2])[:GALLERY]

    def least_confident(self) -> list[dict[str, Any]]:
        return [row for _, _, row in self._least]

    def random(self) -> list[dict[str, Any]]:
        return [row for _, _, row in self._drawn]


@dataclass(frozen=True, slots=True)
class _Shower:
    """Draws masks over their pictures: masks from PNG files or from masks.parquet, whichever there is."""

    out: str
    classes: int

    def pictures(self, rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str, str]]:
        """(data URI, caption) of those that can be shown."""
        for row in rows:
            ids = self._mask(row)
            if ids is None:
                continue
            share = 1 - row["pixels"][0] / max(1, sum(row["pixels"]))
            caption = f"{_short(row['path'])}: confidence {row['confidence']:.3f}, {share:.1%} foreground"
            yield _embedded(masks.overlay(self._picture(row), ids, 1 if self.classes == 2 else self.classes)), caption

    def _mask(self, row: dict[str, Any]) -> np.ndarray | None:
        try:
            if row["output"]:
                return imaging.stored_values(storage.read_bytes(storage.join(self.out, *row["output"].split("/"))))
            data = _from_parquet(storage.join(self.out, "masks.parquet"), row["path"])
            return None if data is None else imaging.stored_values(data)
        except (OSError, ImageError):
            return None

    def _picture(self, row: dict[str, Any]) -> np.ndarray:
        size = row["height"], row["width"]
        try:
            data = storage.read_bytes(os.fsdecode(row["location"]))
            return stages.Reader(3, None, 2 * MAX_PIXELS).picture(data, size, SIDE)
        except (OSError, ImageError, UserError):  # moved, inside a Parquet file, or of many channels: the mask alone
            return np.full((*imaging.fitted(size, SIDE), 3), 128, np.uint8)


def _from_parquet(folder: str, path: str) -> bytes | None:
    """The mask that masks.parquet holds for an image."""
    import pyarrow.parquet as pq

    if not storage.exists(folder):
        return None
    filesystem, inner = storage.resolve(folder)
    found = pq.read_table(inner, filesystem=filesystem, columns=["mask"], filters=[("path", "=", path)])
    return found["mask"][0].as_py() if len(found) else None


def _distributions(seen: _Seen) -> Section:
    shares, confidences = np.concatenate(seen.shares), np.concatenate(seen.confidences)

    def areas(axes: Axes) -> None:
        axes.hist(100 * shares, bins=np.linspace(0, 100, 41).tolist(), color=VALIDATED)

    def sure(axes: Axes) -> None:
        low = min(0.95, float(confidences.min()))
        axes.hist(confidences, bins=np.linspace(low, 1, 41).tolist(), color=VALIDATED)

    charts = [
        Chart(_svg(areas, "% of the pixels"), "Images by how much of them is not background."),
        Chart(_svg(sure, "confidence"), "Images by their mean confidence."),
    ]
    empty = int((shares == 0).sum())
    text = f"{_plural(empty, 'mask is', 'masks are')} empty." if empty else ""
    table = None
    if len(seen.pixels) > 2:
        total = seen.pixels.sum()
        table = Table([[str(k), f"{count / total:.2%}"] for k, count in enumerate(seen.pixels)], ["class", "pixels"])
    return Section(title="Masks", text=text, charts=charts, table=table, keep=True)


def _prediction_times(summary: dict[str, Any]) -> Section:
    labels = {
        "listing": "finding the images",
        "starting": "starting, up to the first masks",
        "running": "running",
        "decode": "decoding, all processes together",
        "model": "the network, all processes together",
        "write": "writing, all processes together",
    }
    rows = [[label, duration(summary["stages"][name])] for name, label in labels.items() if name in summary["stages"]]
    return Section(title="Time", table=Table(rows, ["", "time"]), keep=True)


# --- charts and pictures ---


def _svg(draw: Any, xlabel: str) -> str:
    """A chart without a background, text in the colour of the page."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": draw.__name__,  # the same page for the same run
        "font.size": 9,
        "text.color": INK,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with rc_context(settings):
        figure = Figure(figsize=(4.6, 2.6), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        draw(axes)
        axes.set_xlabel(xlabel)
        axes.grid(True, color="#888888", alpha=0.25, linewidth=0.6)
        if xlabel == "epoch":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    # Ids are the page's, and clip paths of several charts must not be one.
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{draw.__name__}-", text)


def _small(ids: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(ids).resize(size_hw[::-1], Image.Resampling.NEAREST))


def _jpeg(picture: np.ndarray) -> str:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "JPEG", quality=82)
    return _embedded(stream.getvalue())


def _embedded(jpeg: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()


def _anchor(path: str) -> str:
    return "image-" + hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:12]


def _short(path: str) -> str:
    return "/".join(storage.without_secrets(path).rsplit("/", 2)[-2:])


def _name(location: str) -> str:
    return storage.without_secrets(location).rstrip("/").rpartition("/")[2]


def _plural(count: int, one: str, many: str = "") -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"
