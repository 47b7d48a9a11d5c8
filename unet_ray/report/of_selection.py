"""Builds the page of a selection: each image to label, its mask, and where the network is unsure."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from unet_ray import __version__
from unet_ray.data import imaging, storage
from unet_ray.data.imaging import ImageError
from unet_ray.inference.formats.probabilities import names_of
from unet_ray.inference.ledger import Ledger
from unet_ray.report.pictures import SIDE, picture_uri
from unet_ray.report.prediction_pictures import PredictionPictures
from unet_ray.report.sections import Group, Page, Row, Section, Table, anchor, name_of, plural, short
from unet_ray.selection.select import ANNOTATIONS, PICKS, POOL, read_picks

SHOWN = 200
"""The most picks with pictures."""


def of_selection(out: str) -> str:
    """Returns the page of a selection's output folder."""
    picks = read_picks(storage.join(out, PICKS))
    of_path = _manifest_rows(storage.join(out, ANNOTATIONS))
    classes = max((len(row["pixels"]) for row in of_path.values() if row["pixels"]), default=2)
    drawer = PredictionPictures(storage.join(out, ANNOTATIONS), classes)
    rows = [row for pick in picks[:SHOWN] if (row := _row(drawer, pick, of_path.get(pick["path"]))) is not None]
    return Page(
        title=f"{name_of(out)}: {plural(len(picks), 'image')} to label next",
        subtitle=f"Chosen by unet-ray {__version__}: {storage.without_secrets(out)}",
        tiles=[(str(len(picks)), "images chosen"), *_tiles(picks, _uncertainties(storage.join(out, POOL)))],
        notes=[f"The first {SHOWN} have pictures; {PICKS} has all."] if len(picks) > SHOWN else [],
        sections=[
            Section(
                title="To label",
                text="The best first. The map is bright where the network is unsure: there the mask needs a look.",
                groups=[Group("", rows=rows)],
            ),
            _why(picks),
        ],
    ).html()


def _manifest_rows(out: str) -> dict[str, dict[str, Any]]:
    """Returns path -> row of the manifest of the annotations, with `location`."""
    ledger = Ledger(out, ())
    columns = ["path", "status", "height", "width", "output", "pixels", "uncertainty"]
    return {
        row["path"]: row
        for shard in ledger.shards()
        for table in ledger.manifest(columns, [shard])
        for row in table.append_column("location", ledger.locations(shard)).to_pylist()
    }


def _uncertainties(out: str) -> np.ndarray:
    """Returns the uncertainty of each image of the pool that can be read."""
    tables = list(Ledger(out, ()).manifest(["status", "uncertainty"]))
    columns = [np.extract(t["status"].to_numpy() == "ok", t["uncertainty"].to_numpy()) for t in tables]
    return np.concatenate(columns) if columns else np.zeros(0)


def _tiles(picks: list[dict[str, Any]], pool: np.ndarray) -> list[tuple[str, str]]:
    if not picks or not len(pool):
        return []
    mean = np.mean([float(pick["uncertainty"]) for pick in picks])
    return [
        (str(len(pool)), "images looked at"),
        (f"{mean:.3f}", "their mean uncertainty"),
        (f"{pool.mean():.3f}", "that of all looked at"),
    ]


def _row(drawer: PredictionPictures, pick: dict[str, Any], row: dict[str, Any] | None) -> Row | None:
    """Returns the pictures of a pick; None if its mask could not be made."""
    if row is None or row["status"] != "ok":
        return None
    picture, ids = drawer.picture(row), drawer.mask(row)
    drawn = [] if ids is None else [(drawer.overlay(picture, ids), "mask")]
    uncertain = _map(drawer.out, row, drawer.classes)
    if uncertain is not None:
        drawn.append((picture_uri(uncertain), "uncertainty"))
    shows = "nothing found" if pick["shows"] == "nothing" else pick["shows"]
    caption = (
        f"{pick['rank']}. {short(row['path'])}: uncertainty {float(pick['uncertainty']):.3f}, {shows}, "
        f"{float(pick['foreground']):.1%} foreground"
    )
    return Row(anchor(row["path"]), [(picture_uri(picture), "image"), *drawn], caption)


def _map(out: str, row: dict[str, Any], classes: int) -> np.ndarray | None:
    """Returns the entropy of each pixel as a heat map, uint8 [h,w,3]; None if the probabilities are gone."""
    output = PurePosixPath(row["output"]).relative_to("masks").as_posix()
    try:
        planes = [imaging.read_file(name) for name in _probabilities(out, output, classes)]
        height, width = imaging.fitted((row["height"], row["width"]), SIDE)
        shares = np.stack([_resized(imaging.stored_values(plane), (width, height)) for plane in planes])
    except (OSError, ImageError):
        return None
    shares = np.concatenate([1 - shares, shares]) if len(shares) == 1 else shares / shares.sum(axis=0).clip(1e-6)
    entropy = -(shares * np.log(shares.clip(1e-6))).sum(axis=0) / np.log(len(shares))
    import matplotlib

    return (255 * matplotlib.colormaps["inferno"](entropy)[..., :3]).astype(np.uint8)


def _probabilities(out: str, output: str, classes: int) -> list[str]:
    """Returns the files with the probabilities of a mask. A network gives two classes as one probability or as two."""
    one, all_classes = ([storage.join(out, *name.split("/")) for name in names_of(output, n)] for n in (1, classes))
    return one if classes == 2 and storage.exists(one[0]) else all_classes


def _resized(probability: np.ndarray, size_wh: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(probability).resize(size_wh, Image.Resampling.BOX), np.float32) / 255


def _why(picks: list[dict[str, Any]]) -> Section:
    counts: dict[str, list[float]] = {}
    for pick in picks:
        counts.setdefault(pick["shows"], []).append(float(pick["uncertainty"]))
    rows = [[name, str(len(values)), f"{np.mean(values):.3f}"] for name, values in counts.items()]
    text = (
        "The uncertainty is the entropy of the pixels' classes, from 0 to 1, in the mean over what may be foreground. "
        "Images are divided by the rarest class found in them, in proportion to the uncertainty of each group; in a "
        "group those are chosen that stand for the others, the uncertain above all, by what the network sees in them."
    )
    return Section(
        title="How they were chosen", text=text, table=Table(rows, ["the network finds", "images", "mean uncertainty"])
    )
