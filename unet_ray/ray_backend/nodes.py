"""Finds the nodes that the cluster has now, and how many workers or replicas of a model fit on them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from unet_ray.keys import Keys
from unet_ray.own_process import claim
from unet_ray.ray_backend import internals

log = logging.getLogger("unet_ray")

Answer = TypeVar("Answer")

ANSWER_SECONDS = 120.0

THREADS_PER_REPLICA = 8
"""CPUs of a replica of the model: more threads than this gain little on one image."""

Bundle = dict[str, float]
"""Resources that one worker takes of a node: name -> amount."""

LOOK_SECONDS, STEP_SECONDS = 5.0, 0.2
"""How long the head may take to hear that resources are free again, and the time between two looks."""
_held: dict[str, Bundle] = {}
"""Node -> what others held of it when `look` was called. A node that joined later is all ours."""


def look() -> None:
    """Notes the CPUs and GPUs that others hold: `room` and its like leave them out. Call it when none of our own work
    is running. What has just ended may still seem to be held, so it looks again for some seconds."""
    deadline = time.monotonic() + LOOK_SECONDS
    while True:
        _held.clear()
        free = internals.available_resources()
        for node in alive():
            # Ray leaves out a resource of which nothing is free.
            left = free.get(node["NodeID"], node["Resources"])
            held = {kind: node["Resources"].get(kind, 0) - left.get(kind, 0) for kind in ("CPU", "GPU")}
            _held[node["NodeID"]] = {kind: amount for kind, amount in held.items() if amount > 1e-9}
        if not any(_held.values()) or time.monotonic() > deadline:
            return
        time.sleep(STEP_SECONDS)


def held(kind: str) -> float:
    """Returns how many CPUs or GPUs others held when `look` was called."""
    return sum(_held.get(node["NodeID"], {}).get(kind, 0) for node in alive())


def free() -> list[Bundle]:
    """Returns the resources of each node, less what others held when `look` was called."""
    return [
        {kind: amount - _held.get(node["NodeID"], {}).get(kind, 0) for kind, amount in node["Resources"].items()}
        for node in alive()
    ]


def alive() -> list[dict[str, Any]]:
    """Returns Ray's description of each node."""
    return [node for node in ray.nodes() if node["Alive"]]


def able_to_work() -> list[dict[str, Any]]:
    """Returns the nodes that can run anything. The head of a launched cluster has no CPU to give."""
    return [node for node in alive() if node["Resources"].get("CPU", 0) or node["Resources"].get("GPU", 0)]


def answers(
    question: Callable[[], Answer], bundle: Bundle | None = None, env: dict[str, Any] | None = None
) -> list[tuple[str, Answer]]:
    """Asks every node that can run anything, or only those with the resources of the bundle.

    Returns (address, answer) of each that answers. This node answers in this process. With `env`, a `runtime_env`, each
    node answers in a process of its own with this environment, claimed as a replica's is, which then ends. Raises what
    the question raises.
    """
    here = ray.get_runtime_context().get_node_id() if env is None else None
    needs = (bundle or {}).items()
    asked = [node for node in able_to_work() if all(node["Resources"].get(name, 0) >= least for name, least in needs)]
    futures = [None if node["NodeID"] == here else _ask_on(node, question, env) for node in asked]
    found = []
    for node, future in zip(asked, futures, strict=True):
        address = node["NodeManagerAddress"]
        try:
            found.append((address, question() if future is None else ray.get(future, timeout=ANSWER_SECONDS)))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except (ray.exceptions.RayError, TimeoutError) as error:  # a lost node is handled elsewhere
            log.info("%s did not answer: %s", address, error)
    return found


@ray.remote(num_cpus=0, max_retries=0)
def _asked(question: Callable[[], Answer], _keys: Keys) -> Answer:
    return question()


@ray.remote(num_cpus=0, max_retries=0, max_calls=1)
def _asked_in_own_process(question: Callable[[], Answer], _keys: Keys) -> Answer:
    claim()
    return question()


def _ask_on(node: dict[str, Any], question: Callable[[], Answer], env: dict[str, Any] | None) -> ray.ObjectRef:
    strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    if env is None:
        return _asked.options(scheduling_strategy=strategy).remote(question, Keys())
    return _asked_in_own_process.options(scheduling_strategy=strategy, runtime_env=env).remote(question, Keys())


def total(resource: str) -> float:
    """Returns the sum of a resource over all nodes, without what others hold."""
    return sum(node.get(resource, 0) for node in free())


def object_store_of_smallest() -> int:
    """Returns the shared memory, in bytes, of the node that has least, among those that can run anything."""
    stores = [node["Resources"].get("object_store_memory", 0) for node in able_to_work()]
    return int(min((store for store in stores if store), default=0))


def room(bundle: Bundle) -> int:
    """Returns how many workers with this bundle fit on the nodes at once. No worker spans two nodes."""
    return _room(free(), bundle)


def room_without_others(bundle: Bundle) -> int:
    """Returns how many would fit if nobody else held anything."""
    return _room([node["Resources"] for node in alive()], bundle)


def _room(nodes: list[Bundle], bundle: Bundle) -> int:
    return sum(min(int(node.get(name, 0) / amount + 1e-9) for name, amount in bundle.items()) for node in nodes)


def cpus_for_each(workers: int, spare: int) -> int:
    """Returns the most CPUs that each of `workers` can have while `spare` CPUs of the cluster stay free; at least 1."""
    cpus = int(total("CPU"))
    fitting = (n for n in range(cpus, 1, -1) if room({"CPU": n}) >= workers and cpus - n * workers >= spare)
    return next(fitting, 1)


def replicas_on_cpus() -> tuple[int, int]:
    """Returns (CPUs per replica of a model, how many replicas fit on the nodes).

    Splits the largest node evenly into replicas of about `THREADS_PER_REPLICA` CPUs.
    """
    largest = max([int(node.get("CPU", 0)) for node in free()], default=0)
    cpus = max(1, largest // max(1, largest // THREADS_PER_REPLICA))
    return cpus, max(1, room({"CPU": cpus}))


def cpus_reserved_by_replica(threads: int) -> float:
    """Returns the CPUs that Ray reserves for a replica that runs `threads` threads.

    Ray reserves one CPU less than the replica uses, so that the tasks that decode and write have a CPU on its node. It
    reserves more if, with one less, another replica would fit on some node. A replica must never take a node's last
    CPU, not even if it moved there from a lost node: no image could be decoded, and the prediction would never end.
    """
    reserved = threads - 1.0
    for node in free():
        cpus = node.get("CPU", 0)
        one_too_many = cpus // threads + 1
        reserved = max(reserved, cpus / one_too_many + 0.001)
    return reserved


def runtime_env(device: str) -> dict[str, Any]:
    """Returns Ray's `runtime_env` for a process in which a network runs."""
    from unet_ray.models.device import ONE_HEAP  # loads torch, which the processes that only answer need not load

    return {"env_vars": ONE_HEAP} if device == "cpu" else {}
