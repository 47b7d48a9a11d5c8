"""Prediction: masks for every image of folders and buckets, through Ray Data or in this process.

The inputs are cut into chunks. A chunk's masks appear first and its part of the manifest last, each whole or not at
all: a run that was stopped and is started again does the chunks that have no part yet, and ends with the same files.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from unet_ray import checkpoint, engine, records, stages, storage
from unet_ray.checkpoint import ModelCard
from unet_ray.config import EvaluateConfig, PredictConfig, UserError
from unet_ray.records import ImageFile
from unet_ray.stages import Chunk, Stage

SETTINGS, SUMMARY = "settings.json", "summary.json"

OnProgress = Callable[[int, int, int], None]
"""(done, failed, all) images, after each chunk."""


@dataclass(frozen=True, slots=True)
class PredictSummary:
    """What `predict` returns, and `summary.json` holds."""

    out: str
    images: int
    ok: int
    failed: int
    failures: dict[str, int]
    """Reason -> how many images."""
    already_done: int
    """Images that an earlier, stopped run had finished."""
    seconds: float
    images_per_second: float
    """Of the images done in this run."""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def predict(
    config: PredictConfig,
    *,
    local: bool = False,
    cluster: AbstractContextManager[None] = nullcontext(),
    on_progress: OnProgress = lambda _done, _failed, _all: None,
) -> PredictSummary:
    """Segments every image of `config.inputs` into `config.out`: through Ray Data, or with `local` in this process.

    `cluster` is entered once all that needs no Ray has been checked: a context in which `ray.init` has been called
    (nothing, where the caller has called it, or with `local`).

    Raises UserError for what the user can mend. An image that can't be read is a row of the manifest.
    """
    started = time.perf_counter()
    out = storage.absolute(config.out)
    model = checkpoint.model_directory(storage.absolute(config.model))
    card = checkpoint.read_card(model)
    _check_out(config, card, out)
    images, outputs = _inputs(config.inputs)
    chunks = stages.chunked(
        {
            "path": [image.path for image in images],
            "output": outputs,
            "size": [image.size for image in images],
            "mtime_ns": [image.mtime_ns for image in images],
        },
        row_bytes(card),
    )
    parts = {part_name(chunk) for chunk in chunks}
    for folder in (stages.PARQUET_MANIFEST, stages.PARQUET_MASKS):
        for stale in set(storage.names_in(storage.join(out, folder))) - parts:
            storage.delete_file(storage.join(out, folder, stale))
    todo = [chunk for chunk in chunks if not _is_done(out, chunk)]
    already_done = len(images) - sum(len(chunk["path"]) for chunk in todo)

    done, failed = already_done, 0
    on_progress(done, failed, len(images))
    write = stages.Write(out, config.formats, card)
    for result in run_stages(todo, decoder_of(card), model, write, machine=config, local=local, cluster=cluster):
        done += len(result["status"])
        failed += int((result["status"] == "failed").sum())
        on_progress(done, failed, len(images))

    # Counted in the manifest, not on the way: it is what a stopped run and this one have written together.
    failures: Counter[str] = Counter()
    ok = 0
    for part in sorted(parts):
        manifest = _read_part(out, part, ["status", "error"])
        ok += pc.sum(pc.equal(manifest["status"], "ok")).as_py()
        failures.update(error for error in manifest["error"].to_pylist() if error)
    seconds = time.perf_counter() - started
    summary = PredictSummary(
        out=out,
        images=len(images),
        ok=ok,
        failed=len(images) - ok,
        failures=dict(failures.most_common()),
        already_done=already_done,
        seconds=round(seconds, 3),
        images_per_second=round((len(images) - already_done) / seconds, 3),
    )
    storage.write_bytes(storage.join(out, SUMMARY), (json.dumps(summary.to_json(), indent=2) + "\n").encode())
    return summary


def run_stages(
    chunks: Sequence[Chunk],
    before: Stage,
    model: str,
    after: Stage,
    *,
    machine: PredictConfig | EvaluateConfig,
    local: bool,
    cluster: AbstractContextManager[None],
) -> Iterator[Chunk]:
    """Chunks through decode, model and `after`: the one way that prediction and evaluation share."""
    if not chunks:
        return
    segment = functools.partial(stages.Segment, model, machine.precision)
    if local:
        here = engine.device_here(machine.device, machine.workers).type
        yield from stages.run_here(chunks, before, functools.partial(segment, device=here), after)
        return
    with cluster:
        from unet_ray import datasets

        datasets.configure()
        yield from datasets.run_on_cluster(
            chunks, before, segment, after, workers=machine.workers, device=machine.device
        )


def decoder_of(card: ModelCard) -> stages.Decode:
    return stages.Decode(card.model.in_channels, card.image_size)


def row_bytes(card: ModelCard) -> int:
    """Bytes of the larger of a row's image (uint8) and its logits (float16)."""
    height, width = card.image_size
    return height * width * max(card.model.in_channels, 2 * card.model.num_classes)


def part_name(chunk: Chunk) -> str:
    return stages.PART.format(int(chunk["chunk"][0]))


def _inputs(locations: Sequence[str]) -> tuple[list[ImageFile], list[str]]:
    """All images of all inputs, and the path below OUT of each one's mask: the image's own relative path.

    Several inputs are told apart by their folder's name, equal stems by keeping the extension.
    """
    found = [(location, records.find_images(location)) for location in locations]
    images, stems, names = [], [], []
    used: Counter[str] = Counter()
    for location, listing in found:
        prefix = ""
        if len(found) > 1:
            base = PurePosixPath(location.partition("?")[0]).name or "input"
            used[base] += 1
            prefix = f"{base}/" if used[base] == 1 else f"{base}-{used[base]}/"
        images += listing
        stems += [prefix + image.key for image in listing]
        names += [prefix + image.name for image in listing]
    count = Counter(stems)
    outputs = [
        f"{stages.PNG_MASKS}/{stem if count[stem] == 1 else name}.png" for stem, name in zip(stems, names, strict=True)
    ]
    return images, outputs


def _check_out(config: PredictConfig, card: ModelCard, out: str) -> None:
    """Raises UserError if `out` holds something else than this very prediction, stopped half-way or finished."""
    settings = {
        "weights_sha256": card.weights_sha256,
        "inputs": [storage.absolute(location) for location in config.inputs],
        "formats": sorted(config.formats),
        "precision": config.precision,
    }
    path = storage.join(out, SETTINGS)
    if storage.exists(path):
        before = json.loads(storage.read_bytes(path))
        changed = [name for name in settings if settings[name] != before.get(name)]
        if changed:
            raise UserError(f"{out} holds another run (other {', '.join(changed)}): choose another --out")
    elif storage.names_in(out):
        raise UserError(f"{out} holds other files, no prediction: choose another --out")
    else:
        storage.write_bytes(path, (json.dumps(settings, indent=2) + "\n").encode())


def _is_done(out: str, chunk: Chunk) -> bool:
    """Whether the manifest has a part for exactly these files, as they are now."""
    part = part_name(chunk)
    if not storage.exists(storage.join(out, stages.PARQUET_MANIFEST, part)):
        return False
    columns = ["path", "size", "mtime_ns"]
    manifest = _read_part(out, part, columns)
    return all(manifest[name].to_pylist() == chunk[name].tolist() for name in columns)


def _read_part(out: str, part: str, columns: list[str]) -> Any:
    data = storage.read_bytes(storage.join(out, stages.PARQUET_MANIFEST, part))
    return pq.read_table(io.BytesIO(data), columns=columns)
