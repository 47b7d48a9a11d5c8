"""Runs the stages of prediction and evaluation through Ray Data."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from ray.data import ActorPoolStrategy, DataContext, Datasource, ReadTask
from ray.data.block import BlockMetadata

from unet_ray.config import UserError
from unet_ray.data import storage
from unet_ray.data.chunks import MAX_BYTES, Chunk, Stage
from unet_ray.keys import Keys
from unet_ray.models.device import keep_freed_memory
from unet_ray.own_process import claim
from unet_ray.ray_backend import autoscaling, internals, nodes, replicas

NUMBERS_PER_TASK = 4096
"""The most chunk numbers of a read task, but for rounding up to whole blocks."""

TASK_CPUS, TASK_CPUS_BESIDE_A_MODEL = 0.5, 0.24
"""CPUs that Ray reserves for a task that decodes or writes: if models run on GPUs, and if they run on CPUs.

These tasks reserve less than they use. They wait part of the time, and when one ends the next must be there already,
since Ray Data takes a while to start one.

Replicas on CPUs leave a node of two or more CPUs at least 0.999 CPUs (`nodes.cpus_reserved_by_replica`). Four tasks fit
on that: 4 x 0.24 <= 0.999. With two tasks, decoding and writing alone took 1.3 times as long on two cores."""

SHARE_SPLIT_EVENLY = 0.05
"""Share of the CPUs that Ray Data splits evenly over all stages, if nodes may be added. With its default of a half,
the replicas of the model would not fit. Ray Data always keeps the least that each stage needs."""

RAISED = "raised"
"""Column of a chunk that stands for an exception, pickled. Ray Data would turn an exception of a task or an actor into
text, and the command could not tell a UserError from a bug. Pickle is safe here and the simplest: only our own
processes write these chunks, and Ray itself sends all data between them as pickles."""

MOST_ON_EACH_CORE, CHUNKS_PER_CORE = 512, 4
"""The most cores that get a replica each, and the least chunks for each of them."""

MOST_REPLICAS = 4096
"""Limit of replicas on a cluster that can grow. It is so high that the cluster's room decides."""


def run_on_cluster(
    numbers: Sequence[int],
    preprocess: Callable[[int], Chunk],
    model: Callable[[int | None], Stage],
    postprocess: Stage,
    *,
    pool: Pool,
    each: int = 1,
) -> Iterator[Chunk]:
    """Runs the stages of `local.run_here` through Ray Data. Yields the chunks of `postprocess` as they are finished.

    `preprocess` and `postprocess` run in tasks, and `model(threads)` in a pool of actors, each of which calls it once.
    If the pool has a replica on each core, its actors run all stages, and images never pass between processes. `each`:
    chunks that pass from stage to stage as one block.

    Ray keeps tasks off nodes with a GPU as long as others have room. Raises UserError if a stage raises it.
    """
    if pool.grows and pool.device == "cpu":
        DataContext.get_current().op_resource_reservation_ratio = SHARE_SPLIT_EVENLY
    # All replicas start at once: if Ray Data could choose, it would give a stage only a part of the CPUs.
    compute = ActorPoolStrategy(
        min_size=min(pool.replicas, len(numbers)), max_size=MOST_REPLICAS if pool.grows else pool.replicas
    )
    as_blocks: dict[str, Any] = {"batch_size": None, "batch_format": "numpy"}
    with replicas.called_roll() as roll, autoscaling.asking_for_more(pool.bundle) if pool.grows else nullcontext():
        if each > 1:  # Ray Data must not split a block in the middle of a chunk
            DataContext.get_current().target_max_block_size = 2 * each * MAX_BYTES

        def in_actors(dataset: ray.data.Dataset, stage: Callable[[int | None], Stage]) -> ray.data.Dataset:
            return internals.map_whole_blocks(
                dataset,
                _ModelActor,
                fn_constructor_kwargs={"model": stage, "threads": pool.threads, "roll": roll, "_keys": Keys()},
                compute=compute,
                runtime_env=nodes.runtime_env(pool.device),
                **pool.replica_resources,
            )

        chunks = _in_blocks(numbers, each)
        if pool.on_each_core:
            finished = in_actors(chunks, _AllStages(preprocess, model, postprocess))
        else:
            # The stages reserve different numbers of CPUs, which keeps Ray Data from fusing them: decoding in the
            # model's actors would not overlap with the model.
            decoded = chunks.map_batches(_Preprocess(preprocess), num_cpus=pool.task_cpus, **as_blocks)
            segmented = in_actors(decoded, model)
            finished = segmented.map_batches(_EachChunk(postprocess), num_cpus=pool.task_cpus, **as_blocks)
        for block in finished.iter_batches(**as_blocks):
            if RAISED in block:
                raise pickle.loads(block[RAISED][0])
            yield from _chunks_of(block)


