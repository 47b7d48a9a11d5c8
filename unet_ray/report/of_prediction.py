"""The page of a prediction."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unet_ray import __version__
from unet_ray.config import MAX_PIXELS, UserError
from unet_ray.data import imaging, pictures, storage
from unet_ray.data.imaging import ImageError
from unet_ray.data.inputs import evenly
from unet_ray.inference import ledger
from unet_ray.inference.predict import SETTINGS, SUMMARY
from unet_ray.inference.reader import Reader
from unet_ray.report.content import (
    SIDE,
    VALIDATED,
    Chart,
    Group,
    Section,
    Table,
    embedded,
    name_of,
    page,
    plural,
    short,
    svg,
)
from unet_ray.report.progress import duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes


GALLERY = 12
PARTS = 64
"""Parts of a manifest that are read, 4,096 images each; evenly spaced where there are more."""
NAMES, REASONS = 5, 20
"""File names for each reason of failure, and reasons."""


# --- a prediction ---


def of_prediction(out: str) -> str:
    summary = json.loads(storage.read_bytes(storage.join(out, SUMMARY)))
    settings = json.loads(storage.read_bytes(storage.join(out, SETTINGS)))
    book = ledger.Ledger(out, ())
    parts = book.parts()
    names = ["path", "status", "error", "height", "width", "output", "pixels", "confidence", "milliseconds"]
    some = evenly(parts, PARTS)
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
            [str(count), reason, ", ".join(map(short, seen.names[reason])) or "–"]
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
    return page(
        title=f"{name_of(out)}: {plural(summary['images'], 'image')} segmented",
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
            caption = f"{short(row['path'])}: confidence {row['confidence']:.3f}, {share:.1%} foreground"
            yield embedded(pictures.overlay(self._picture(row), ids, 1 if self.classes == 2 else self.classes)), caption

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
            return Reader(3, None, 2 * MAX_PIXELS).picture(data, size, SIDE)
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
        Chart(svg(areas, "% of the pixels"), "Images by how much of them is not background."),
        Chart(svg(sure, "confidence"), "Images by their mean confidence."),
    ]
    empty = int((shares == 0).sum())
    text = f"{plural(empty, 'mask is', 'masks are')} empty." if empty else ""
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
