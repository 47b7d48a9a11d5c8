"""Training: from folders to a run directory, through Ray Train or in this process."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from unet_ray import cache, checkpoint, engine, masks, records, rows, storage, tracking
from unet_ray.config import TrainConfig, UserError, load_train_config
from unet_ray.engine import TrainResult
from unet_ray.records import Pair
from unet_ray.rows import Decoder, Decodes, Rows, Subset

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

    from unet_ray.datasets import MaterialisedRows, RayStreamedRows

OnEpoch = Callable[[dict[str, Any]], None]
OnStep = Callable[[engine.Progress], None]
POLL_SECONDS = 1.0
MARK = ".seen"
PROGRESS = "progress.json"
"""In `RAY_FOLDER`: where the epoch stands, written by the first worker."""
RAY_FOLDER = ".ray"
"""Ray Train's own bookkeeping inside the run directory, while it trains."""


class Split(NamedTuple):
    """The pairs a training uses, and which of them it trains and validates on."""

    pairs: list[Pair]
    train: list[int]
    val: list[int]

    @property
    def train_keys(self) -> list[str]:
        return [self.pairs[index].key for index in self.train]

    @property
    def val_keys(self) -> list[str]:
        return [self.pairs[index].key for index in self.val]

    def sides(self) -> dict[str, str]:
        """Key -> `train` or `val`."""
        return dict.fromkeys(self.train_keys, "train") | dict.fromkeys(self.val_keys, "val")

    def rows(self, decoded: Rows) -> tuple[Subset, Subset]:
        """Rows to train on and rows to validate on, of rows decoded from `pairs`."""
        return Subset(decoded, self.train), Subset(decoded, self.val)


@dataclass(frozen=True, slots=True)
class Watch:
    """What a training tells whoever started it."""

    on_start: Callable[[Split], None] = lambda _split: None
    """What it trains and validates on."""
    on_epoch: Callable[[dict[str, Any]], None] = lambda _line: None
    """Each line of metrics.jsonl, as it is written."""
    on_step: Callable[[engine.Progress], None] = lambda _progress: None
    """Where the epoch stands, every few seconds."""
    on_retry: Callable[[str, int], None] = lambda _reason, _epoch: None
    """Why a worker was lost, and after which epoch training goes on."""


def train(
    config: TrainConfig,
    out: str,
    *,
    local: bool = False,
    resume: bool = False,
    cluster: AbstractContextManager[None] = nullcontext(),
    watch: Watch = Watch(),
) -> TrainResult:
    """Trains `config` into the run directory `out`: through Ray Train, or with `local` in this process.

    `cluster` is entered once all that needs no Ray has been checked: a context in which `ray.init` has been called
    (nothing, where the caller has called it, or with `local`).

    `resume` goes on from the last finished epoch, and starts anew where there is none.
    Raises UserError for what the user can mend.
    """
    if not config.data.images:
        raise UserError("--images is missing: the folder of the images")
    if not config.data.masks:
        raise UserError("--masks is missing: the folder of the masks, or that of the images if they end in _mask there")
    out = storage.absolute(out)
    workers = config.compute.most_workers
    if config.train.batch_size < workers:
        raise UserError(
            f"--batch-size {config.train.batch_size} is for all workers together, and there are {workers}: use "
            f"{workers} or more"
        )
    images, masks_folder = storage.absolute(config.data.images), storage.absolute(config.data.masks)
    pairs = records.find_pairs(images, masks_folder)
    train_indices, val_indices = records.split([pair.key for pair in pairs], config.data, config.train.seed)
    used = sorted([*train_indices, *val_indices])
    number = {index: row for row, index in enumerate(used)}
    parts = Split([pairs[i] for i in used], [number[i] for i in train_indices], [number[i] for i in val_indices])
    config = _resolved(config, images, masks_folder, [pair.mask for pair in pairs])
    _check_out(config, parts, out, resume)
    if (init := _init(config, out)) is not None:
        checkpoint.check_init(init, config.model)
    watch.on_start(parts)

    with tracking.trackers(config, out, PurePosixPath(out).name) as track, nullcontext() if local else cluster:

        def told(line: dict[str, Any]) -> None:
            track(line)
            watch.on_epoch(line)

        if local:
            _train_here(config, parts, out, told, watch.on_step)
        else:
            _train_on_ray(config, parts, out, _Follower(out, told, watch.on_step), watch.on_retry)
    return engine.result_of(out)