@dataclass(frozen=True, slots=True)
class Pool:
    """The replicas of the model, and the resources that they and the tasks beside them take."""

    replicas: int
    device: str
    """`cuda` or `cpu`."""
    threads: int | None
    """Threads per replica; None on a GPU."""
    bundle: nodes.Bundle
    """Resources that a node must have for a replica."""
    replica_resources: dict[str, float]
    """Resources that Ray reserves for a replica."""
    task_cpus: float
    grows: bool
    """Whether more replicas start as the cluster gets nodes."""
    on_each_core: bool = False
    """Whether there is a replica on each core, which takes its chunks through all stages."""

    @property
    def least(self) -> nodes.Bundle:
        """Resources of a node that can have a replica, if not of this pool then `on_each_core`."""
        return dict.fromkeys(self.bundle, 1.0)


def pool_of_replicas(workers: int, device: str, *, again: bool = False) -> Pool:
    """Waits until the replicas fit on the cluster. Raises UserError if they can't.

    `workers`: replicas of the model. 0: one per GPU, or one per `nodes.THREADS_PER_REPLICA` CPUs, and more as the
    cluster grows. `device`: `auto`, `cpu` or `cuda`. `again`: they have worked in this run before, so a node that was
    lost since then costs its replicas only.
    """
    device = autoscaling.pick_device(device)
    nodes.look()
    if workers and again:
        workers = min(workers, max(1, nodes.room({"GPU" if device == "cuda" else "CPU": 1.0})))
    elif workers:
        autoscaling.make_room_for_workers(workers, device)
    grows = not workers and autoscaling.may_grow()
    if device == "cuda":
        bundle = {"GPU": 1.0}
        autoscaling.make_room(1, bundle, "no node of the cluster has a GPU", "use --device cpu")
        # A replica reserves no CPU: a node with as many GPUs as CPUs would have none left to decode images.
        resources = {"num_gpus": 1.0, "num_cpus": 0.0}
        return Pool(workers or nodes.room(bundle), device, None, bundle, resources, TASK_CPUS, grows)
    autoscaling.make_room(1, {"CPU": 1.0}, "no node of the cluster has a CPU", "add one")
    # A replica runs one thread per CPU, and decoding takes turns with it: decoding is short, idle CPUs would cost more.
    threads, replicas = (nodes.cpus_for_each(workers, spare=0), workers) if workers else nodes.replicas_on_cpus()
    resources = {"num_cpus": nodes.cpus_reserved_by_replica(threads)}
    return Pool(replicas, device, threads, {"CPU": float(threads)}, resources, TASK_CPUS_BESIDE_A_MODEL, grows)


def on_each_core(pool: Pool, chunks: int) -> Pool:
    """Returns a pool with a replica of one thread on each core instead, for a network that takes each image on one
    thread anyway. No core then waits for another, and no image passes between processes: two cores read, decoded and
    wrote 1.28 times as many images of 1918x1280. Returns the pool unchanged if there are too many cores, or too few
    chunks to keep all of them busy to the end.
    """
    cores = nodes.room({"CPU": 1.0})
    if not 0 < cores <= MOST_ON_EACH_CORE or chunks < CHUNKS_PER_CORE * cores:
        return pool
    return dataclasses.replace(
        pool, replicas=cores, threads=1, bundle={"CPU": 1.0}, replica_resources={"num_cpus": 1.0}, on_each_core=True
    )


