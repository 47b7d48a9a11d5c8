"""Prediction: masks for every image of folders and buckets, through Ray Data or in this process.

What there is to do and what is done is the ledger's (`ledger.py`); the stages (`stages.py`) do it, a chunk at a time.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc

from unet_ray.config import PredictConfig, UserError
from unet_ray.data import storage
from unet_ray.data.inputs import ImageFile, iter_images, root_name
from unet_ray.inference import ledger
from unet_ray.inference.exports import COCO, SUBMISSION
from unet_ray.inference.exports import write as write_exports
from unet_ray.inference.ledger import PART_ROWS, Ledger
from unet_ray.inference.output_lock import LOCK, output_lock
from unet_ray.inference.pipeline import OnProgress, Pipeline
from unet_ray.inference.stages import (
    TIMES,
)
from unet_ray.inference.write import MASKS, OVERLAYS, PROBABILITIES, Write
from unet_ray.models import checkpoint
from unet_ray.ray_backend.session import Runtime

SETTINGS, SUMMARY, REPORT = "settings.json", "summary.json", "report.html"
OUTPUTS = (
    MASKS,
    PROBABILITIES,
    OVERLAYS,
    ledger.MANIFEST,
    "masks.parquet",
    "rle.parquet",
    SUBMISSION,
    COCO,
    SUMMARY,
    REPORT,
    ledger.WORK,
    SETTINGS,  # last: it says that the rest may be removed
)
"""All that prediction writes."""


@dataclass(frozen=True, slots=True)
class PredictSummary:
    """What `predict` returns, and `summary.json` holds."""

    out: str
    model: str
    """Its directory."""
    images: int
    """Rows of the manifest."""
    ok: int
    failed: int
    failures: dict[str, int]
    """Reason -> how many images, the most frequent hundred."""
    already_done: int
    """Images that an earlier run had finished."""
    gone: int
    """Images of an earlier run that the inputs no longer have; their rows and masks stay."""
    cleanup: str
    """What was done to the masks after they were decided; `none`."""
    seconds: float
    images_per_second: float
    """Of the images done in this run, start included."""
    stages: dict[str, float]
    """Seconds: listing, starting (Ray, the model, up to the first image done), running, and the work of each stage
    summed over all processes."""

    def __repr__(self) -> str:
        earlier = f" ({self.already_done} of them by an earlier run)" if self.already_done else ""
        lines = [
            f"PredictSummary: {self.ok} of {self.images} images segmented, {self.failed} failed{earlier}, "
            f"{self.images_per_second:.2f} images/s",
            *(f"  {count} x {reason}" for reason, count in list(self.failures.items())[:5]),
            f"  masks and manifest: {storage.without_secrets(self.out)}",
        ]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def predict(
    config: PredictConfig,
    *,
    runtime: Runtime = Runtime(),
    on_progress: OnProgress = lambda _done, _failed, _all: None,
) -> PredictSummary:
    """Segments every image of `config.inputs` into `config.out`: through Ray Data, or with `local` in this process.

    `cluster` is entered once all that needs no Ray has been checked: a context in which `ray.init` has been called
    (nothing, where the caller has called it, or with `local`).

    Raises UserError for what the user can mend. An image that can't be read is a row of the manifest.
    """
    started = time.perf_counter()
    out = storage.absolute(config.out)
    pipeline = Pipeline.of(config.model, config)
    classes = pipeline.card.model.num_classes
    if "kaggle" in config.formats and classes > 1:
        raise UserError(f"--format kaggle is for one class, the model has {classes}: use rle or coco")
    settings = _settings(config, pipeline)
    _check_out(settings, out, config.overwrite)
    with _written(out), output_lock(out) as still_mine:
        if config.overwrite:
            _remove(out)
        else:
            _check_out(settings, out, False)  # again: another run may have begun and ended meanwhile
        book = Ledger(out, _payloads(config.formats), config.retry_failed)
        begun = storage.exists(storage.join(out, SETTINGS))
        storage.write_bytes(storage.join(out, SETTINGS), (json.dumps(settings, indent=2) + "\n").encode())
        try:
            found = book.survey(
                _images(config.inputs),
                _Naming(config.name),
                pipeline.row_cost(),
                lambda count: on_progress(count, 0, 0),
            )
        except UserError:
            if not begun:  # a mistyped input must not stand in the way of the right one
                _remove(out)
            raise
        parts = book.parts()
        states = list(book.states(parts))
        images, already_done = sum(state.rows for state in states), sum(state.done for state in states)
        done, failed = already_done, sum(state.failed for state in states)
        listed = time.perf_counter()
        on_progress(done, failed, images)

        numbers = [number for state in states for number in state.todo]
        remaining = {part: state.rows - state.done for part, state in zip(parts, states, strict=True) if state.todo}
        seconds = dict.fromkeys(TIMES, 0.0)
        first_done = None
        write = Write(book, config.formats, pipeline.card, pipeline.reader())
        with ThreadPoolExecutor(2) as aside:
            # A part whose last chunk was written by a run that was then stopped.
            finishing = [
                aside.submit(book.finish, part)
                for part, state in zip(parts, states, strict=True)
                if not state.todo and not state.finished
            ]
            for result in pipeline.run(
                numbers,
                book.load,
                write,
                images=images,
                probabilities="prob" in config.formats,
                shared={
                    f"--out {out}": storage.join(out, SETTINGS),
                    **({"INPUT": book.first(numbers[0])} if numbers else {}),
                },
                runtime=runtime,
            ):
                still_mine()
                first_done = first_done or time.perf_counter()
                done += len(result["status"])
                failed += int((result["status"] == "failed").sum())
                for name in TIMES:
                    seconds[name] += float(result[name].sum()) / 1e3
                part = int(result["number"][0]) // PART_ROWS
                remaining[part] -= len(result["number"])
                if remaining[part] <= 0:
                    finishing.append(aside.submit(book.finish, part))
                    del remaining[part]
                on_progress(done, failed, images)
            finishing += [aside.submit(book.finish, part) for part in remaining]
            for future in finishing:
                future.result()

        ran = time.perf_counter()
        failures, ok, rows = _count(book)
        write_exports(book, config.formats, pipeline.card)
        total = time.perf_counter() - started
        summary = PredictSummary(
            out=out,
            model=storage.without_secrets(pipeline.model),
            images=rows,
            ok=ok,
            failed=rows - ok,
            failures=dict(failures.most_common(100)),
            already_done=already_done,
            gone=rows - found,
            cleanup=pipeline.cleanup_text,
            seconds=round(total, 3),
            images_per_second=round((rows - already_done) / total, 3),
            stages={
                "listing": round(listed - started, 3),
                "starting": round((first_done or listed) - listed, 3),
                "running": round(ran - (first_done or listed), 3),
                **{name.removesuffix("_ms"): round(value, 3) for name, value in seconds.items()},
            },
        )
        storage.write_bytes(storage.join(out, SUMMARY), (json.dumps(summary.to_json(), indent=2) + "\n").encode())
    return summary


@contextmanager
def _written(out: str) -> Iterator[None]:
    """A full or read-only disk, which is the user's to mend, as UserError."""
    try:
        yield
    except OSError as error:
        if error.errno not in storage.TO_MEND:
            raise
        what = error.strerror or "cannot be written"
        raise UserError(f"{out}: {what}. What is done is kept: mend it and give the same command again") from None


