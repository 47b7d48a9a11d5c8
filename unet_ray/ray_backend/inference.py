"""The stages of prediction and evaluation through Ray Data."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext

from unet_ray.config import UserError
from unet_ray.data import storage
from unet_ray.data.chunks import Chunk, Stage
from unet_ray.models.device import keep_freed_memory
from unet_ray.ray_backend import nodes

NUMBERS_A_BLOCK = 4096
"""Chunks of which a task makes blocks of one."""

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
