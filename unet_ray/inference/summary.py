"""Ends a prediction: counts its rows, and writes what holds all images: summary.json, and the files of some formats."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow.compute as pc

from unet_ray.data import storage
from unet_ray.data.output_lock import LOOK_SECONDS, OccupiedError, output_lock
from unet_ray.inference import output_folder
from unet_ray.inference.formats import OutputFormat
from unet_ray.inference.ledger import WORK, Ledger
from unet_ray.inference.output_folder import SUMMARY
from unet_ray.inference.parts import WHOLE, Part
from unet_ray.inference.pipeline import Pipeline

log = logging.getLogger("unet_ray")

FINISH_LOCK = f"{WORK}/finish.json"
"""Lock of the part that writes the files of all parts."""


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
    threshold: float
    """Probability above which a pixel is foreground (one class)."""
    arithmetic: list[str]
    """With what the network computed, such as `torch in bf16 on CPUs`; several with --allow-mixed."""
    seconds: float
    images_per_second: float
    """Images done in this run per second of `seconds`, which includes the start."""
    stages: dict[str, float]
    """Seconds of listing, of starting (Ray and the model, up to the first image done), of running, and of the work in
    each stage, summed over all processes."""
    unlike: tuple[str, ...] = ()
    """In what the images of this run look unlike those of the training (`data.looks`)."""
    parts_missing: tuple[str, ...] = ()
    """With `--part`: the parts that are not done yet. Until they are, the counts are those of this part."""

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


class Outcome(NamedTuple):
    """What one run did."""

    listed: int
    """Images of its inputs."""
    new: int
    """Images that it segmented, or that failed."""
    began: float
    """`time.perf_counter()` at the beginning."""
    stages: dict[str, float]
    """See `PredictSummary`."""
    unlike: tuple[str, ...]


def unlike_before(out: str) -> tuple[str, ...]:
    """Returns `PredictSummary.unlike` of an earlier run into the same folder."""
    place = storage.join(out, SUMMARY)
    return tuple(json.loads(storage.read_bytes(place)).get("unlike", ())) if storage.exists(place) else ()


def finish(ledger: Ledger, formats: Sequence[OutputFormat], pipeline: Pipeline, outcome: Outcome) -> PredictSummary:
    """Ends a run whose images are all done. Returns its summary.

    The part that is the last to be done writes the files of all parts, and returns the summary of all.
    """
    if ledger.part == WHOLE:
        return _write_files(ledger, formats, pipeline, outcome)
    output_folder.record_done(ledger.out, ledger.part, outcome.listed)
    done = output_folder.listed_by_parts(ledger.out)
    missing = [str(Part(n, ledger.part.of)) for n in range(1, ledger.part.of + 1) if n not in done]
    if missing:
        return dataclasses.replace(_summary(ledger, pipeline, outcome), parts_missing=tuple(missing))
    said = False
    while True:
        try:
            # Another part may be writing them now. It began before this one was done, so they are written again.
            with output_lock(ledger.out, FINISH_LOCK) as lock:
                whole = dataclasses.replace(ledger, part=WHOLE, holder=lock.holder)
                return _write_files(whole, formats, pipeline, outcome._replace(listed=sum(done.values())))
        except OccupiedError as other:
            if not said:
                log.warning("waiting: %s", str(other).partition(":")[0])
                said = True
            time.sleep(LOOK_SECONDS)


def _write_files(
    ledger: Ledger, formats: Sequence[OutputFormat], pipeline: Pipeline, outcome: Outcome
) -> PredictSummary:
    for format in formats:
        ledger.check_lock()
        format.write_final(ledger)
    summary = _summary(ledger, pipeline, outcome)
    text = json.dumps(summary.to_json(), indent=2) + "\n"
    ledger.check_lock()
    storage.write_bytes(storage.join(ledger.out, SUMMARY), text.encode(), durable=True)
    return summary


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


def _summary(ledger: Ledger, pipeline: Pipeline, outcome: Outcome) -> PredictSummary:
    counts = _count(ledger)
    seconds = time.perf_counter() - outcome.began
    return PredictSummary(
        out=ledger.out,
        model=storage.without_secrets(pipeline.model),
        images=counts.images,
        ok=counts.ok,
        failed=counts.images - counts.ok,
        failures=dict(counts.failures.most_common(100)),
        already_done=counts.images - outcome.new,
        gone=counts.images - outcome.listed,
        cleanup=pipeline.cleanup_text,
        threshold=pipeline.card.threshold,
        arithmetic=[*dict.fromkeys(map(str, output_folder.arithmetics(ledger.out)))],
        seconds=round(seconds, 3),
        images_per_second=round(outcome.new / seconds, 3),
        stages={name: round(value, 3) for name, value in outcome.stages.items()},
        unlike=outcome.unlike,
    )
