"""Watches the replicas of a model while they load it, and leaves out a node on which they always die.

Ray replaces a replica that dies, usually on the node that has the free place: the one with the bad GPU. So a replica
reports to the roll before and after it loads. On a node where `MOST_DEATHS` have died it waits instead, and keeps the
place occupied, while the replicas on other nodes do the work.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from unet_ray.config import UserError, first_line
from unet_ray.ray_backend import nodes

log = logging.getLogger("unet_ray")

Loaded = TypeVar("Loaded")

MOST_DEATHS = 4
"""Deaths in a row after which a node is left out: a driver that is updated, or memory that is short for a moment, kills
a few."""
LOOK_SECONDS = 2.0
LOAD, WAIT = "load", "wait"


class Roll:
    """Counts on each node the replicas that load, have loaded, and died before they had."""

    def __init__(self, alive: Callable[[], dict[str, str]] | None = None) -> None:
        self.alive = alive or _alive
        """Returns node -> address of those that can work."""
        self.loading: dict[str, set[int]] = defaultdict(set)
        """Node -> process numbers."""
        self.deaths: dict[str, int] = defaultdict(int)
        """Node -> deaths since a replica loaded there."""
        self.reasons: dict[str, str] = {}
        self.good: set[str] = set()
        """Nodes on which a replica has loaded."""

    def processes(self, node: str) -> list[int]:
        """Returns the processes that were loading on a node when last heard of."""
        return sorted(self.loading[node])

    def begin(self, node: str, process: int, dead: list[int]) -> str:
        """Notes that a process begins on a node, and which of `processes` are dead. Returns `verdict`."""
        for number in dead:
            self.died(node, number, "the process ended")
        verdict = self.verdict(node)
        if verdict == LOAD:
            self.loading[node].add(process)
        return verdict

    def verdict(self, node: str) -> str:
        """Returns LOAD, or WAIT if others do the work, or why the model can't be loaded anywhere."""
        if self.deaths[node] < MOST_DEATHS:
            return LOAD
        others = self.alive().keys() - {node}
        if self.good or any(self.loading[other] or self.deaths[other] < MOST_DEATHS for other in others):
            return WAIT
        return "; ".join(self.left_out().values())

    def loaded(self, node: str, process: int) -> None:
        self.loading[node].discard(process)
        self.deaths[node] = 0
        self.good.add(node)

    def died(self, node: str, process: int, reason: str) -> None:
        if process in self.loading[node]:
            self.loading[node].discard(process)
            self.deaths[node] += 1
            self.reasons[node] = reason

    def left_out(self) -> dict[str, str]:
        """Returns node -> what happened there, for those that are left out."""
        bad = [node for node, deaths in self.deaths.items() if deaths >= MOST_DEATHS]
        names = self.alive() if bad else {}
        return {
            node: f"{self.deaths[node]} replicas of the model died on {names.get(node, node)} ({self.reasons[node]})"
            for node in bad
        }


def _alive() -> dict[str, str]:
    return {node["NodeID"]: node["NodeManagerAddress"] for node in nodes.able_to_work()}


@contextmanager
def called_roll() -> Iterator[Any]:
    """Provides the roll as an actor beside this process, and warns once of each node that is left out.

    Ray may place it elsewhere all the same. If that node dies, the roll begins to count again on another one, and a
    replica that calls it meanwhile waits.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options = {"num_cpus": 0, "scheduling_strategy": here, "max_restarts": -1, "max_task_retries": -1}
    roll = ray.remote(**options)(Roll).remote()
    stop = threading.Event()
    thread = threading.Thread(target=_warn, args=(roll, stop), daemon=True)
    thread.start()
    try:
        yield roll
    finally:
        stop.set()
        thread.join(LOOK_SECONDS)
        ray.kill(roll)


def _warn(roll: Any, stop: threading.Event) -> None:
    known: set[str] = set()
    while not stop.wait(LOOK_SECONDS):
        try:
            left_out = ray.get(roll.left_out.remote(), timeout=60)
        except (ray.exceptions.RayError, TimeoutError):
            continue
        for node in left_out.keys() - known:
            log.warning("%s: this node is left out, the others go on", left_out[node])
        known |= left_out.keys()


def load_as_called(roll: Any, load: Callable[[], Loaded]) -> Loaded:
    """Loads in this replica as the roll allows it, and reports. Raises UserError if no node can load."""
    node, process = ray.get_runtime_context().get_node_id(), os.getpid()
    verdict = ray.get(roll.begin.remote(node, process, _dead(ray.get(roll.processes.remote(node)))))
    while verdict == WAIT:
        time.sleep(LOOK_SECONDS)
        verdict = ray.get(roll.verdict.remote(node))
    if verdict != LOAD:
        raise UserError(f"the model can't be loaded on any node: {verdict}")
    try:
        loaded = load()
    except UserError:
        raise
    except Exception as error:
        ray.get(roll.died.remote(node, process, first_line(error)[:300]))
        raise
    ray.get(roll.loaded.remote(node, process))
    return loaded


def _dead(processes: list[int]) -> list[int]:
    """Returns those of some processes of this node that have ended."""
    return [number for number in processes if not _runs(number)]


def _runs(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