def _count(book: Ledger) -> tuple[Counter[str], int, int]:
    """(failures by reason, images segmented, rows): counted in the manifest, which stopped runs and this one wrote."""
    failures: Counter[str] = Counter()
    ok = rows = 0
    for table in book.manifest(["status", "error"]):
        rows += len(table)
        ok += pc.sum(pc.equal(table["status"], "ok")).as_py()
        failures.update(error for error in table["error"].to_pylist() if error)
    return failures, ok, rows


def _payloads(formats: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """What the ledger keeps beside the manifest, and where."""
    found = []
    if "parquet" in formats:
        found.append(("mask", "masks.parquet"))
    if "rle" in formats:
        found.append(("rle", "rle.parquet"))
    elif "coco" in formats:
        found.append(("rle", f"{ledger.WORK}/rle"))
    if "kaggle" in formats:
        found.append(("runs", f"{ledger.WORK}/runs"))
    return tuple(found)


def _images(locations: Sequence[str]) -> Iterator[ImageFile]:
    """All images of all inputs. Where there are several inputs, names begin with their folder's name."""
    used: Counter[str] = Counter()
    for location in locations:
        prefix = ""
        if len(locations) > 1:
            base = root_name(location)
            used[base] += 1
            prefix = f"{base}/" if used[base] == 1 else f"{base}-{used[base]}/"
        for image in iter_images(location):
            yield dataclasses.replace(image, name=prefix + image.name) if prefix else image


@dataclass(frozen=True, slots=True)
class _Naming:
    """Image -> paths that its mask may have, the first that is free being taken."""

    template: str

    def __call__(self, image: ImageFile) -> Iterator[str]:
        relpath, _, name = image.name.rpartition("/")
        stem, ext = os.path.splitext(name)  # noqa: PTH122 - by the million
        path = self._path(relpath, stem, name, ext)
        yield path
        # Of images that differ in the extension alone, the later ones keep it.
        yield self._path(relpath, name, name, ext)
        start, dot, end = path.rpartition(".")
        for number in itertools.count(2):
            yield f"{start}-{number}{dot}{end}"

    def _path(self, relpath: str, stem: str, name: str, ext: str) -> str:
        path = self.template.format(relpath=relpath, stem=stem, name=name, ext=ext.lstrip("."))
        # `..` only from an odd listing; below OUT/masks everything must stay.
        parts = [part for part in path.split("/") if part not in ("", ".", "..")]
        return "/".join(parts) + ("" if path.endswith(".png") else ".png")


def _settings(config: PredictConfig, pipeline: Pipeline) -> dict[str, Any]:
    """What makes two runs the same: what decides over the bytes of the output."""
    options = pipeline.options
    return {
        "weights_sha256": pipeline.card.weights_sha256,
        "ensemble": [checkpoint.read_card(model).weights_sha256 for model in options.ensemble],
        "inputs": [storage.without_secrets(storage.absolute(location)) for location in config.inputs],
        "formats": sorted(config.formats),
        "name": config.name,
        "precision": config.precision,
        "int8": pipeline.quantized and storage.split_options(pipeline.quantized)[0].rpartition("/")[2],
        "backend": config.backend,
        "tile": config.tile,
        "overlap": config.overlap if config.tile else None,
        "tta": config.tta,
        "cleanup": pipeline.cleanup_text,
    }


def _check_out(settings: dict[str, Any], out: str, overwrite: bool) -> None:
    """Raises UserError if `out` holds something else than this very prediction, stopped half-way or finished."""
    path = storage.join(out, SETTINGS)
    if storage.exists(path):
        before = json.loads(storage.read_bytes(path))
        changed = [name for name in settings if settings[name] != before.get(name)]
        if changed and not overwrite:
            raise UserError(
                f"{out} holds another run (other {', '.join(changed)}): choose another --out, or --overwrite removes it"
            )
    elif set(storage.names_in(out)) - {ledger.WORK}:
        raise UserError(f"{out} holds other files, no prediction: choose another --out")


def _remove(out: str) -> None:
    """Removes an earlier prediction, but for the lock that is held."""
    for name in OUTPUTS:
        location = storage.join(out, name)
        if name == ledger.WORK:
            for inner in set(storage.names_in(location)) - {LOCK}:
                storage.delete_folder(storage.join(location, inner))
        elif storage.is_folder(location):
            storage.delete_folder(location)
        else:
            storage.delete_file(location)
