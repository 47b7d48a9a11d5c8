"""The cluster's nodes: what they have room for, asking an autoscaler for more, and whether they see the same files."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
import ray.exceptions
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from unet_ray.config import UserError
from unet_ray.data import storage
from unet_ray.models.device import ONE_HEAP

log = logging.getLogger("unet_ray")

THREADS_A_MODEL = 8
"""CPUs a copy of the model: more threads than this gain little on one image."""
SIGN_SECONDS = 30.0
"""How long an autoscaler has to begin with what it is asked for: it looks every five seconds."""
STALL_SECONDS = 900.0
"""How long a machine may take from being ordered to being a node: minutes for one with a GPU."""
FIRST_REPORT_SECONDS = 15.0
"""How long an autoscaler that has just been started may take to see the first node; it looks every five seconds."""
ASK_SECONDS, MOST_AT_ONCE = 5.0, 16
"""How long nodes that have come have to be put to use before more are asked for, and how many those may be."""
STEP_SECONDS = 1.0

Bundle = dict[str, float]
"""What one worker takes of a node: resource -> amount."""


def alive() -> list[dict[str, Any]]:
    """Ray's description of each node."""
    return [node for node in ray.nodes() if node["Alive"]]


def total(resource: str) -> float:
    """How much of a resource all nodes together have."""
    return sum(node["Resources"].get(resource, 0) for node in alive())


def object_store_of_smallest() -> int:
    """Bytes that every node that runs something can hold."""
    stores = [node["Resources"].get("object_store_memory", 0) for node in _working()]
    return int(min((store for store in stores if store), default=0))


def _working() -> list[dict[str, Any]]:
    """The nodes that run anything; the head of a launched cluster has no CPU to give."""
    return [node for node in alive() if node["Resources"].get("CPU", 0) or node["Resources"].get("GPU", 0)]


def room(bundle: Bundle) -> int:
    """How many workers of such a share the nodes hold at once: none spans two nodes."""
    return sum(
        min(int(node["Resources"].get(name, 0) / amount + 1e-9) for name, amount in bundle.items()) for node in alive()
    )


def cpus_for_each(workers: int, spare: int) -> int:
    """The most CPUs that each of `workers` can have on the nodes with `spare` left over; at least 1."""
    cpus = int(total("CPU"))
    fitting = (n for n in range(cpus, 1, -1) if room({"CPU": n}) >= workers and cpus - n * workers >= spare)
    return next(fitting, 1)


def runtime_env(device: str) -> dict[str, Any]:
    """Ray's, of a process in which a network runs."""
    return {"env_vars": ONE_HEAP} if device == "cpu" else {}