def _resolved(config: TrainConfig, images: str, masks_folder: str, mask_paths: list[str]) -> TrainConfig:
    """The settings with what the data decides filled in."""
    data, fit = dataclasses.replace(config.data, images=images, masks=masks_folder), config.train
    if fit.init is not None:
        fit = dataclasses.replace(fit, init=storage.absolute(fit.init))
    if data.mask_values is None:
        data = dataclasses.replace(data, mask_values=masks.infer_values(mask_paths, config.model.num_classes, data))
    if fit.class_weights == "inverse":
        fit = dataclasses.replace(fit, class_weights=masks.inverse_frequencies(mask_paths, data))
    return dataclasses.replace(config, data=data, train=fit)


def _check_out(config: TrainConfig, parts: Split, out: str, resume: bool) -> None:
    """Raises UserError if `out` holds something that this training would overwrite, or can't go on from."""
    there = [name for name in storage.names_in(out) if not name.endswith(MARK)]
    if not there:
        return
    if not resume:
        what = "another run" if engine.CONFIG in there else "other files"
        raise UserError(
            f"{out} holds {what}: choose another --out" + (", or --resume" if engine.CONFIG in there else "")
        )
    state = checkpoint.read_state(storage.join(out, engine.LAST))
    if state is None:
        return
    before = load_train_config(config_file=state.settings)
    if _resumable(before) != _resumable(config):
        raise UserError(
            f"{out} was trained with other settings, so --resume can't go on: "
            f"`--config {storage.join(out, engine.CONFIG)}` has the old ones, or choose another --out"
        )
    sides, sides_before = parts.sides(), records.read_split(storage.join(out, records.SPLIT))
    changed = {key for key in sides.keys() | sides_before.keys() if sides.get(key) != sides_before.get(key)}
    if sides_before and changed:
        raise UserError(
            f"{config.data.images}: {len(changed)} images have come, gone or changed sides since {out} was begun, so "
            "--resume can't go on: put them back, or choose another --out"
        )
    if state.epoch >= config.train.epochs:
        raise UserError(f"{out} is finished ({state.epoch} epochs): raise --epochs, or choose another --out")


def _init(config: TrainConfig, out: str) -> str | None:
    """Where the first weights come from, until a run has its own."""
    return None if checkpoint.has_state(storage.join(out, engine.LAST)) else config.train.init


def _resumable(config: TrainConfig) -> TrainConfig:
    """What must be the same for a run to go on: all but where it runs and for how long."""
    return dataclasses.replace(
        config, compute=type(config.compute)(), train=dataclasses.replace(config.train, epochs=1)
    )


def _write_start(config: TrainConfig, parts: Split, out: str) -> None:
    """What stands before the first epoch: the settings, and which images are trained and validated on."""
    records.write_split(storage.join(out, records.SPLIT), parts.sides())
    storage.write_bytes(storage.join(out, engine.CONFIG), config.to_yaml().encode())


def _train_here(config: TrainConfig, parts: Split, out: str, on_epoch: OnEpoch, on_step: OnStep) -> None:
    import torch

    device = engine.device_here(config.compute.device, config.compute.fewest_workers)
    engine.check_precision(config.train.precision, device.type)
    if config.compute.cpus_per_worker:
        torch.set_num_threads(config.compute.cpus_per_worker)
    decoder = _decoder(config, parts.pairs, cache.in_threads(os.cpu_count() or 1))
    fits = rows.fits_in_memory(len(parts.pairs), decoder, config.compute.memory_fraction)
    kind = rows.MemoryRows if fits else rows.StreamedRows
    train_rows, val_rows = parts.rows(kind(parts.pairs, decoder))
    _write_start(config, parts, out)
    with _shortages_are_said(out):
        engine.fit(config, train_rows, val_rows, out, device=device, report=on_epoch, on_step=on_step)


def _decoder(config: TrainConfig, pairs: list[Pair], run: cache.Run) -> Decodes:
    """What makes rows of pairs; with a cache, once all of them lie in it."""
    decoder, location = Decoder.of(config), config.compute.cache
    return cache.filled(pairs, decoder, location, run) if location else decoder


