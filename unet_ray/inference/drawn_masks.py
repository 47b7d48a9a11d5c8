"""Writes annotations as mask files: each once, also after a stop, through Ray or in this process."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from unet_ray.config import IGNORE, MAX_PIXELS, DataConfig, UserError
from unet_ray.data import cache, imaging, mask_files, pages, pictures, storage
from unet_ray.data.annotations import sources
from unet_ray.data.imaging import ImageError
from unet_ray.data.output_lock import output_lock
from unet_ray.data.pairs import Pair, find_pairs
from unet_ray.data.progress import OnProgress
from unet_ray.inference.reader import OVERLAY_SIDE
from unet_ray.ray_backend.session import Runtime

MASKS, OVERLAYS, CLASSES, LOCK = "masks", "overlays", "classes.json", "lock.json"
AT_ONCE = 32
"""Masks that are written between two looks at the lock."""


class Written(NamedTuple):
    """What `write_masks` has done."""

    images: int
    classes: tuple[str, ...]


def write_masks(
    images: str | tuple[str, ...],
    annotations: str,
    out: str,
    *,
    classes: tuple[str, ...] = (),
    overlap_order: str = "later",
    rle_order: str | None = None,
    overlay: bool = False,
    runtime: Runtime = Runtime(),
    on_progress: OnProgress = lambda _done, _failed, _all: None,
) -> Written:
    """Writes a mask of class ids for each annotated image, `OUT/masks/<image>.png`, and `OUT/classes.json`.

    `classes`: names to draw, without `background`; empty: all. A mask appears whole or not at all, and is on the disk
    then; the same command goes on after a stop, and other annotations need another `out`. Raises UserError.
    """
    out = storage.absolute(out)
    source = sources.recognised(annotations)
    if source is None:
        raise UserError(f"{annotations}: no annotations that can be read ({', '.join(sources.READERS)})")
    names = classes or tuple(n for n in sources.class_names(source)[0] if n.lower() not in sources.BACKGROUND)
    all_names = ("background", *names) if names else ("background", "foreground")
    data = DataConfig(
        images=images,
        masks=annotations,
        classes=all_names if names else (),
        overlap_order=overlap_order,  # type: ignore[arg-type]
        rle_order=rle_order,  # type: ignore[arg-type]
    )
    pairs = find_pairs(data, say=True)
    record = {"classes": [*all_names], "overlay": overlay, "annotations": _digest(pairs)}
    with output_lock(out, LOCK, "give the same command again") as lock, runtime.started():
        _check_record(out, record)
        todo = _todo(out, pairs)
        done = len(pairs) - len(todo)
        on_progress(done, 0, len(pairs))
        lists: list[cache.Pairs] = [
            [(pair, b"") for pair in todo[start : start + AT_ONCE]] for start in range(0, len(todo), AT_ONCE)
        ]
        for number, _ in enumerate(_run(runtime)(_Write(out, len(all_names), overlay), lists), 1):
            lock.check()
            on_progress(min(len(pairs), done + number * AT_ONCE), 0, len(pairs))
    return Written(len(pairs), all_names)


def _run(runtime: Runtime) -> cache.Run:
    if runtime.local:
        return cache.in_threads(os.cpu_count() or 1)
    from unet_ray.ray_backend.rows import run_in_tasks

    return run_in_tasks


def _digest(pairs: list[Pair]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for pair in pairs:
        digest.update(f"{pair.key}\0{pair.mask}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _check_record(out: str, record: dict[str, object]) -> None:
    """Writes classes.json. Raises UserError if `out` has masks of something else."""
    place = storage.join(out, CLASSES)
    if storage.exists(place):
        if json.loads(storage.read_bytes(place)) != record:
            raise UserError(f"{out} holds masks of other annotations or classes: choose another --out")
        return
    if [name for name in storage.names_in(out) if name != LOCK]:
        raise UserError(f"{out} holds other files: choose another --out")
    storage.write_bytes(place, (json.dumps(record, indent=2) + "\n").encode(), durable=True)


def _todo(out: str, pairs: list[Pair]) -> list[Pair]:
    """Returns the pairs whose mask is not there yet."""
    folder = storage.join(out, MASKS)
    if not storage.exists(folder):
        return pairs
    inner = storage.resolve(folder)[1].rstrip("/") + "/"
    there = {entry.path.removeprefix(inner) for entry in storage.list_files(folder)}
    return [pair for pair in pairs if f"{pair.key}.png" not in there]


@dataclass(frozen=True, slots=True)
class _Write:
    """Implements `cache.Write`: draws some masks and writes them, the overlay first."""

    out: str
    classes: int
    overlay: bool

    def __call__(self, pairs: cache.Pairs) -> None:
        for pair, _ in pairs:
            try:
                mask = np.asarray(imaging.stored_values(mask_files.read(pair.mask)), np.uint8)  # type: ignore[arg-type]
                self._write(pair, mask)
            except (ImageError, OSError) as error:
                raise UserError(f"{mask_files.shown(pair.mask)}: {error}") from None

    def _write(self, pair: Pair, mask: np.ndarray) -> None:
        count = 1 if self.classes == 2 and mask.max(initial=0) < IGNORE else max(2, self.classes)
        if self.overlay:
            size = imaging.fitted((mask.shape[0], mask.shape[1]), OVERLAY_SIDE)
            picture, _ = imaging.decode_image(pages.read_file(pair.image, MAX_PIXELS), 3, size, value_range=None)
            place = storage.join(self.out, OVERLAYS, *f"{pair.key}.jpg".split("/"))
            storage.write_bytes(place, pictures.overlay(picture, mask, count))
        place = storage.join(self.out, MASKS, *f"{pair.key}.png".split("/"))
        storage.write_bytes(place, pictures.encode_png(mask, count), durable=True)
