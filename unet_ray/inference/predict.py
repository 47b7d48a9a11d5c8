"""Predicts masks for all images of folders and buckets, through Ray Data or in this process.

The ledger (`ledger.py`) records which images are done; the stages (`stages.py`) segment the others chunk by chunk.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager

from unet_ray.config import PredictConfig, UserError
from unet_ray.data import looks, storage, video
from unet_ray.data.chunks import Chunk
from unet_ray.data.darkness import SAMPLE, may_be_deep, warn_of_deep
from unet_ray.data.imaging import Source
from unet_ray.data.inputs import Choice, ImageFile, evenly
from unet_ray.data.output_lock import LOOK_SECONDS, OutputLock
from unet_ray.data.progress import OnProgress
from unet_ray.inference import adapt, output_folder
from unet_ray.inference.adapt import adapted
from unet_ray.inference.arithmetic import Arithmetic
from unet_ray.inference.choose_arithmetic import Work, choose, go_on
from unet_ray.inference.formats import OutputFormat, formats_of
from unet_ray.inference.ledger import SHARD_ROWS, Ledger, Loader, ShardState, SideTable
from unet_ray.inference.moved import rename
from unet_ray.inference.naming import Naming, images_of
from unet_ray.inference.output_folder import SETTINGS
from unet_ray.inference.parts import WHOLE, Part
from unet_ray.inference.pipeline import Pipeline
from unet_ray.inference.reader import Reader
from unet_ray.inference.resolve import pipeline_of
from unet_ray.inference.rounds import expected, rounds
from unet_ray.inference.stages import TIMES
from unet_ray.inference.summary import Outcome, PredictSummary, finish, unlike_before
from unet_ray.inference.survey import Survey
from unet_ray.inference.unlike import say_if_unlike
from unet_ray.inference.write import Write
from unet_ray.ray_backend.session import LOCAL, Runtime

log = logging.getLogger("unet_ray")


def predict(
    config: PredictConfig,
    *,
    images: Iterable[ImageFile] | None = None,
    runtime: Runtime = Runtime(),
    on_progress: OnProgress = lambda _done, _failed, _all: None,
) -> PredictSummary:
    """Segments every image of `config.inputs` into `config.out`, through Ray Data or in this process (`runtime`).

    `images`: those of the inputs that are to be segmented; None: all that a listing finds. It starts Ray only after all
    checks that need no Ray. Raises UserError for what the user must fix. An image that can't be read becomes a failed
    row of the manifest.
    """
    started = time.perf_counter()
    out = storage.absolute(config.out)
    pipeline = pipeline_of(config.model, config)
    formats = formats_of(config.formats, pipeline.card)
    part = Part.parse(config.part)
    _check(config, pipeline, out)
    settings = output_folder.settings_of(config, pipeline, part)
    lock_file = storage.join(out, *output_folder.lock_of(part).split("/"))
    if not storage.exists(lock_file):  # else another run may be beginning: the lock tells
        output_folder.check(out, settings, config)
    with _disk_errors_as_user_errors(out), output_folder.claimed(out, part) as lock:
        if config.overwrite:
            output_folder.remove(out)
        else:
            # Again, because another run may have begun and ended before this one got the lock.
            output_folder.check(out, settings, config)
        ledger = Ledger(out, _tables(formats), config.retry_failed, lock.holder, part)
        rename(ledger, output_folder.moves(out, config))
        begun = output_folder.begin(out, settings, part)
        survey = Survey(ledger, pipeline.row_cost(), pipeline.reader() if config.same_content else None)
        run = _Run(ledger, survey, on_progress, allow_mixed=config.allow_mixed)
        unlike: tuple[str, ...] | None = None
        with closing(_rounds(config, images, survey, pipeline, begun, run.tell)) as listing, ExitStack() as stack:
            for shards in listing:
                run.take(shards)
                unlike = unlike or say_if_unlike(run.sample(pipeline.reader(), looks.SAMPLE), pipeline)
                if config.adapt and run.images:
                    sample = run.sample(pipeline.reader(), adapt.SAMPLE)
                    pipeline = adapted(pipeline, sample, storage.join(out, adapt.FOLDER), unlike)
                if run.numbers and not survey.complete:
                    stack.enter_context(runtime.started())  # for all rounds
                run.segment(pipeline, Write(ledger, formats, pipeline.card, pipeline.reader()), runtime, lock)
        said = unlike or unlike_before(ledger.out)
        outcome = Outcome(survey.count, run.done - run.already_done, started, run.seconds_by_stage(started), said)
        return finish(ledger, formats, pipeline, outcome)


def _check(config: PredictConfig, pipeline: Pipeline, out: str) -> None:
    """Raises UserError if the model can't be adapted, or would be removed."""
    if config.adapt:
        adapt.check(pipeline)
    if config.overwrite and any(model.startswith(f"{out}/") for model in (pipeline.model, *pipeline.options.ensemble)):
        raise UserError(f"--overwrite would remove the model, which is in {out}: choose another --out")