def _train_on_ray(
    config: TrainConfig, parts: Split, out: str, follower: _Follower, on_retry: Callable[[str, int], None]
) -> None:
    """Fits, and starts again from the last finished epoch where workers or nodes are lost.

    Ours rather than Ray's max_failures: that would also repeat what fails every time, and would not decode again the
    rows that were lost with a node.
    """
    import ray.exceptions
    import ray.train

    from unet_ray import datasets, nodes

    datasets.configure()
    device = nodes.pick_device(config.compute.device)
    engine.check_precision(config.train.precision, device)
    failures = 0
    while True:
        before = _epochs_done(out)
        try:
            _fit_once(config, parts, out, device, follower)
            break
        except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
            _raise_what_repeats(error)
            done = _epochs_done(out)
            failures = 1 if done > before else failures + 1
            if failures > config.compute.retries:
                raise
            on_retry(_first_line(error), done)
    storage.delete_folder(storage.join(out, RAY_FOLDER))


def _epochs_done(out: str) -> int:
    state = checkpoint.read_state(storage.join(out, engine.LAST))
    return state.epoch if state else 0


class _Follower:
    """Tells the driver of each epoch once, and of the steps between, by reading what a worker, on whatever machine,
    writes into the run directory."""

    def __init__(self, out: str, on_epoch: OnEpoch, on_step: OnStep) -> None:
        self.out, self.on_epoch, self.on_step, self.told = out, on_epoch, on_step, _epochs_done(out)
        self.progress: engine.Progress | None = None

    def look(self) -> None:
        try:
            progress = engine.Progress(**json.loads(storage.read_bytes(_progress_file(self.out))))
        except OSError:
            progress = None
        if progress is not None and progress != self.progress and progress.epoch > self.told:
            self.progress = progress
            self.on_step(progress)
        for line in engine.read_metrics(self.out):
            if line["epoch"] > self.told:
                self.told = line["epoch"]
                self.on_epoch(line)


def _progress_file(out: str) -> str:
    return storage.join(out, RAY_FOLDER, PROGRESS)


def _fit_once(config: TrainConfig, parts: Split, out: str, device: str, follower: _Follower) -> None:
    """One TorchTrainer fit, with what the cluster has now."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from unet_ray import datasets, nodes
    from unet_ray.process_group import OnRaysNetwork

    compute = config.compute
    first = parts.pairs[0]
    with _marked(out) as mark:
        places = {f"--out {out}": mark, "--images": first.image, "--masks": first.mask}
        if (init := _init(config, out)) is not None:
            places["--init"] = storage.join(checkpoint.model_directory(init), checkpoint.CARD)
        # Before there are workers, too: a node that has just died is asked for its answer until Ray knows.
        nodes.check_shared(places)
        if nodes.check_workers(compute.fewest_workers, device, compute.cpus_per_worker, compute.most_workers):
            nodes.check_shared(places)
    decoder = _decoder(config, parts.pairs, datasets.fill_cache)
    # Every node may come to hold every row, so the smallest one's store decides.
    fits = len(parts.pairs) * decoder.row_bytes() <= compute.memory_fraction * nodes.object_store_of_smallest()
    cpus = int(nodes.total("CPU"))
    each = max(1, compute.cpus_per_worker) if device == "cpu" else 1  # a GPU's worker holds a CPU too
    if not fits and compute.fewest_workers * each >= cpus:
        raise UserError(
            f"--workers {compute.fewest_workers} leaves none of {cpus} CPUs to stream the images, which don't fit in "
            f"memory: use --workers {max(1, cpus - 1)}, or --local"
        )
    threads = compute.cpus_per_worker or nodes.cpus_for_each(compute.most_workers, spare=0 if fits else 1)
    kind: type[MaterialisedRows] | type[RayStreamedRows]
    kind = datasets.MaterialisedRows if fits else datasets.RayStreamedRows
    train_rows, val_rows = parts.rows(kind(parts.pairs, decoder))
    _write_start(config, parts, out)

    on_gpu = device == "cuda"
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={
            "config": config,
            "rows": (train_rows, val_rows),
            "out": out,
            "threads": None if on_gpu else threads,
        },
        torch_config=OnRaysNetwork(),
        scaling_config=ScalingConfig(
            num_workers=compute.workers,
            use_gpu=on_gpu,
            resources_per_worker={"GPU": 1, "CPU": 1} if on_gpu else {"CPU": threads},
        ),
        run_config=RunConfig(
            name=RAY_FOLDER,
            storage_path=out,
            # Controller errors (a placement that can never be met) are retried for ever by default.
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=1),
            worker_runtime_env=nodes.runtime_env(device),
        ),
    )
    # What an interrupted run left would make Ray take this one for finished and train nothing.
    storage.delete_folder(storage.join(out, RAY_FOLDER))
    _fit_and_follow(trainer, follower)


@contextmanager
def _marked(out: str) -> Iterator[str]:
    """A file in the run directory, for other nodes to look for."""
    mark = storage.join(out, f"{uuid.uuid4().hex}{MARK}")
    storage.write_bytes(mark, b"")
    try:
        yield mark
    finally:
        storage.delete_file(mark)


def _fit_and_follow(trainer: TorchTrainer, follower: _Follower) -> None:
    """Fits on a thread: on the main one Ray Train takes Ctrl-C for itself and ends with exit code 0."""
    failures: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    ended = False
    while not ended:
        thread.join(POLL_SECONDS)
        ended = not thread.is_alive()  # before the last look, so that nothing is missed
        follower.look()
    for failure in failures:
        raise failure


def _train_worker(loop: dict[str, Any]) -> None:
    """What each of Ray Train's workers runs."""
    import ray.train.torch
    import torch

    if loop["threads"] is not None:
        torch.set_num_threads(loop["threads"])
    train_rows, val_rows = loop["rows"]

    written: Future[None] | None = None

    def on_step(progress: engine.Progress) -> None:
        nonlocal written
        # Beside the training, which waits for no bucket; while one is being written, the next is left out.
        if written is None or written.done():
            text = json.dumps(dataclasses.asdict(progress))
            written = aside.submit(storage.write_bytes, _progress_file(loop["out"]), text.encode())

    with _shortages_are_said(loop["out"]), ThreadPoolExecutor(1) as aside:
        # Nothing is reported to Ray, which takes a report in two seconds, however short the epochs: what there is to
        # know stands in the run directory.
        device = ray.train.torch.get_device()
        engine.fit(loop["config"], train_rows, val_rows, loop["out"], device=device, on_step=on_step)


