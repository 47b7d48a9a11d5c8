"""Runs the stages of prediction and evaluation through Ray Data."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from ray.data import ActorPoolStrategy, DataContext, Datasource, ReadTask
from ray.data.block import BlockMetadata

from unet_ray.config import UserError
from unet_ray.data import storage
from unet_ray.data.chunks import Chunk, Stage
from unet_ray.models.device import keep_freed_memory
from unet_ray.ray_backend import autoscaling, internals, nodes
from unet_ray.ray_backend.shared_files import check_shared

NUMBERS_A_TASK = 4096
"""Chunk numbers per read task, which makes a block of each number."""

A_TASK, A_TASK_BESIDE_A_MODEL = 0.5, 0.24
"""CPUs that Ray reserves for a task that decodes or writes. Such a task waits part of the time, and when it ends the
next must be there already, since Ray Data takes a while to start one.

On CPUs, a replica of the model leaves these tasks one CPU or a thousandth less (`nodes.cpus_reserved_by_replica`), on
which four fit. With two, decoding and writing alone took 1.3 times as long on two cores."""

RESERVED = 0.05
"""Share of the CPUs that Ray Data splits evenly over all stages, if nodes may be added: with its default of a half,
the replicas of the model would not fit on them. Ray Data keeps what each stage needs at least in any case."""

RAISED = "raised"
"""Column of a chunk that stands for an exception, pickled. Ray Data would turn an exception of a task or an actor into
text, and the command could not tell a UserError from a bug. Pickle is safe here and the simplest: only our own
processes write these chunks, and Ray itself sends everything between them as pickles."""

NO_LIMIT = 4096
"""Most replicas on a cluster that can grow: in effect, as many as fit."""


def run_on_cluster(
    numbers: Sequence[int],
    preprocess: Callable[[int], Chunk],
    model: Callable[..., Stage],
    postprocess: Stage,
    *,
    workers: int,
    device: str,
    shared: Mapping[str, str],
) -> Iterator[Chunk]:
    """Runs the stages of `local.run_here` through Ray Data. Yields what `postprocess` returns, chunk by chunk, in the
    order in which chunks are finished.

    `preprocess` and `postprocess` run in tasks, and `model(device=, threads=, replicas=)` in a pool of actors, each of
    which calls it once. Ray keeps tasks off nodes with a GPU as long as others have room.

    `workers`: replicas of the model. 0: one per GPU, or one per `nodes.THREADS_PER_REPLICA` CPUs, and more as the
    cluster grows. `shared`: see `check_shared`. Raises UserError if the workers can't fit, if a node does not see the
    shared files, or if a stage raises it.
    """
    pool = _pool_of_replicas(workers, device)
    check_shared(shared)
    grows = not workers and autoscaling.may_grow()
    if grows and pool.device == "cpu":
        DataContext.get_current().op_resource_reservation_ratio = RESERVED
    # All replicas start at once: if it may choose, Ray Data gives a stage only a part of the CPUs.
    compute = ActorPoolStrategy(
        min_size=min(pool.replicas, len(numbers)), max_size=NO_LIMIT if grows else pool.replicas
    )
    as_blocks: dict[str, Any] = {"batch_size": None, "batch_format": "numpy"}
    # The stages reserve different numbers of CPUs, which keeps Ray Data from fusing them: decoding in the model's
    # actors would not overlap with the model.
    chunks = _one_block_each(numbers).map_batches(_Preprocess(preprocess), num_cpus=pool.task_cpus, **as_blocks)
    segmented = internals.map_whole_blocks(
        chunks,
        _ModelActor,
        fn_constructor_kwargs={
            "model": model,
            "device": pool.device,
            "threads": pool.threads,
            "replicas": pool.replicas,
        },
        compute=compute,
        runtime_env=nodes.runtime_env(pool.device),
        **pool.reserved,
    )
    finished = segmented.map_batches(_UnlessEmpty(postprocess), num_cpus=pool.task_cpus, **as_blocks)
    with autoscaling.asking_for_more(pool.bundle) if grows else nullcontext():
        for chunk in finished.iter_batches(**as_blocks):
            if RAISED in chunk:
                raise pickle.loads(chunk[RAISED][0])
            if _rows(chunk):
                yield chunk


@dataclass(frozen=True, slots=True)
class _Pool:
    """Replicas of the model, and what they and the tasks beside them take of the nodes."""

    replicas: int
    device: str
    """`cuda` or `cpu`."""
    threads: int | None
    """Per replica; None on a GPU."""
    bundle: nodes.Bundle
    """What a node must have for a replica."""
    reserved: dict[str, float]
    """What Ray reserves for a replica."""
    task_cpus: float


def _pool_of_replicas(workers: int, device: str) -> _Pool:
    """Waits until the replicas fit on the cluster. Raises UserError if they can't."""
    device = autoscaling.pick_device(device)
    if workers:
        autoscaling.check_workers(workers, device)
    if device == "cuda":
        bundle = {"GPU": 1.0}
        # No CPU: on a node with as many GPUs as CPUs, none would be left to decode images.
        reserved = {"num_gpus": 1.0, "num_cpus": 0.0}
        return _Pool(workers or nodes.room(bundle), device, None, bundle, reserved, A_TASK)
    autoscaling.make_room(1, {"CPU": 1.0}, "no node of the cluster has a CPU", "add one")
    # A replica runs as many threads as it has CPUs: decoding is short beside the model, and idle CPUs would cost more.
    threads, replicas = (nodes.cpus_for_each(workers, spare=0), workers) if workers else nodes.replicas_on_cpus()
    reserved = {"num_cpus": nodes.cpus_reserved_by_replica(threads)}
    return _Pool(replicas, device, threads, {"CPU": float(threads)}, reserved, A_TASK_BESIDE_A_MODEL)