def _tables(formats: tuple[OutputFormat, ...]) -> tuple[SideTable, ...]:
    """Returns the side tables of the formats, one per folder: formats may share a table."""
    return tuple({format.table.folder: format.table for format in formats if format.table is not None}.values())


def _rounds(
    config: PredictConfig,
    given: Iterable[ImageFile] | None,
    survey: Survey,
    pipeline: Pipeline,
    begun: bool,
    on_listed: Callable[[], None],
) -> Generator[list[int], None, None]:
    """Lists the images of the inputs, or those given, into the ledger. Yields the shards of each round of work.

    Work begins while a large input is listed. Not if there are several, of which a later one may not exist, nor if the
    model is adapted to a sample of all images. `begun`: whether an earlier run had begun in this folder. Raises
    UserError if an input does not exist.
    """
    ledger, choice, working = survey.ledger, Choice(strict=config.strict), False
    if given is None:
        given = images_of(config.inputs, config.column, choice, pipeline.card.model.in_channels)
    images, naming = ledger.part.share(iter(given), Naming(config.name))
    at_once = len(config.inputs) == 1 and not config.adapt
    listing = rounds(survey, images, naming, at_once=at_once, on_listed=on_listed)
    try:
        with closing(listing):
            for shards in listing:
                if survey.complete:
                    _say_what_was_passed_over(choice)
                working = True
                yield shards
    except UserError:
        if not begun and not working:  # else the settings with a mistyped input would refuse the right one
            ledger.check_lock()  # another run may have taken the folder over
            output_folder.take_back(ledger.out, ledger.part)
        raise


def _say_what_was_passed_over(choice: Choice) -> None:
    if choice.passed:
        kinds = ", ".join(f"{count} {kind or 'without an extension'}" for kind, count in choice.passed.most_common(8))
        total = choice.passed.total()
        log.warning(
            "%d files are no images, and were passed over: %s (--strict makes them rows that fail)", total, kinds
        )
        if video.SUFFIXES & set(choice.passed) and not video.is_installed():
            log.warning(video.INSTALL)


