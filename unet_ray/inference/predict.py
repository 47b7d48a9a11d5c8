"""Predicts masks for all images of folders and buckets, through Ray Data or in this process.

The ledger (`ledger.py`) records which images are done; the stages (`stages.py`) segment the others chunk by chunk.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow.compute as pc

from unet_ray.config import PredictConfig, UserError
from unet_ray.data import storage
from unet_ray.data.chunks import Chunk
from unet_ray.data.output_lock import OutputLock, output_lock
from unet_ray.data.progress import OnProgress
from unet_ray.inference import output_folder
from unet_ray.inference.arithmetic import Arithmetic
from unet_ray.inference.choose_arithmetic import Work, choose, go_on
from unet_ray.inference.formats import OutputFormat, formats_of
from unet_ray.inference.ledger import SHARD_ROWS, WORK, Ledger, ShardState, SideTable
from unet_ray.inference.naming import Naming, images_of
from unet_ray.inference.output_folder import LOCK, SETTINGS, SUMMARY
from unet_ray.inference.pipeline import Pipeline
from unet_ray.inference.resolve import pipeline_of
from unet_ray.inference.stages import TIMES
from unet_ray.inference.survey import survey
from unet_ray.inference.write import Write
from unet_ray.ray_backend.session import Runtime


@dataclass(frozen=True, slots=True)
class PredictSummary:
    """Summarizes a prediction: `predict` returns it, and `summary.json` holds it."""

    out: str
    model: str
    """The model directory."""
    images: int
    """Rows of the manifest."""
    ok: int
    failed: int
    failures: dict[str, int]
    """Reason -> number of images; the hundred most frequent reasons."""
    already_done: int
    """Images that earlier runs had done."""
    gone: int
    """Images of earlier runs that the inputs no longer contain; their rows and masks stay."""
    cleanup: str
    """Clean-up of the masks, such as `holes`, or `none`."""
    arithmetic: list[str]
    """With what the network computed, such as `torch in bf16 on CPUs`; several with --allow-mixed."""
    seconds: float
    images_per_second: float
    """Images done in this run per second of `seconds`, which includes the start."""
    stages: dict[str, float]
    """Seconds of listing, of starting (Ray and the model, up to the first image done), of running, and of the work in
    each stage, summed over all processes."""

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
    """Segments every image of `config.inputs` into `config.out`, through Ray Data or in this process (`runtime`).

    It starts Ray only after all checks that need no Ray. Raises UserError for what the user must fix. An image that
    can't be read becomes a failed row of the manifest.
    """
    started = time.perf_counter()
    out = storage.absolute(config.out)
    pipeline = pipeline_of(config.model, config)
    formats = formats_of(config.formats, pipeline.card)
    settings = output_folder.settings_of(config, pipeline)
    if not storage.exists(storage.join(out, WORK, LOCK)):  # else another run may be beginning: the lock tells
        output_folder.check(out, settings, config)
    with _disk_errors_as_user_errors(out), output_lock(out, f"{WORK}/{LOCK}") as lock:
        if config.overwrite:
            output_folder.remove(out)
        else:
            # Again, because another run may have begun and ended before this one got the lock.
            output_folder.check(out, settings, config)
        ledger = Ledger(out, _tables(formats), config.retry_failed, lock.holder)
        listed = _survey(config, ledger, pipeline, output_folder.begin(out, settings), on_progress)
        run = _Run(ledger, on_progress, allow_mixed=config.allow_mixed)
        write = Write(ledger, formats, pipeline.card, pipeline.reader())
        run.segment(pipeline, write, runtime, lock)
        counts = _count(ledger)
        for format in formats:
            ledger.check_lock()
            format.write_final(ledger)
        summary = _summary(pipeline, run, listed, counts, started)
        text = json.dumps(summary.to_json(), indent=2) + "\n"
        ledger.check_lock()
        storage.write_bytes(storage.join(out, SUMMARY), text.encode(), durable=True)
    return summary


def _tables(formats: tuple[OutputFormat, ...]) -> tuple[SideTable, ...]:
    """Returns the side tables of the formats, one per folder: formats may share a table."""
    return tuple({format.table.folder: format.table for format in formats if format.table is not None}.values())


def _survey(config: PredictConfig, ledger: Ledger, pipeline: Pipeline, begun: bool, on_progress: OnProgress) -> int:
    """Writes the images of the inputs into the ledger. Returns their number.

    `begun`: whether an earlier run had begun in this folder. Raises UserError if an input does not exist.
    """
    try:
        return survey(
            ledger,
            images_of(config.inputs, config.column),
            Naming(config.name),
            pipeline.row_cost(),
            lambda count: on_progress(count, 0, 0),
        )
    except UserError:
        if not begun:  # else the settings with a mistyped input would refuse the right one
            output_folder.remove(ledger.out)
        raise


class _Run:
    """Segments the images that the ledger lists as not done, and counts images and seconds."""

    def __init__(self, ledger: Ledger, on_progress: OnProgress, *, allow_mixed: bool) -> None:
        self.ledger, self.on_progress, self.allow_mixed = ledger, on_progress, allow_mixed
        shards = ledger.shards()
        self.states: dict[int, ShardState] = dict(zip(shards, ledger.states(shards), strict=True))
        self.images = sum(state.rows for state in self.states.values())
        self.already_done = sum(state.done for state in self.states.values())
        self.done, self.failed = self.already_done, sum(state.failed for state in self.states.values())
        self.remaining = {shard: state.rows - state.done for shard, state in self.states.items() if state.todo}
        """Shard -> rows to do; without shards whose last chunk this run has done."""
        self.work_seconds = dict.fromkeys(TIMES, 0.0)
        self.listed = time.perf_counter()
        self.first_done: float | None = None
        self.ended = self.listed
        on_progress(self.done, self.failed, self.images)

    def segment(self, pipeline: Pipeline, write: Write, runtime: Runtime, lock: OutputLock) -> None:
        """Runs the chunks with work through the pipeline, and merges each shard after its last chunk."""
        numbers = [number for state in self.states.values() for number in state.todo]
        shared = {f"--out {self.ledger.out}": storage.join(self.ledger.out, SETTINGS)}
        if numbers:
            shared["INPUT"] = self.ledger.first_location(numbers[0])
        chunks = pipeline.run(
            numbers,
            self.ledger.load,
            write,
            images=self.images,
            probabilities=any(format.wants_probabilities for format in write.formats),
            shared=shared,
            runtime=runtime,
            settle=self._arithmetic,
        )
        with ThreadPoolExecutor(2) as threads, closing(chunks):
            # An earlier run recorded the last chunk of these shards, and was stopped before it merged them.
            complete = [shard for shard, state in self.states.items() if not state.todo and not state.merged]
            merges = [threads.submit(self.ledger.merge_shard, shard) for shard in complete]
            for chunk in chunks:
                lock.check()
                if (shard := self._add(chunk)) is not None:
                    merges.append(threads.submit(self.ledger.merge_shard, shard))
            # If a node is lost after a chunk was recorded, Ray may repeat all stages of this chunk. `Ledger.load` then
            # finds no row to do, the chunk is empty, and `_add` never sees it. So its shard is complete, but still in
            # `remaining`. (`merge_shard` raises RuntimeError if a row is missing after all.)
            merges += [threads.submit(self.ledger.merge_shard, shard) for shard in self.remaining]
            _wait_for(merges)
        self.ended = time.perf_counter()

    def _arithmetic(self, work: Work) -> Arithmetic:
        """Chooses the arithmetic for new masks. If earlier runs have made some, goes on with theirs. Records it."""
        used = output_folder.arithmetics(self.ledger.out) if self.already_done else []
        chosen = go_on(work, used, allow_mixed=self.allow_mixed) if used else choose(work)
        if chosen not in used:
            self.ledger.check_lock()
            output_folder.record_arithmetics(self.ledger.out, [*used, chosen])
        return chosen

    def _add(self, chunk: Chunk) -> int | None:
        """Counts the rows of a chunk that is done. Returns its shard if no row of the shard remains."""
        self.first_done = self.first_done or time.perf_counter()
        self.done += len(chunk["status"])
        self.failed += int((chunk["status"] == "failed").sum())
        for name in TIMES:
            self.work_seconds[name] += float(chunk[name].sum()) / 1e3
        self.on_progress(self.done, self.failed, self.images)
        shard = int(chunk["number"][0]) // SHARD_ROWS
        self.remaining[shard] -= len(chunk["number"])
        if self.remaining[shard] > 0:
            return None
        del self.remaining[shard]
        return shard

    def seconds_by_stage(self, started: float) -> dict[str, float]:
        """Returns `PredictSummary.stages`. `started`: `time.perf_counter()` at the beginning of `predict`."""
        first_done = self.first_done or self.listed
        return {
            "listing": self.listed - started,
            "starting": first_done - self.listed,
            "running": self.ended - first_done,
            **{name.removesuffix("_ms"): seconds for name, seconds in self.work_seconds.items()},
        }


def _wait_for(futures: list[Future[None]]) -> None:
    """Waits for all futures. Raises the error of the first one that failed."""
    for future in futures:
        future.result()


class _Counts(NamedTuple):
    """Counts the rows of the manifest."""

    images: int
    ok: int
    failures: Counter[str]
    """Reason -> number of images."""


def _count(ledger: Ledger) -> _Counts:
    """Counts the rows of the whole manifest, which earlier runs may have written in part."""
    failures: Counter[str] = Counter()
    ok = images = 0
    for table in ledger.manifest(["status", "error"]):
        images += len(table)
        ok += pc.sum(pc.equal(table["status"], "ok")).as_py()
        failures.update(error for error in table["error"].to_pylist() if error)
    return _Counts(images, ok, failures)


def _summary(pipeline: Pipeline, run: _Run, listed: int, counts: _Counts, started: float) -> PredictSummary:
    """Returns the summary of a run. `listed`: images of the inputs. `started`: as in `_Run.seconds_by_stage`."""
    seconds = time.perf_counter() - started
    return PredictSummary(
        out=run.ledger.out,
        model=storage.without_secrets(pipeline.model),
        images=counts.images,
        ok=counts.ok,
        failed=counts.images - counts.ok,
        failures=dict(counts.failures.most_common(100)),
        already_done=run.already_done,
        gone=counts.images - listed,
        cleanup=pipeline.cleanup_text,
        arithmetic=[*dict.fromkeys(map(str, output_folder.arithmetics(run.ledger.out)))],
        seconds=round(seconds, 3),
        images_per_second=round((counts.images - run.already_done) / seconds, 3),
        stages={name: round(value, 3) for name, value in run.seconds_by_stage(started).items()},
    )


@contextmanager
def _disk_errors_as_user_errors(out: str) -> Iterator[None]:
    """Turns errors of the disk that the user must fix, such as a full or read-only one, into UserError."""
    try:
        yield
    except OSError as error:
        if error.errno not in storage.USER_MUST_FIX:
            raise
        what = error.strerror or "cannot be written"
        raise UserError(f"{out}: {what}. What is done is kept: fix it and give the same command again") from None