class _Numbers(Datasource):
    """Chunk numbers, `NUMBERS_A_TASK` per read task: a hundred million images are not a million objects at once."""

    def __init__(self, numbers: Sequence[int]) -> None:
        super().__init__()
        self.groups = [
            np.asarray(numbers[start : start + NUMBERS_A_TASK], np.int64)
            for start in range(0, len(numbers), NUMBERS_A_TASK)
        ]

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


def _one_block_each(numbers: Sequence[int]) -> ray.data.Dataset:
    """Returns a lazy dataset with the column `number`, one row per block.

    Ray Data splits what each read task returns evenly, into as many blocks as are asked for per task: one for each of
    `NUMBERS_A_TASK` rows, and none for rows that the last task lacks. A task holds no CPU, since replicas of the model
    may leave none.
    """
    source = _Numbers(numbers)
    return ray.data.read_datasource(source, override_num_blocks=len(source.groups) * NUMBERS_A_TASK, num_cpus=0)


def _rows(chunk: Chunk) -> int:
    return len(next(iter(chunk.values()), ()))


@dataclass(frozen=True, slots=True)
class _Preprocess:
    preprocess: Callable[[int], Chunk]

    def __call__(self, table: Chunk) -> Chunk:
        keep_freed_memory()  # of photographs at full size
        assert len(table["number"]) == 1, "a block holds one chunk"
        return _or_raised(self.preprocess, int(table["number"][0]))


@dataclass(frozen=True, slots=True)
class _UnlessEmpty:
    """Applies a stage to chunks with rows; passes on empty ones, and those that stand for an exception."""

    stage: Stage

    def __call__(self, chunk: Chunk) -> Chunk:
        keep_freed_memory()
        return _or_raised(self.stage, chunk) if _rows(chunk) and RAISED not in chunk else chunk


class _ModelActor:
    """The model stage in the form that Ray Data needs: a class that each actor instantiates once."""

    def __init__(self, model: Callable[..., Stage], **options: Any) -> None:
        try:
            stage = model(**options)
        except UserError as error:
            refusal = error

            def stage(_chunk: Chunk) -> Chunk:
                raise refusal

        self.stage = _UnlessEmpty(stage)

    def __call__(self, chunk: Chunk) -> Chunk:
        return self.stage(chunk)


def _or_raised(stage: Callable[[Any], Chunk], argument: Any) -> Chunk:
    """Returns what the stage returns, or a chunk that stands for an exception that the user can act on."""
    try:
        return stage(argument)
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in storage.USER_MUST_FIX:
            raise
        return {RAISED: np.array([pickle.dumps(error)], dtype=object)}
