"""Builds the page of a prediction."""

from __future__ import annotations

import json
from typing import Any

from unet_ray import __version__
from unet_ray.data import storage
from unet_ray.data.inputs import evenly
from unet_ray.inference.ledger import Ledger
from unet_ray.inference.output_folder import SETTINGS, SUMMARY
from unet_ray.report.charts import mask_histograms
from unet_ray.report.manifest_sample import COLUMNS, ManifestSample
from unet_ray.report.prediction_pictures import PredictionPictures
from unet_ray.report.progress import duration
from unet_ray.report.sections import Group, Page, Section, Table, name_of, plural, short

SHARDS = 64
"""The most shards of the manifest that are read, 4,096 images each, evenly spaced."""
REASONS = 20
"""The most reasons of failure that are listed."""
FEWEST_FOR_HISTOGRAMS = 10
"""Images; of fewer a histogram says no more than their pictures, and matplotlib takes a second to import."""
STAGES = {
    "listing": "finding the images",
    "starting": "starting, up to the first masks",
    "running": "running",
    "decode": "decoding, all processes together",
    "model": "the network, all processes together",
    "postprocess": "resizing back and clean-up, all processes together",
    "write": "writing, all processes together",
}
"""Name in summary.json -> name on the page."""


def of_prediction(out: str) -> str:
    """Returns the page of a prediction's output folder."""
    summary = json.loads(storage.read_bytes(storage.join(out, SUMMARY)))
    settings = json.loads(storage.read_bytes(storage.join(out, SETTINGS)))
    ledger = Ledger(out, ())
    shards = ledger.shards()
    read = evenly(shards, SHARDS)
    sample = ManifestSample()
    for shard in read:
        for table in ledger.manifest(COLUMNS, [shard]):
            sample.add(table.append_column("location", ledger.locations(shard)))
    return Page(
        title=f"{name_of(out)}: {plural(summary['images'], 'image')} segmented",
        subtitle=f"Predicted by unet-ray {__version__}: {storage.without_secrets(out)}",
        tiles=_tiles(summary),
        notes=_notes(summary, sample if len(read) < len(shards) else None),
        sections=[
            *_failures(summary, sample),
            *_galleries(out, sample),
            *_masks(sample),
            _times(summary),
            _settings(summary, settings),
        ],
    ).html()


def _tiles(summary: dict[str, Any]) -> list[tuple[str, str]]:
    new = summary["images"] - summary["already_done"]
    rate = f"{summary['images_per_second']:.1f}/s" if new else "–"
    return [
        (str(summary["images"]), "images"),
        (str(summary["ok"]), "segmented"),
        (str(summary["failed"]), "failed"),
        (rate, f"in {duration(summary['seconds'])}, start included"),
    ]


def _notes(summary: dict[str, Any], sample: ManifestSample | None) -> list[str]:
    """Returns the notes; `sample` is None if it is the whole manifest."""
    notes = []
    if sample is not None:
        notes.append(
            f"Names, pictures and distributions are of {sample.count} of {summary['images']} images, evenly spaced."
        )
    if summary["already_done"]:
        notes.append(f"{summary['already_done']} of the images were done by an earlier run.")
    if len(summary.get("arithmetic", ())) > 1:
        notes.append(f"Masks are of several arithmetics: {', then '.join(summary['arithmetic'])}.")
    if summary.get("unlike"):
        notes.append(f"The images look unlike those of the training: {', '.join(summary['unlike'])}.")
    if summary["cleanup"] != "none":
        notes.append(f"Masks were cleaned up: {summary['cleanup']}.")
    return notes


def _failures(summary: dict[str, Any], sample: ManifestSample) -> list[Section]:
    if not summary["failures"]:
        return []
    rows = [
        [str(count), reason, ", ".join(map(short, sample.names[reason])) or "–"]
        for reason, count in list(summary["failures"].items())[:REASONS]
    ]
    more = len(summary["failures"]) - REASONS
    text = "In the manifest each has its row" + (f"; {more} more reasons are there." if more > 0 else ".")
    table = Table(rows, ["images", "reason", "for example"], words=True)
    return [Section(title="What failed", text=text, table=table)]


def _galleries(out: str, sample: ManifestSample) -> list[Section]:
    drawer = PredictionPictures(out, max(2, len(sample.pixels)))
    sections = []
    for title, text, rows in (
        (
            "Least sure",
            "Where the network was least sure of what it found: worth a look, and worth a label (unet-ray select). The "
            "uncertainty is the entropy of the pixels' classes, from 0 to 1, in the mean over what may be "
            "foreground.",
            sample.least_sure(),
        ),
        ("A random dozen", "", sample.random()),
    ):
        pictures = list(drawer.draw(rows))
        if pictures:
            sections.append(Section(title=title, text=text, groups=[Group("", pictures=pictures)]))
    return sections


def _masks(sample: ManifestSample) -> list[Section]:
    """Returns the distributions of areas and uncertainties."""
    if not sample.ok:
        return []
    foreground, uncertainty = sample.foreground(), sample.uncertainty()
    empty = int((foreground == 0).sum())
    text = f"{plural(empty, 'mask is', 'masks are')} empty." if empty else ""
    table = None
    if len(sample.pixels) > 2:
        total = sample.pixels.sum()
        rows = [[str(class_id), f"{count / total:.2%}"] for class_id, count in enumerate(sample.pixels)]
        table = Table(rows, ["class", "pixels"])
    enough = len(foreground) >= FEWEST_FOR_HISTOGRAMS
    charts = mask_histograms(foreground, uncertainty) if enough else []
    if not (text or charts or table):
        return []
    return [Section(title="Masks", text=text, charts=charts, table=table, keep=True)]


def _times(summary: dict[str, Any]) -> Section:
    stages = summary["stages"]
    rows = [[label, duration(stages[name])] for name, label in STAGES.items() if name in stages]
    return Section(title="Time", table=Table(rows, ["", "time"]), keep=True)


def _settings(summary: dict[str, Any], settings: dict[str, Any]) -> Section:
    def text(value: Any) -> str:
        if isinstance(value, str):
            return value
        return ", ".join(value) if isinstance(value, list) else json.dumps(value)

    shown = {"model": summary["model"], **settings, "arithmetic": summary.get("arithmetic")}
    rows = [[name, text(value)] for name, value in shown.items() if value]
    return Section(title="How it was made", table=Table(rows))
