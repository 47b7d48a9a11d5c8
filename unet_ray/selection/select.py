"""Chooses the images of a pool that are worth a label: the uncertain ones, of all kinds, and no lookalikes.

pool/         a prediction of the whole pool, of which only the manifest is kept: each image's uncertainty
picks.csv     the images to label, the best first
annotations/  a prediction of the picks alone: what to correct, masks, probabilities
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from unet_ray.config import PredictConfig, UserError
from unet_ray.data import pages, storage, video
from unet_ray.data.progress import OnProgress
from unet_ray.evaluation.run_pairs import images_of_run
from unet_ray.inference.formats import formats_of
from unet_ray.inference.formats.base import class_names
from unet_ray.inference.ledger import Ledger
from unet_ray.inference.moved import Move, renamed
from unet_ray.inference.naming import images_of, shown
from unet_ray.inference.output_folder import REPORT, SETTINGS
from unet_ray.inference.predict import predict
from unet_ray.inference.resolve import pipeline_of
from unet_ray.models.checkpoint import ModelCard
from unet_ray.ray_backend.session import Runtime
from unet_ray.selection.choose import NOTHING, divided, merged, shown_classes, spread
from unet_ray.selection.embed import embeddings
from unet_ray.selection.pool import Pool, plain

POOL, PICKS, ANNOTATIONS = "pool", "picks.csv", "annotations"
FOR_THE_PAGE = ("png", "prob")
"""Formats that the report needs of the picks, beside the one to correct."""
Progress = Callable[[str], AbstractContextManager[OnProgress]]
"""Shows the progress of a step, such as `looked at`, for a `with` block."""


@dataclass(frozen=True, slots=True)
class Pick:
    """An image to label."""

    path: str
    """As in the manifest."""
    uncertainty: float
    """From 0 to 1, see `Certainty.uncertainty`."""
    shows: str
    """The class for which it was chosen: the rarest one in the pool that the network finds in it; or `nothing`."""
    foreground: float
    """Share of its pixels that the network takes for foreground."""


@dataclass(frozen=True, slots=True)
class Selection:
    """What `select` has done."""

    out: str
    pool: int
    """Images that could be chosen."""
    labelled: int
    """Images that were left out because the run has their masks."""
    failed: int
    """Images that can't be read; `pool/manifest.parquet` says why."""
    picks: tuple[Pick, ...]


def select(
    config: PredictConfig,
    count: int,
    *,
    runtime: Runtime = Runtime(),
    progress: Progress = lambda _what: nullcontext(lambda _done, _failed, _all: None),
) -> Selection:
    """Chooses `count` images of `config.inputs` and writes them into `config.out`, with annotations to correct in
    `config.formats`.

    The choice depends on the model and the images alone, not on the number of workers. It goes on after a stop, and
    never replaces annotations, unless `config.overwrite`. Raises UserError for what the user must fix.
    """
    if count < 1:
        raise UserError(f"--count {count}: 1 or more")
    if config.adapt:
        raise UserError("--adapt is for predict and evaluate: leave it out")
    card = pipeline_of(config.model, config).card
    formats_of(config.formats, card)
    next(images_of(config.inputs, config.column))  # an input that does not exist is found before Ray starts
    out = storage.absolute(config.out)
    others = set(storage.names_in(out)) - {POOL, PICKS, ANNOTATIONS, REPORT}
    if others:
        raise UserError(f"{out} holds other files ({min(others)}, …): choose another --out")
    labelled = images_of_run(config.model)
    with runtime.started():
        pool_config = dataclasses.replace(config, out=storage.join(out, POOL), formats=())
        with progress("looked at") as on_progress:
            summary = predict(pool_config, runtime=runtime, on_progress=on_progress)
        pool = Pool.read(Ledger(pool_config.out, ()), frozenset(map(plain, labelled)))
        if not len(pool.places):
            raise UserError(f"no image is left to choose: {pool.labelled} have labels, {summary.failed} can't be read")
        with progress("compared") as on_progress:
            rows, strata = _chosen(config, pool, count, runtime, on_progress)
        _check_no_videos(pool, rows)
        picks = _picks(pool, rows, strata, card)
        _write(storage.join(out, PICKS), picks, config)
        place = storage.join(out, ANNOTATIONS)
        annotations = dataclasses.replace(
            config,
            out=place,
            formats=tuple(dict.fromkeys((*config.formats, *FOR_THE_PAGE))),
            moved=config.moved if storage.exists(storage.join(place, SETTINGS)) else (),
        )
        with progress("annotated") as on_progress:
            predict(annotations, images=pool.image_files(rows), runtime=runtime, on_progress=on_progress)
    return Selection(out, len(pool.places), pool.labelled, summary.failed, picks)