class _Run:
    """Segments the images that the ledger lists as not done, and counts images and seconds."""

    def __init__(self, ledger: Ledger, survey: Survey, on_progress: OnProgress, *, allow_mixed: bool) -> None:
        self.ledger, self.survey, self.on_progress, self.allow_mixed = ledger, survey, on_progress, allow_mixed
        self.load = Loader(ledger)
        self.earlier: dict[int, ShardState] = dict(zip(survey.shards, ledger.states(survey.shards), strict=True))
        """Shard of an earlier run -> its state."""
        self.states: dict[int, ShardState] = {}
        """Shard -> its state when this round began."""
        self.remaining: dict[int, int] = {}
        """Shard -> rows to do in this round; without shards whose last chunk this run has done."""
        self.images = self.already_done = self.done = self.failed = 0
        for state in self.earlier.values():
            self._count(state)
        self.work_seconds = dict.fromkeys(TIMES, 0.0)
        self.working = False
        """Whether a round has had work."""
        self.listed = self.ended = time.perf_counter()
        self.first_done: float | None = None

    def take(self, shards: list[int]) -> None:
        """Begins a round of work on these shards, none of which was in a round before."""
        renewed = self.survey.renewed
        new = [shard for shard in shards if shard not in self.earlier or shard in renewed]
        states = dict(zip(new, self.ledger.states(new), strict=True))
        for shard, state in states.items():
            self._count(state, self.earlier.get(shard))
        self.states = {shard: states.get(shard) or self.earlier[shard] for shard in shards}
        self.remaining = {shard: state.rows - state.done for shard, state in self.states.items() if state.todo}
        if not self.working:
            self.listed = time.perf_counter()
        self.working = self.working or bool(self.remaining)
        self.tell()

    def _count(self, state: ShardState, before: ShardState | None = None) -> None:
        """Counts the rows of a shard; those of its state `before` are counted already."""
        done = state.done - (before.done if before else 0)
        self.images += state.rows - (before.rows if before else 0)
        self.already_done += done
        self.done += done
        self.failed += state.failed - (before.failed if before else 0)

    def tell(self) -> None:
        """Tells how far the work is, or the listing before it."""
        if self.working or self.survey.complete:
            self.on_progress(self.done, self.failed, max(self.images, self.survey.count))
        else:
            self.on_progress(self.survey.count, 0, 0)

    @property
    def numbers(self) -> list[int]:
        """The numbers of the chunks with work in this round."""
        return [number for state in self.states.values() for number in state.todo]

    def sample(self, reader: Reader, count: int) -> Iterator[Source | str]:
        """Yields about `count` images that are to be done, evenly spaced: encoded, or the reason why one can't be
        read."""
        numbers = evenly(self.numbers, count)
        for number in numbers:
            chunk = self.load(number)
            rows = evenly(range(len(chunk["path"])), -(-count // len(numbers)))
            yield from reader.encoded({name: column[rows] for name, column in chunk.items()})

    def segment(self, pipeline: Pipeline, write: Write, runtime: Runtime, lock: OutputLock) -> None:
        """Runs the chunks with work through the pipeline, and merges each shard after its last chunk."""
        numbers = self.numbers
        again = self.first_done is not None
        if numbers and not again:
            _look(self.load(numbers[0]), pipeline)
        shared = {f"--out {self.ledger.out}": storage.join(self.ledger.out, SETTINGS)}
        if numbers:
            shared["INPUT"] = self.ledger.first_location(numbers[0])
        chunks = pipeline.run(
            numbers,
            self.load,
            write,
            images=expected(self.images),
            again=again,
            probabilities=any(format.wants_probabilities for format in write.formats),
            shared=shared,
            runtime=runtime,
            settle=self._arithmetic,
        )
        merging = runtime if numbers else LOCAL  # Ray does not start for what an earlier run has left to merge
        merge = merging.in_task(self.ledger.merge_shard)
        with merging.started(), ThreadPoolExecutor(2) as threads, closing(chunks):
            # An earlier run recorded the last chunk of these shards, and was stopped before it merged them.
            complete = [shard for shard, state in self.states.items() if not state.todo and not state.merged]
            merges = [threads.submit(merge, shard) for shard in complete]
            for chunk in chunks:
                lock.check()
                if (shard := self._add(chunk)) is not None:
                    merges.append(threads.submit(merge, shard))
            # If a node is lost after a chunk was recorded, Ray may repeat all stages of this chunk. `Ledger.load` then
            # finds no row to do, the chunk is empty, and `_add` never sees it. So its shard is complete, but still in
            # `remaining`. (`merge_shard` raises RuntimeError if a row is missing after all.)
            merges += [threads.submit(merge, shard) for shard in self.remaining]
            _wait_for(merges)
        self.ended = time.perf_counter()

    def _arithmetic(self, work: Work) -> Arithmetic:
        """Chooses the arithmetic for new masks, and records it. Goes on with that of earlier runs, rounds and parts."""
        out, part = self.ledger.out, self.ledger.part
        used = output_folder.arithmetics(out) if self.done or part != WHOLE else []
        chosen = go_on(work, used, allow_mixed=self.allow_mixed) if used else choose(work)
        if not used and part != WHOLE:
            # Choosing may have taken longer than another part waits for us, see below.
            used = output_folder.arithmetics(out)
            chosen = go_on(work, used, allow_mixed=self.allow_mixed) if used else chosen
        if chosen not in used:
            self.ledger.check_lock()
            output_folder.record_arithmetics(out, [*used, chosen], part)
        if part == WHOLE or used:
            return chosen
        time.sleep(LOOK_SECONDS)  # another part may be choosing now: that of the lowest one counts
        first = output_folder.arithmetics(out)[0]
        if first != chosen:
            chosen = go_on(work, [first], allow_mixed=self.allow_mixed)
            output_folder.record_arithmetics(out, [chosen], part)
        return chosen

    def _add(self, chunk: Chunk) -> int | None:
        """Counts the rows of a chunk that is done. Returns its shard if no row of the shard remains."""
        self.first_done = self.first_done or time.perf_counter()
        self.done += len(chunk["status"])
        self.failed += int((chunk["status"] == "failed").sum())
        for name in TIMES:
            self.work_seconds[name] += float(chunk[name].sum()) / 1e3
        self.tell()
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


def _look(chunk: Chunk, pipeline: Pipeline) -> None:
    """Warns if the first images that are to be done look nearly black to the model."""
    rows = [row for row, path in enumerate(chunk["path"]) if may_be_deep(os.fsdecode(path))][:SAMPLE]
    if rows:
        reader = pipeline.reader()
        some = {name: column[rows] for name, column in chunk.items()}
        where = storage.without_secrets(storage.parent(os.fsdecode(some["path"][0])))
        warn_of_deep(reader.encoded(some), reader.channels, reader.value_range, where)


def _wait_for(futures: list[Future[None]]) -> None:
    """Waits for all futures. Raises the error of the first one that failed."""
    for future in futures:
        future.result()


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