class _Numbers(Datasource):
    """Reads chunk numbers, about `NUMBERS_PER_TASK` per task, so that a hundred million images are not a million
    objects. All tasks have the same count, a multiple of `each`, but for the last."""

    def __init__(self, numbers: Sequence[int], each: int) -> None:
        super().__init__()
        tasks = -(-len(numbers) // NUMBERS_PER_TASK)
        self.blocks_per_task = -(-len(numbers) // (tasks * each))
        size = self.blocks_per_task * each
        self.groups = [np.asarray(numbers[start : start + size], np.int64) for start in range(0, len(numbers), size)]

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self,
        parallelism: int,  # noqa: ARG002 - Ray Data passes it
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,  # noqa: ARG002
    ) -> list[ReadTask]:
        return [
            ReadTask(
                _reader(group),
                BlockMetadata(num_rows=len(group), size_bytes=group.nbytes, input_files=None, exec_stats=None),
                per_task_row_limit=per_task_row_limit,
            )
            for group in self.groups
        ]


def _reader(group: np.ndarray) -> Callable[[], list[pa.Table]]:
    return lambda: [pa.table({"number": group})]


def _in_blocks(numbers: Sequence[int], each: int) -> ray.data.Dataset:
    """Returns a lazy dataset with the column `number`, `each` rows per block.

    Ray Data splits the rows of each read task evenly into the requested number of blocks. A last task with fewer rows
    makes fewer blocks, or smaller ones. A task reserves no CPU, since replicas of the model may leave none.
    """
    source = _Numbers(numbers, each)
    blocks = len(source.groups) * source.blocks_per_task
    return ray.data.read_datasource(source, override_num_blocks=blocks, num_cpus=0)


def _rows(chunk: Chunk) -> int:
    return len(next(iter(chunk.values()), ()))


def _chunks_of(block: Chunk) -> Iterator[Chunk]:
    """Yields the chunks in a block: rows of one number each, or all, if they have none. Chunks without rows are left
    out."""
    if not _rows(block):
        return
    numbers = block.get("number", np.zeros(_rows(block)))
    starts = [0, *(np.flatnonzero(numbers[1:] != numbers[:-1]) + 1).tolist(), len(numbers)]
    for start, stop in pairwise(starts):
        yield {name: values[start:stop] for name, values in block.items()}


def _block_of(chunks: Iterable[Chunk]) -> Chunk:
    """Returns chunks as one block; an empty one if none has rows."""
    kept = [chunk for chunk in chunks if _rows(chunk)]
    if len(kept) < 2:
        return kept[0] if kept else {"number": np.zeros(0, np.int64)}
    return {name: np.concatenate([chunk[name] for chunk in kept]) for name in kept[0]}


@dataclass(frozen=True, slots=True)
class _Preprocess:
    preprocess: Callable[[int], Chunk]
    keys: Keys = field(default_factory=Keys)

    def __call__(self, table: Chunk) -> Chunk:
        claim()
        keep_freed_memory()  # of images at full size
        return _or_raised(lambda numbers: _block_of(map(self.preprocess, numbers)), table["number"].tolist())


@dataclass(frozen=True, slots=True)
class _EachChunk:
    """Applies a stage to each chunk of a block; returns a block that stands for an exception unchanged."""

    stage: Stage
    keys: Keys = field(default_factory=Keys)

    def __call__(self, block: Chunk) -> Chunk:
        claim()
        keep_freed_memory()
        if RAISED in block:
            return block
        return _or_raised(lambda chunks: _block_of(map(self.stage, chunks)), _chunks_of(block))


@dataclass(frozen=True, slots=True)
class _AllStages:
    """Loads the network, as `model` does, and returns a stage that takes a chunk, given as its number, through all
    stages."""

    preprocess: Callable[[int], Chunk]
    model: Callable[[int | None], Stage]
    postprocess: Stage

    def __call__(self, threads: int | None) -> Stage:
        segment = self.model(threads)

        def stage(chunk: Chunk) -> Chunk:
            decoded = self.preprocess(int(chunk["number"][0]))
            return self.postprocess(segment(decoded)) if _rows(decoded) else decoded

        return stage


class _ModelActor:
    """The model stage in the form that Ray Data needs: a class that each actor instantiates once."""

    def __init__(self, model: Callable[[int | None], Stage], threads: int | None, roll: Any, _keys: Keys) -> None:
        claim()
        try:
            stage = replicas.load_as_called(roll, partial(model, threads))
        except UserError as error:
            refusal = error

            def stage(_chunk: Chunk) -> Chunk:
                raise refusal

        self.stage = _EachChunk(stage)

    def __call__(self, chunk: Chunk) -> Chunk:
        return self.stage(chunk)


def _or_raised(stage: Callable[[Any], Chunk], argument: Any) -> Chunk:
    """Returns the stage's chunk, or one that stands for an exception that the user can act on."""
    try:
        return stage(argument)
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in storage.USER_MUST_FIX:
            raise
        return {RAISED: np.array([pickle.dumps(error)], dtype=object)}
