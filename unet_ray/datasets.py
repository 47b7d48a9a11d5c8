"""What Ray Data does for training, prediction and evaluation: rows decoded on the cluster, chunks through stages."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext
from ray.data._internal.execution import streaming_executor_state

from unet_ray import cache, nodes, storage
from unet_ray.config import UserError
from unet_ray.engine import keep_freed_memory
from unet_ray.records import Pair
from unet_ray.rows import Batch, Decodes
from unet_ray.stages import Chunk, Stage

ROWS_A_BLOCK = 16
"""Decoded rows a block: 16 MB at 512²; small enough to spread over many CPUs, large enough to be worth a task."""

NUMBERS_A_BLOCK = 4096
"""Chunks of which a task makes blocks of one."""

LOOK_SECONDS = 0.02
"""How long Ray Data waits at most before it looks which tasks have finished."""

A_TASK, A_TASK_BESIDE_A_MODEL = 0.5, 0.24
"""CPUs that a task counts for which reads or writes: it is in part waiting, and another must be there already when it
ends, since Ray Data takes a while to start the next. A model on CPUs leaves them one of its share or, see
`nodes.cpus_of_a_model`, a thousandth less, hence four: with two, decoding and writing alone took 1.3 times as long on
two cores."""

RESERVED = 0.05
"""Share of the CPUs that Ray Data keeps for all stages alike, where nodes come later: with its half, their copies of
the model would not fit. What each stage needs at least it keeps anyway."""

RAISED = "raised"
"""Column of a chunk that stands for what a stage raised, pickled. Were it raised in a task or an actor, Ray Data would
make text of it, which the command could only show as it is."""

NO_LIMIT = 4096
"""Copies of the model on a cluster that may grow: as many as it comes to have room for."""


def configure(verbose: bool = False) -> None:
    """Ray Data's settings for this process, before any Dataset is made (later changes have no effect)."""
    # Ray Data looks for finished tasks ten times a second only (a constant, no setting), and until then its few places
    # stand empty: with chunks of half a second that was a third of the time.
    streaming_executor_state.WAIT_FOR_TASK_COMPLETION_TIMEOUT_S = LOOK_SECONDS
    context = DataContext.get_current()
    context.enable_progress_bars = verbose
    if not verbose:
        for name in ("ray.data", "ray.data._internal", "ray.train"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


@dataclass(frozen=True, slots=True)
class _DecodePairs:
    """Table of pairs -> rows; a pair that can't be used carries its reason in `error`."""

    decoder: Decodes

    def __call__(self, table: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        count = len(table["index"])
        decoded = self.decoder.empty(count)
        errors = np.full(count, "", dtype=object)
        for row in range(count):
            try:
                for name, values in self.decoder(str(table["image"][row]), str(table["mask"][row])).items():
                    decoded[name][row] = values
            except UserError as error:
                errors[row] = str(error)
        return {"index": table["index"], **decoded, "error": errors}


def _dataset_of(pairs: Sequence[Pair], groups: Sequence[np.ndarray], decoder: Decodes) -> ray.data.Dataset:
    """Lazily decoded rows, one block for each group of row numbers, with columns index, image, mask, error."""
    tables = [
        pa.table(
            {
                "index": np.asarray(group, np.int64),
                "image": [pairs[index].image for index in group],
                "mask": [pairs[index].mask for index in group],
            }
        )
        for group in groups
    ]
    return ray.data.from_arrow(tables).map_batches(_DecodePairs(decoder), batch_size=None, batch_format="numpy")


@ray.remote(num_cpus=0)
def _errors_of(block: pa.Table) -> list[str]:
    return [error for error in block["error"].to_pylist() if error]


class MaterialisedRows:
    """Rows decoded once by Ray Data, held in the cluster's object store as uint8 and shared by all workers.

    Any worker reads any row: on its own node without a copy, from another node once. That is what lets the batches of
    an epoch be the same for every number of workers.
    """

    def __init__(self, pairs: Sequence[Pair], decoder: Decodes) -> None:
        self.count = len(pairs)
        groups = np.array_split(np.arange(self.count), -(-self.count // ROWS_A_BLOCK))
        dataset = _dataset_of(pairs, groups, decoder).materialize()
        self.blocks = dataset.to_arrow_refs()
        # Asked where the blocks are, rather than brought here.
        for error in chain.from_iterable(ray.get([_errors_of.remote(block) for block in self.blocks])):
            raise UserError(error)
        self._place: np.ndarray | None = None
        self._columns: list[dict[str, np.ndarray]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"count": self.count, "blocks": self.blocks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _place=None, _columns=[])

    def __len__(self) -> int:
        return self.count

    def _open(self) -> np.ndarray:
        """Maps every block into this process; returns (block, offset) of each row, int64 [M,2]."""
        place = np.empty((self.count, 2), np.int64)
        for number, block in enumerate(ray.get(self.blocks)):
            # Views of shared memory, not copies.
            names = [name for name in block.column_names if name not in ("index", "error")]
            columns = {name: block[name].combine_chunks().to_numpy_ndarray() for name in names}
            index = block["index"].to_numpy()
            place[index] = np.stack([np.full(len(index), number), np.arange(len(index))], axis=1)
            self._columns.append(columns)
        return place

    def batches(self, plan: Sequence[np.ndarray]) -> Iterator[Batch]:
        if self._place is None:
            self._place = self._open()
        for indices in plan:
            where = self._place[indices]
            batch = {
                name: np.stack([self._columns[block][name][offset] for block, offset in where])
                for name in self._columns[0]
            }
            yield {**batch, "index": indices}


class RayStreamedRows:
    """Rows decoded anew in every epoch by Ray Data tasks anywhere on the cluster, streamed to this worker in order."""

    def __init__(self, pairs: Sequence[Pair], decoder: Decodes) -> None:
        self.pairs, self.decoder = pairs, decoder

    def __len__(self) -> int:
        return len(self.pairs)

    def batches(self, plan: Sequence[np.ndarray]) -> Iterator[Batch]:
        if not len(plan):
            return
        configure()
        DataContext.get_current().execution_options.preserve_order = True
        dataset = _dataset_of(self.pairs, plan, self.decoder)
        for batch in dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2):
            for error in batch["error"]:
                if error:
                    raise UserError(error)
            # A copy: blocks are read-only views of shared memory, which torch must not be given.
            yield {name: values.copy() for name, values in batch.items() if name != "error"}


@ray.remote
def _error_of_writing(write: cache.Write, part: cache.Pairs) -> str | None:
    try:
        write(part)
    except UserError as error:
        return str(error)
    return None


def fill_cache(write: cache.Write, parts: list[cache.Pairs]) -> Iterator[None]:
    """For `cache.filled`: a task for each part, anywhere on the cluster."""
    shared = ray.put(write)
    waiting = [_error_of_writing.remote(shared, part) for part in parts]
    while waiting:
        done, waiting = ray.wait(waiting)
        for error in ray.get(done):
            if error is not None:
                raise UserError(error)
            yield


def run_on_cluster(
    numbers: Sequence[int],
    before: Callable[[int], Chunk],
    model: Callable[..., Stage],
    after: Stage,
    *,
    workers: int,
    device: str,
    shared: Mapping[str, str],
) -> Iterator[Chunk]:
    """The stages of `stages.run_here` through Ray Data: `model(device=, threads=, copies=)` in a pool of actors that
    load it once, the other two in tasks. Yields what `after` returns, a chunk at a time, as chunks are finished.

    `workers`: how many copies of the model; 0: one a GPU, or one for every `nodes.THREADS_A_MODEL` CPUs, and more as
    the cluster grows. `shared`: see `nodes.check_shared`. Ray keeps what needs no GPU off nodes that have one as long
    as others have room.
    """
    device = nodes.pick_device(device)
    threads: int | None = None
    if workers:
        nodes.check_workers(workers, device)
    if device == "cuda":
        a_copy = {"GPU": 1.0}
        # Without the CPU that Ray Data adds: where a node has as many GPUs, none would be left to read images.
        copies, held, share = workers or nodes.room(a_copy), {"num_gpus": 1.0, "num_cpus": 0.0}, A_TASK
    else:
        nodes.make_room(1, {"CPU": 1.0}, "no node of the cluster has a CPU", "add one")
        threads, copies = nodes.models_on_cpus()
        if workers:
            threads, copies = nodes.cpus_for_each(workers, spare=0), workers
        a_copy = {"CPU": float(threads)}
        # The threads are the whole share: decoding is short beside the model, and idle CPUs would cost more.
        held, share = {"num_cpus": nodes.cpus_of_a_model(threads)}, A_TASK_BESIDE_A_MODEL
    nodes.check_shared(shared)
    grows = not workers and nodes.may_grow()
    if grows and device == "cpu":
        DataContext.get_current().op_resource_reservation_ratio = RESERVED
    tables = [
        pa.table({"number": pa.array(numbers[start : start + NUMBERS_A_BLOCK], pa.int64())})
        for start in range(0, len(numbers), NUMBERS_A_BLOCK)
    ]
    # A block a chunk, made as they are wanted: a hundred million images are not a million objects at once. By default
    # the step takes a CPU, which models may not leave free on any node.
    chunks = _holding(ray.data.from_arrow(tables).repartition(target_num_rows_per_block=1), {"num_cpus": 0.0})
    # A share of its own keeps Ray Data from fusing the stage into the model's actors, where decoding would not overlap
    # with the model.
    decoded = chunks.map_batches(_FromNumber(before), batch_size=None, batch_format="numpy", num_cpus=share)
    segmented = decoded.map_batches(
        _ModelActor,
        fn_constructor_kwargs={"model": model, "device": device, "threads": threads, "copies": copies},
        batch_size=None,
        batch_format="numpy",
        # At once what there is room for: of its own accord Ray Data gives a stage a part of the CPUs only.
        compute=ActorPoolStrategy(min_size=min(copies, len(numbers)), max_size=NO_LIMIT if grows else copies),
        runtime_env=nodes.runtime_env(device),
    )
    done = _holding(segmented, held).map_batches(
        _UnlessEmpty(after), batch_size=None, batch_format="numpy", num_cpus=share
    )
    with nodes.asking_for_more(a_copy) if grows else nullcontext():
        for chunk in done.iter_batches(batch_size=None, batch_format="numpy"):
            if RAISED in chunk:
                raise pickle.loads(chunk[RAISED][0])
            if _rows(chunk):
                yield chunk


def _holding(dataset: ray.data.Dataset, amounts: dict[str, float]) -> ray.data.Dataset:
    """The dataset, with what each task or actor of its last step holds of a node. `repartition` has no argument for it;
    `map_batches` takes GPUs only with a size of batches, for which it would cut and join the chunks."""
    dataset._logical_plan.dag.ray_remote_args.update(amounts)
    return dataset


def _rows(chunk: Chunk) -> int:
    return len(next(iter(chunk.values()), ()))


@dataclass(frozen=True, slots=True)
class _FromNumber:
    before: Callable[[int], Chunk]

    def __call__(self, table: Chunk) -> Chunk:
        keep_freed_memory()  # of photographs at full size
        assert len(table["number"]) == 1, "a block holds one chunk"
        return _or_raised(self.before, int(table["number"][0]))


@dataclass(frozen=True, slots=True)
class _UnlessEmpty:
    stage: Stage

    def __call__(self, chunk: Chunk) -> Chunk:
        keep_freed_memory()
        return _or_raised(self.stage, chunk) if _rows(chunk) and RAISED not in chunk else chunk


class _ModelActor:
    """The model stage as Ray Data wants it: a class that is built once in each actor."""

    def __init__(self, model: Callable[..., Stage], **where: Any) -> None:
        try:
            stage = model(**where)
        except UserError as error:
            refusal = error

            def stage(_chunk: Chunk) -> Chunk:
                raise refusal

        self.stage = _UnlessEmpty(stage)

    def __call__(self, chunk: Chunk) -> Chunk:
        return self.stage(chunk)


def _or_raised(stage: Callable[[Any], Chunk], given: Any) -> Chunk:
    """What the stage returns, or a chunk for what it raised and the user can mend."""
    try:
        return stage(given)
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in storage.TO_MEND:
            raise
        return {RAISED: np.array([pickle.dumps(error)], dtype=object)}
