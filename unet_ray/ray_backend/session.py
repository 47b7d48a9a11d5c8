"""The Ray of a command or a notebook: found or started, and ended as quietly."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any


@dataclass(frozen=True, slots=True)
class Runtime:
    """Where work is done: in this process, or on Ray."""

    local: bool = False
    """In this process; Ray is neither started nor imported."""
    verbose: bool = False
    """Show what Ray says."""

    @contextmanager
    def started(self) -> Iterator[None]:
        """A block in which Ray is there, see `ray_session`; nothing with `local`."""
        with nullcontext() if self.local else ray_session(self.verbose):
            yield


LOCAL = Runtime(local=True)


@contextmanager
def ray_session(verbose: bool = False) -> Iterator[None]:
    """A Ray: the one this process has, else the cluster that RAY_ADDRESS names (a job has it set), else
    one of its own on this machine, ended and cleaned up after."""
    # Ray Train repeats each worker's print on the driver; one voice is enough.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    # An actor that only waits for a cloud's notice, which epochs that are kept in checkpoints do without; like every
    # process of Ray's it wakes a hundred times a second.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # Never more nodes by Ray Data's own estimate, which is `nodes.asking_for_more`'s to ask: once it asks for parts of
    # a CPU, it rounds down what each node has left, and on small nodes the next copy of a model does not fit any more.
    for resource in ("CPU", "GPU", "MEMORY", "OBJECT_STORE_MEMORY"):
        os.environ.setdefault(f"RAY_DATA_DEFAULT_CLUSTER_SCALING_UP_{resource}_UTIL_THRESHOLD", "1e9")
    if not verbose:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray's C++ side writes warnings to stderr by itself
    import ray

    if ray.is_initialized():  # a notebook or a test that has its own, and ends it
        yield
        return
    options: dict[str, Any] = {} if verbose else {"log_to_driver": False, "logging_level": "ERROR"}
    temporary = None
    if not os.environ.get("RAY_ADDRESS"):
        # Not just any Ray that runs on this machine: it may be somebody else's. With one CPU, a worker would hold it
        # and no image could ever be decoded, so Ray is told of two.
        temporary = tempfile.mkdtemp(prefix="unet-ray-")
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        options |= {"address": "local", "num_cpus": max(2, cpus), "include_dashboard": False}
        options |= {"_temp_dir": temporary, "_node_ip_address": "127.0.0.1"}
        # Processes take seconds to start, and the stages of Ray Data need a few more than there are CPUs: by default
        # Ray ends those within a second, which made a short prediction take twice as long. But each also wakes a
        # hundred times a second, so none is kept for good; in less than a minute, some ended while they were needed.
        options |= {"_system_config": {"num_workers_soft_limit": 0, "idle_worker_killing_time_threshold_ms": 60_000}}
    with nullcontext() if verbose else _stderr_to_nowhere():
        ray.init(**options)
    stop_like_ctrl_c()  # Ray has set its own way
    try:
        yield
    finally:
        ray.shutdown()
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def stop_like_ctrl_c() -> None:
    """Makes SIGTERM, which `ray job stop`, Kubernetes and others send, what Ctrl-C is."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)


@contextmanager
def _stderr_to_nowhere() -> Iterator[None]:
    """Hides what C++ code prints, which Python's own redirection does not reach. Exceptions are not hidden."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
