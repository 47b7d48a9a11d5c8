"""Holds every name of Ray that we use but that Ray's API reference does not promise to keep.

Each one says why it is used, what breaks without it, and which public way was tried. `tests/test_internals.py` checks
that the installed Ray still has it. The figures are of Ray 2.60 on two CPU cores, medians of runs in turns. Functions
import Ray themselves, since `session` must load without Ray.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import ray.data

DATA_SCALING_VARIABLES = tuple(
    f"RAY_DATA_DEFAULT_CLUSTER_SCALING_UP_{resource}_UTIL_THRESHOLD"
    for resource in ("CPU", "GPU", "MEMORY", "OBJECT_STORE_MEMORY")
)
"""Utilisation of a resource at which Ray Data asks an autoscaler for nodes. 1e9 switches that off, and
`autoscaling.asking_for_more` asks instead. Otherwise Ray Data asks for fractions of a CPU and then rounds down what
each node has left, so that on small nodes the next replica of a model no longer fits. No field of `DataContext` or
`ExecutionOptions` switches it off."""

TRAIN_PRINT_VARIABLE = "RAY_TRAIN_ENABLE_PRINT_PATCH"
"""0: a worker's `print` reaches the driver once. Otherwise Ray Train repeats each line. No argument of `RunConfig`
does this."""

TRAIN_PREEMPTION_VARIABLE = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
"""0: Ray Train starts no actor that waits for a cloud's notice of preemption. We don't need one, since each
epoch is in a checkpoint, and like every Ray process it would wake a hundred times a second. No argument of `RunConfig`
does this."""

BACKEND_LOG_VARIABLE = "RAY_BACKEND_LOG_LEVEL"
"""Level of Ray's C++ logs. `logging_level` of `ray.init` covers Python only: without this variable C++ warnings
appear between our own lines on stderr."""

ENVIRONMENT = {
    TRAIN_PRINT_VARIABLE: "0",
    TRAIN_PREEMPTION_VARIABLE: "0",
    **dict.fromkeys(DATA_SCALING_VARIABLES, "1e9"),
}
"""Environment variables that must be set before Ray is imported."""

SYSTEM_CONFIG = {"num_workers_soft_limit": 0, "idle_worker_killing_time_threshold_ms": 60_000}
"""Keeps every idle worker process for a minute, and none for longer.

A process takes seconds to start, and Ray Data's stages need a few more processes than there are CPUs. By default Ray
ends those after a second, and a short prediction took twice as long. Each process also wakes a hundred times a second,
so none is kept for good. With less than a minute, some ended while they were still needed. `ray.init` has no public
argument for this."""


def own_ray_options(folder: str) -> dict[str, Any]:
    """Returns the arguments of `ray.init` for a Ray that this process starts for itself.

    `_temp_dir`: a folder of its own, which `session` deletes afterwards. By default each run leaves its logs and
    sockets in a folder that all users of the machine share. `ray start` has a public flag for it, `ray.init` has none.

    (Ray's ports listen on all addresses of the machine, and `_node_ip_address` does not change that: Ray replaces
    127.0.0.1 by the outer address. What keeps others out is the token, see `session`.)
    """
    return {"_temp_dir": folder, "_system_config": SYSTEM_CONFIG}


def available_resources() -> dict[str, dict[str, float]]:
    """Returns node -> resource -> what nobody holds of it now, as the head has heard: up to a second late.

    `ray.available_resources()` is the sum over all nodes. `ray.util.state.list_nodes` tells what a node has, and not
    what is free.
    """
    from ray._private.state import available_resources_per_node

    return available_resources_per_node()


TOKEN_MODE_VARIABLE, TOKEN_VARIABLE = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"
"""A Ray answers only those who send its token. With these variables a Ray of our own has a token for one run. Without
them Ray writes one into ~/.ray, and some homes can't be written to. They are public, but what is kept of them isn't."""


def read_token_variables() -> None:
    """Makes Ray read the token's variables again: it keeps what they were when it was imported."""
    core = _core()
    core.Config.initialize("")
    core.AuthenticationTokenLoader.instance().reset_cache()


def running_here() -> str | None:
    """Returns HOST:PORT of the Ray that `ray start` started on this machine; None if there is none.

    `ray.init(address="auto")` finds it too, but then waits for minutes if it has died.
    """
    from ray._private.services import canonicalize_bootstrap_address

    try:
        return canonicalize_bootstrap_address("auto")
    except ConnectionError:  # there is none
        return None


def ask_head(host_and_port: str) -> None:
    """Asks the head of a cluster for the cluster's id. Raises what Ray raises if it gets no answer, after 40 s.

    `ray.init` asks the same, but several times, and it can't be interrupted meanwhile.
    """
    _core().GcsClient(address=host_and_port)


def _core() -> Any:
    import ray._raylet

    return ray._raylet


def memory_of_machine() -> int:
    """Returns how many bytes of memory this machine has, or its container. Ray sizes its object store by this number,
    and has no public function for it."""
    from ray._common.utils import get_system_memory

    return get_system_memory()


LOOK_SECONDS = 0.02
"""The longest time, in seconds, that Ray Data waits before it looks which tasks have finished."""


def data_waits() -> float:
    """Returns how long Ray Data waits now, in seconds, before it looks which tasks have finished."""
    from ray.data._internal.execution import streaming_executor_state

    return streaming_executor_state.WAIT_FOR_TASK_COMPLETION_TIMEOUT_S


def look_for_finished_tasks_often(seconds: float = LOOK_SECONDS) -> None:
    """Lets Ray Data look every `seconds` which tasks have finished, instead of every 0.1 s.

    Until it looks, the CPUs of a finished task stand idle: three stages of 0.1 s each made 14.1 chunks per second, and
    8.8 with Ray's own 0.1 s. The time is a constant of a module; `DataContext` and `ExecutionOptions` have no field
    for it.
    """
    from ray.data._internal.execution import streaming_executor_state

    streaming_executor_state.WAIT_FOR_TASK_COMPLETION_TIMEOUT_S = seconds


def map_whole_blocks(dataset: ray.data.Dataset, actor: type, **options: Any) -> ray.data.Dataset:
    """Applies an actor class to whole blocks, like `map_batches` with `batch_size=None`; it may have `num_gpus`.

    It uses a `DeveloperAPI` of Ray, the base of `map_groups`. `map_batches` takes `num_gpus` only with a number of rows
    per batch, and would then cut and join the blocks, although each is a chunk. The public way is `map(num_gpus=)` with
    each chunk pickled into one row: 11 chunks of 64 images of 256² per second instead of 25.
    """
    return dataset.map_batches_internal(actor, batch_size=None, batch_format="numpy", **options)


def autoscaler_report() -> dict[str, Any] | None:
    """Returns the last report of the autoscaler that Ray's cluster launcher starts; None if there is none.

    Without it we can't tell whether the cluster can grow, or whether nodes are starting, and a request that can't be
    met would wait for ever. `ray.autoscaler.sdk` and `ray.util.state` have no equivalent. The command `ray status`
    prints it as text, in 1.5 s instead of 0.5 ms; we look every second.
    """
    from ray.experimental.internal_kv import _internal_kv_get

    text = _internal_kv_get("__autoscaling_status")
    return json.loads(text).get("autoscaler_report", {}) if text else None


def autoscaler_status() -> Any:
    """Returns the `ClusterStatus` of the newer autoscaler, which KubeRay starts.

    It serves the same purpose as `autoscaler_report`, and takes 2 ms. Without such an autoscaler it raises whatever Ray
    raises.
    """
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status

    return get_cluster_status(ray.get_runtime_context().gcs_address)