def models_on_cpus() -> tuple[int, int]:
    """(CPUs for each copy of a model, how many copies the nodes hold); CPUs as the largest node divides best."""
    largest = max([int(node["Resources"].get("CPU", 0)) for node in alive()], default=0)
    each = max(1, largest // max(1, largest // THREADS_A_MODEL))
    return each, max(1, room({"CPU": each}))


def cpus_of_a_model(each: int) -> float:
    """What of its share of `each` CPUs a copy of the model holds. The rest is for tasks that decode and write: a CPU,
    or less where on some node one copy more would fit into the rests. Were a node's last CPU held by a copy, as of one
    that lost its own node, no image could be decoded and nothing would ever go on."""
    nodes_cpus = [node["Resources"].get("CPU", 0) for node in _working()]
    return max([each - 1, *(cpus / (cpus // each + 1) + 0.001 for cpus in nodes_cpus)])


def pick_device(wanted: str) -> str:
    """`auto` is CUDA where the cluster has a GPU, or has nothing yet and gets one when it asks. Raises UserError if
    CUDA is asked for and can't be had."""
    if wanted == "cpu":
        return "cpu"
    gpu = {"GPU": 1.0}
    if room(gpu):
        return "cuda"
    if wanted == "cuda":
        make_room(1, gpu, "--device cuda: the cluster has no GPU", "use --device cpu")
        return "cuda"
    if _working() or not may_grow():
        return "cpu"
    try:
        make_room(1, gpu, "the cluster has no GPU yet", "")
    except UserError:
        return "cpu"
    return "cuda"


def check_workers(workers: int, device: str, cpus_per_worker: int = 1, most: int | None = None) -> bool:
    """Waits until the cluster has room for that many workers at once, and asks its autoscaler for nodes where it has
    not, enough for `most`. Returns whether nodes have come. Raises UserError if there can't be room; Ray would wait for
    ever."""
    each = max(1, cpus_per_worker)
    bundle: Bundle = {"GPU": 1.0} if device == "cuda" else {"CPU": float(each)}
    there, kind = room(bundle), "GPU" if device == "cuda" else "CPU"
    per = f" of {each} CPUs" if kind == "CPU" and each > 1 else ""
    remedy = f"use --workers {there} or fewer" if there else "lower compute.cpus_per_worker"
    trouble = f"--workers {workers}{per}: the cluster has {int(total(kind))} {kind}s"
    return make_room(workers, bundle, trouble, remedy, most)


def make_room(workers: int, bundle: Bundle, trouble: str, remedy: str, most: int | None = None) -> bool:
    """Waits until the nodes have room for `workers` such bundles. Where they haven't, a cluster that may grow is asked
    for nodes for `most` (`workers`). Returns whether it was waited for.

    Raises UserError(`trouble`: `remedy`) if it can't grow, or does not begin to.
    """
    if room(bundle) >= workers:
        return False
    if not may_grow():
        raise UserError(f"{trouble}: {remedy}")
    log.warning("%s: asking for nodes", trouble)
    # What is pending is what an autoscaler provides for. Unlike a request through its API this is gone with the job.
    group = placement_group([bundle] * max(workers, most or 0), strategy="PACK")
    try:
        nodes, coming = len(alive()), 0
        changed = time.monotonic()
        while room(bundle) < workers:
            time.sleep(STEP_SECONDS)
            now_there, now_coming = len(alive()), _coming()
            if (now_there, now_coming) != (nodes, coming):
                nodes, coming, changed = now_there, now_coming, time.monotonic()
                log.warning("%d nodes, %d more starting", nodes, coming)
            patience = STALL_SECONDS if coming else SIGN_SECONDS
            if time.monotonic() - changed > patience:
                raise UserError(f"{trouble}, and no node that would do is being started: {remedy}")
    finally:
        remove_placement_group(group)
    return True


@contextmanager
def asking_for_more(bundle: Bundle) -> Iterator[None]:
    """Meanwhile, whenever all that the nodes have is in use, an autoscaler is asked for as many such bundles again as
    there is room for. Ray Data's own way is switched off, see `session.ray_session`."""
    ended = threading.Event()

    def ask_once() -> None:
        # Each for itself, as the autoscaler of KubeRay gives a group all its bundles or none.
        groups = [placement_group([bundle]) for _ in range(min(max(1, room(bundle)), MOST_AT_ONCE))]
        ours = {group.id.hex() for group in groups}
        try:
            states: set[str] = set()
            while not ended.wait(STEP_SECONDS) and "CREATED" not in states:
                states = {info["state"] for name, info in placement_group_table().items() if name in ours}
        finally:
            for group in groups:
                remove_placement_group(group)

    def ask() -> None:
        while not ended.wait(ASK_SECONDS):
            try:
                ask_once()
            except Exception as error:  # the prediction goes on with the nodes that it has, or says what is wrong
                log.info("no nodes can be asked for: %s", error)

    thread = threading.Thread(target=ask, name="unet_ray: asks for nodes", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def may_grow() -> bool:
    """Whether an autoscaler that can add nodes looks after this cluster."""
    # Ray has no other word for "this process started it": such a Ray has no autoscaler, only one that watches.
    if ray._private.worker._global_node.is_head():
        return False
    deadline = time.monotonic() + FIRST_REPORT_SECONDS
    while (report := _report_of_v1()) is not None:
        # Where nodes were started by hand, Ray's autoscaler only watches, and invents a type for each of them.
        kinds = report.get("active_nodes", {})
        if kinds or time.monotonic() > deadline:
            return any(not kind.startswith("node_") for kind in kinds)
        time.sleep(STEP_SECONDS)  # the first report knows of no node yet
    status = _status_of_v2()
    there = [] if status is None else [*status.active_nodes, *status.idle_nodes]
    kinds = [node.ray_node_type_name for node in there]
    return any(kind and not kind.startswith("node_") for kind in kinds)


def _coming() -> int:
    """How many nodes the autoscaler is starting."""
    report = _report_of_v1()
    if report is not None:
        return sum(report.get("pending_launches", {}).values()) + len(report.get("pending_nodes", []))
    status = _status_of_v2()
    if status is None:
        return 0
    return sum(launch.count for launch in status.pending_launches) + len(status.pending_nodes)


def _report_of_v1() -> dict[str, Any] | None:
    """What the autoscaler of Ray's cluster launcher last wrote down, which `ray status` prints."""
    from ray.experimental.internal_kv import _internal_kv_get

    text = _internal_kv_get("__autoscaling_status")
    return json.loads(text).get("autoscaler_report", {}) if text else None


def _status_of_v2() -> Any:
    """What the autoscaler of KubeRay says; None if there is none."""
    from ray.autoscaler.v2.sdk import get_cluster_status

    try:
        return get_cluster_status(ray.get_runtime_context().gcs_address)
    except Exception as error:  # whatever it is, it says of no node that it is coming
        log.info("the autoscaler can't be asked: %s", error)
        return None


@ray.remote(num_cpus=0, max_retries=0)
def _unseen(locations: list[str]) -> list[str]:
    return [location for location in locations if not os.path.exists(location)]  # noqa: PTH110 - names may be no UTF-8


def check_shared(places: Mapping[str, str]) -> None:
    """Raises UserError unless every node sees what this one sees. `places`: what it is called -> a file of it.

    Buckets are taken to be seen by all.
    """
    others = [node for node in _working() if node["NodeID"] != ray.get_runtime_context().get_node_id()]
    seen = {
        name: location
        for name, location in places.items()
        if not storage.is_uri(location) and os.path.exists(location)  # noqa: PTH110
    }
    if not others or not seen:
        return
    for node, missing in _ask(others, [*seen.values()]):
        for name, location in seen.items():
            if location in missing:
                raise UserError(
                    f"{name}: the node {node} does not see {location}: use a folder that all nodes share (NFS, say), "
                    "or a bucket (s3://, gs://)"
                )


def _ask(nodes: list[dict[str, Any]], locations: list[str]) -> list[tuple[str, list[str]]]:
    """(address, what it does not see) of each node that answers."""
    asked = [
        _unseen.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            locations
        )
        for node in nodes
    ]
    found = []
    for node, answer in zip(nodes, asked, strict=True):
        try:
            found.append((node["NodeManagerAddress"], ray.get(answer, timeout=120)))
        except (ray.exceptions.RayError, TimeoutError) as error:  # it is lost, which is seen to elsewhere
            log.info("%s did not say what it sees: %s", node["NodeManagerAddress"], error)
    return found
