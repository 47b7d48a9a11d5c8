"""Waits until the cluster has the nodes that the work needs, and asks its autoscaler for them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from unet_ray.config import UserError
from unet_ray.ray_backend import internals, nodes, session
from unet_ray.ray_backend.nodes import Bundle

log = logging.getLogger("unet_ray")

SIGN_SECONDS = 30.0
"""Seconds that an autoscaler may take to start a requested node: it looks every five seconds."""
STALL_SECONDS = 900.0
"""Seconds that an ordered machine may take to become a node: one with a GPU takes minutes."""
FIRST_REPORT_SECONDS = 15.0
"""Seconds that a newly started autoscaler may take to see the first node: it looks every five seconds."""
ASK_SECONDS, MOST_AT_ONCE = 5.0, 16
"""Seconds for new nodes to be put to use before the next request, and the most bundles in one request."""
SAY_SECONDS = 30.0
"""Seconds between two lines while others hold what is needed."""
STEP_SECONDS = 1.0
"""Seconds between two looks at the cluster."""


def pick_device(wanted: str) -> str:
    """Returns `cuda` or `cpu` for `auto`, `cuda` or `cpu`.

    `auto` is CUDA if the cluster has a GPU, or if it has no working node yet and gets one with a GPU on request.
    Raises UserError if CUDA is wanted and the cluster can't get a GPU.
    """
    if wanted == "cpu":
        return "cpu"
    gpu = {"GPU": 1.0}
    if nodes.room_without_others(gpu):
        return "cuda"
    if wanted == "cuda":
        make_room(1, gpu, "--device cuda: the cluster has no GPU", "use --device cpu")
        return "cuda"
    if nodes.able_to_work() or not may_grow():
        return "cpu"
    try:
        make_room(1, gpu, "the cluster has no GPU yet", "")
    except UserError:
        return "cpu"
    return "cuda"


def make_room_for_workers(workers: int, device: str, cpus_per_worker: int = 1, most: int | None = None) -> bool:
    """Waits until that many workers fit on the cluster at once, and asks its autoscaler for nodes if they don't.

    `most`: the number of workers to ask for; `workers` if None. Returns whether nodes were added. Raises UserError if
    the workers can't fit; Ray would wait for ever.
    """
    cpus = max(1, cpus_per_worker)
    bundle: Bundle = {"GPU": 1.0} if device == "cuda" else {"CPU": float(cpus)}
    fitting, kind = nodes.room_without_others(bundle), "GPU" if device == "cuda" else "CPU"
    size = f" of {cpus} CPUs" if kind == "CPU" and cpus > 1 else ""
    remedy = f"use --workers {fitting} or fewer" if fitting else "lower compute.cpus_per_worker"
    problem = f"--workers {workers}{size}: the cluster has {nodes.total(kind) + nodes.held(kind):g} {kind}s"
    return make_room(workers, bundle, problem, remedy, most)


def make_room(workers: int, bundle: Bundle, problem: str, remedy: str, most: int | None = None) -> bool:
    """Waits until `workers` of these bundles fit on the nodes. Returns whether it had to wait.

    Asks a cluster that can grow for enough nodes for `most` bundles (`workers` if None). Raises
    UserError(`problem`: `remedy`) if the cluster can't grow, or starts no node.
    """
    if nodes.room(bundle) >= workers:
        return False
    if not may_grow():
        if nodes.room_without_others(bundle) < workers:
            raise UserError(f"{problem}: {remedy}")
        _wait_for_others(workers, bundle)
        return True
    log.warning("%s: asking for nodes", problem)
    # An autoscaler starts nodes for pending placement groups. These groups end with the job; a request through
    # `ray.autoscaler.sdk` does not.
    group = placement_group([bundle] * max(workers, most or 0), strategy="PACK")
    try:
        count, starting = len(nodes.alive()), 0
        changed = time.monotonic()
        while nodes.room(bundle) < workers:
            time.sleep(STEP_SECONDS)
            try:
                count_now, starting_now = len(nodes.alive()), _nodes_starting()
            except Exception as error:  # the head may be busy: it is asked again
                log.info("the cluster does not say how many nodes it has: %s", error)
                count_now, starting_now = count, starting
            if (count_now, starting_now) != (count, starting):
                count, starting, changed = count_now, starting_now, time.monotonic()
                log.warning("%d nodes, %d more starting", count, starting)
            patience = STALL_SECONDS if starting else SIGN_SECONDS
            if time.monotonic() - changed > patience:
                raise UserError(f"{problem}, and no node that would do is being started: {remedy}")
    finally:
        remove_placement_group(group)
    return True


def _wait_for_others(workers: int, bundle: Bundle) -> None:
    """Waits until others have let go of what these bundles need, and says so every `SAY_SECONDS`."""
    kind = "GPU" if "GPU" in bundle else "CPU"
    said = -SAY_SECONDS
    while nodes.room(bundle) < workers:
        if time.monotonic() - said >= SAY_SECONDS:
            said = time.monotonic()
            held, all_there_is = nodes.held(kind), nodes.total(kind) + nodes.held(kind)
            log.warning("waiting: %g of %g %ss are held by other work on this cluster", held, all_there_is, kind)
        nodes.look()


@contextmanager
def asking_for_more(bundle: Bundle) -> Iterator[None]:
    """Asks the autoscaler for nodes during a `with` block, whenever all nodes are in use.

    Each request asks for as many of these bundles as the nodes already hold, up to `MOST_AT_ONCE`. Ray Data's own
    requests are off, see `internals.DATA_SCALING_VARIABLES`.
    """
    ended = threading.Event()

    def ask_once() -> None:
        # One group per bundle: KubeRay's autoscaler starts nodes for all bundles of a group or for none.
        groups = [placement_group([bundle]) for _ in range(min(max(1, nodes.room(bundle)), MOST_AT_ONCE))]
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
            except Exception as error:  # the prediction goes on with the nodes that it has, or reports what is wrong
                log.info("no nodes can be asked for: %s", error)

    thread = threading.Thread(target=ask, name="unet_ray: asks for nodes", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def may_grow() -> bool:
    """Returns whether the cluster has an autoscaler that can add nodes."""
    if session.is_own_ray():
        return False
    deadline = time.monotonic() + FIRST_REPORT_SECONDS
    while (report := internals.autoscaler_report()) is not None:
        kinds = report.get("active_nodes", {})
        if kinds or time.monotonic() > deadline:
            return any(map(_is_launched, kinds))
        time.sleep(STEP_SECONDS)  # the first report has no node yet
    status = _status()
    there = [] if status is None else [*status.active_nodes, *status.idle_nodes]
    return any(_is_launched(node.ray_node_type_name) for node in there)


def _is_launched(kind: str) -> bool:
    """Returns whether an autoscaler starts nodes of this type. If nodes were started by hand, Ray's autoscaler only
    watches them, and makes up a type `node_…` for each."""
    return bool(kind) and not kind.startswith("node_")


def _nodes_starting() -> int:
    """Returns how many nodes the autoscaler is starting."""
    report = internals.autoscaler_report()
    if report is not None:
        return sum(report.get("pending_launches", {}).values()) + len(report.get("pending_nodes", []))
    status = _status()
    if status is None:
        return 0
    return sum(launch.count for launch in status.pending_launches) + len(status.pending_nodes)


def _status() -> Any:
    try:
        return internals.autoscaler_status()
    except Exception as error:  # after any error, no node is known to be starting
        log.info("the autoscaler can't be asked: %s", error)
        return None