def _chosen(
    config: PredictConfig, pool: Pool, count: int, runtime: Runtime, on_progress: OnProgress
) -> tuple[list[int], list[int]]:
    """Returns the rows of the pool that are chosen, the best first, and the stratum of each."""
    shows = shown_classes(pool.presence, pool.presence.sum(axis=0))
    strata = divided(pool.uncertainty, shows, count)
    candidates = np.concatenate([stratum.rows for stratum in strata])
    vectors: dict[int, np.ndarray] = {}
    for row, vector in embeddings(config, pool.inputs(candidates.tolist()), runtime):
        vectors[row] = vector
        on_progress(len(vectors), 0, len(candidates))
    orders = []
    for stratum in strata:
        rows = [row for row in stratum.rows.tolist() if row in vectors]  # others are gone since
        matrix = np.stack([vectors[row] for row in rows]) if rows else np.zeros((0, 1))
        orders.append([rows[place] for place in spread(pool.uncertainty[rows], matrix, stratum.seats)])
    rows = merged(orders)
    return rows, shows[rows].tolist()


def _check_no_videos(pool: Pool, rows: Sequence[int]) -> None:
    """Raises UserError for frames of videos, since neither annotation programs nor training read them."""
    for image in pool.image_files(rows):
        file = pages.file_of(image.path)
        if video.is_video(file):
            raise UserError(
                f"{file}: its frames can't be labelled: make images of them first, such as by "
                "`ffmpeg -i VIDEO FOLDER/%06d.png`, and choose from that folder"
            )


def _picks(pool: Pool, rows: Sequence[int], strata: Sequence[int], card: ModelCard) -> tuple[Pick, ...]:
    names = class_names(card)
    return tuple(
        Pick(
            row["path"],
            round(row["uncertainty"], 4),
            "nothing" if stratum == NOTHING else names[stratum],
            round(1 - row["pixels"][0] / max(1, sum(row["pixels"])), 4),
        )
        for row, stratum in zip(pool.manifest_rows(rows), strata, strict=True)
    )


def _write(location: str, picks: Sequence[Pick], config: PredictConfig) -> None:
    """Writes the picks. Raises UserError if there are others: their annotations may have been corrected."""
    if storage.exists(location) and not config.overwrite:
        moves = [Move.parse(text, shown(config.inputs)) for text in config.moved]
        if [renamed(row["path"], moves) for row in read_picks(location)] != [pick.path for pick in picks]:
            raise UserError(
                f"{location} has other picks, perhaps of another model or pool: choose another --out, or --overwrite "
                "removes them, with their annotations"
            )
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["path", "rank", "uncertainty", "shows", "foreground"])
    for rank, pick in enumerate(picks, 1):
        writer.writerow([pick.path, rank, pick.uncertainty, pick.shows, pick.foreground])
    storage.write_bytes(location, stream.getvalue().encode(), durable=True)


def read_picks(location: str) -> list[dict[str, Any]]:
    """Returns the rows of `picks.csv`."""
    return list(csv.DictReader(io.StringIO(storage.read_bytes(location).decode())))