def _raise_what_repeats(error: BaseException) -> None:
    """Raises a failure of the workers that would come again: what the user can mend, as UserError, and exceptions of
    the code's own. Returns for what comes of lost processes and broken connections."""
    import ray.exceptions
    import ray.train

    if isinstance(error, ray.train.ControllerError):
        _raise_said(_chain(error))
        raise UserError(
            f"the cluster did not start the workers ({_first_line(error)[:300]}): use fewer --workers, or lower "
            "compute.cpus_per_worker; --resume goes on from the last finished epoch"
        ) from error
    if not isinstance(error, ray.train.WorkerGroupError):
        return
    chains = [_chain(failure) for failure in error.worker_failures.values()]
    for chain in chains:
        _raise_said(chain)
    # One rank's own exception takes the others' connections with it: those are RuntimeErrors of torch.distributed.
    if any(not isinstance(chain[-1], (ray.exceptions.RayError, RuntimeError, ConnectionError)) for chain in chains):
        raise error


def _raise_said(chain: list[BaseException]) -> None:
    """Raises the UserError of a chain, if there is one: the last, as what Ray makes of one is another, with a traceback
    for its text."""
    said = [failure for failure in chain if isinstance(failure, UserError)]
    if said:
        raise UserError(str(said[-1])) from None


_CAUSES = ("_base_exc", "health_check_failure", "controller_failure", "cause", "__cause__")
"""Where Ray Train's, Ray's and Python's exceptions keep what they came of."""


def _chain(failure: BaseException) -> list[BaseException]:
    """An exception and what caused it, the first cause last."""
    chain = [failure]
    while True:
        causes = (getattr(chain[-1], name, None) for name in _CAUSES)
        cause = next((c for c in causes if isinstance(c, BaseException) and c not in chain), None)
        if cause is None:
            return chain
        chain.append(cause)


def _first_line(error: BaseException) -> str:
    """What happened, in one line."""
    text = str(_chain(error)[-1]) or type(error).__name__
    return next((line.strip() for line in text.splitlines() if line.strip()), text)


@contextmanager
def _shortages_are_said(out: str) -> Iterator[None]:
    """A full disk and a full GPU as UserError."""
    import torch

    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(
            f"{out}: {error.strerror}: free some space, then go on with --resume from the last finished epoch"
        ) from None
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of memory ({str(error).splitlines()[0][:120]}): raise train.accumulate, set "
            "train.checkpoint_activations=true, or lower --batch-size or --image-size"
        ) from None
