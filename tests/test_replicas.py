"""Replicas that die while they load, and clusters that have no room for an hour, do not end a prediction."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import ray
from conftest import NETWORK, environment
from ray.data import DataContext
from ray.exceptions import RayError

from unet_ray.config import UserError
from unet_ray.ray_backend.data_context import configure
from unet_ray.ray_backend.inference import Pool, pool_of_replicas, run_on_cluster
from unet_ray.ray_backend.replicas import LOAD, MOST_DEATHS, WAIT, Roll

# --- the roll, without Ray ---


def die(roll: Roll, node: str, times: int) -> list[str]:
    """Lets replicas begin and die on a node. Returns the verdicts."""
    verdicts = []
    for _ in range(times):
        die.processes += 1
        verdicts.append(roll.begin(node, die.processes, roll.processes(node)))
    return verdicts


die.processes = 0


def test_a_node_is_left_out_after_four_deaths_if_another_works():
    roll = Roll(lambda: {"a": "10.0.0.1", "b": "10.0.0.2"})
    assert roll.begin("a", 1, []) == LOAD
    roll.loaded("a", 1)
    assert die(roll, "b", MOST_DEATHS + 2) == [LOAD] * MOST_DEATHS + [WAIT] * 2
    assert roll.left_out() == {"b": "4 replicas of the model died on 10.0.0.2 (the process ended)"}
    assert roll.verdict("a") == LOAD


def test_a_node_on_which_one_loads_in_the_end_is_not_left_out():
    roll = Roll(lambda: {"a": "10.0.0.1"})
    assert die(roll, "a", MOST_DEATHS) == [LOAD] * MOST_DEATHS
    roll.loaded("a", die.processes)
    assert not roll.left_out()
    assert die(roll, "a", MOST_DEATHS) == [LOAD] * MOST_DEATHS, "counted from the start again"


def test_where_no_node_can_load_the_run_ends_with_the_reasons():
    roll = Roll(lambda: {"a": "10.0.0.1", "b": "10.0.0.2"})
    assert die(roll, "a", MOST_DEATHS + 1)[-1] == WAIT, "b has not been tried"
    for number in range(MOST_DEATHS):
        assert roll.begin("b", number, []) == LOAD
        roll.died("b", number, "CUDA error: no such device")
    verdict = roll.verdict("b")
    assert "10.0.0.1 (the process ended)" in verdict and "10.0.0.2 (CUDA error: no such device)" in verdict


def test_replicas_that_load_at_the_same_time_are_no_deaths():
    roll = Roll(lambda: {"a": "10.0.0.1"})
    for number in range(8):
        assert roll.begin("a", number, []) == LOAD
    assert roll.verdict("a") == LOAD and roll.processes("a") == list(range(8))


# --- on Ray ---


# Functions that go to workers are local: Ray's workers can't import this file.


def dying(folder: Path, times: int, how: str = "killed"):
    """Returns a model whose first replicas die while they load."""

    def model(_threads: int | None):
        if (begun := len([*folder.iterdir()])) < times:
            (folder / str(begun)).touch()
            if how == "killed":
                os._exit(1)
            raise RuntimeError("CUDA error: device-side assert triggered")
        return lambda chunk: chunk

    return model


def found(model, count: int = 12, pool: Pool | None = None) -> list[int]:
    pool = pool or pool_of_replicas(1, "cpu")
    chunks = run_on_cluster(
        range(count), lambda number: {"number": np.array([number])}, model, lambda chunk: chunk, pool=pool
    )
    return sorted(int(chunk["number"][0]) for chunk in chunks)


@pytest.mark.cluster
@pytest.mark.parametrize(("times", "how"), [(1, "killed"), (3, "an error")])
def test_a_replica_that_dies_a_few_times_is_replaced(ray_cluster, tmp_path, times, how):
    configure()
    assert found(dying(tmp_path, times, how)) == list(range(12))
    assert len([*tmp_path.iterdir()]) == times


@pytest.mark.cluster
def test_a_replica_that_always_dies_ends_the_run_with_the_reason(ray_cluster, tmp_path):
    configure()
    with pytest.raises(UserError, match=r"be loaded on any node: \d replicas .* \(CUDA error: device-side assert"):
        found(dying(tmp_path, 1000, "an error"))
    assert MOST_DEATHS <= len([*tmp_path.iterdir()]) <= MOST_DEATHS + 2, "Ray may start one before it misses another"


@pytest.mark.cluster
def test_a_cluster_that_has_no_room_for_long_is_waited_for(ray_cluster):
    """Ray's 30 minutes are compressed into 4 seconds, and the hour without room into 12."""

    @ray.remote(num_cpus=4)
    class Others:
        def ready(self) -> None: ...

    def wait_for_room(timeout: float | None) -> list[int]:
        pool = pool_of_replicas(1, "cpu")  # waits for room itself, so the others come after it
        others = Others.remote()
        ray.get(others.ready.remote())
        release = threading.Timer(12, ray.kill, [others])
        release.start()
        try:
            configure()
            if timeout is not None:
                DataContext.get_current().execution_no_progress_timeout_s = timeout
            return found(lambda _threads: lambda chunk: chunk, 3, pool)
        finally:
            release.cancel()
            ray.kill(others)

    begun = time.monotonic()
    assert wait_for_room(None) == [0, 1, 2]
    assert time.monotonic() - begun > 11
    with pytest.raises((RayError, Exception), match="made no progress"):
        wait_for_room(4)


ON_ONE_NODE = """
import os, sys, time
import numpy as np
import ray
from unet_ray.ray_backend.data_context import configure
from unet_ray.ray_backend.inference import pool_of_replicas, run_on_cluster

ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
configure()
bad = max(node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU"))

deaths = sys.argv[2]

def model(threads):
    if ray.get_runtime_context().get_node_id() == bad:
        open(f"{deaths}/{os.getpid()}", "w").close()
        os._exit(1)
    def stage(chunk):
        time.sleep(1)
        last = int(chunk["number"][0]) == 44
        end = time.monotonic() + 120
        while last and len(os.listdir(deaths)) < 4 and time.monotonic() < end:
            time.sleep(0.5)  # on a slow machine the other node could do all chunks before four have died
        time.sleep(9 * last)
        return {**chunk, "node": np.array([ray.get_runtime_context().get_node_id()])}
    return stage

preprocess = lambda number: {"number": np.array([number])}
pool = pool_of_replicas(2, "cpu")
chunks = list(run_on_cluster(range(45), preprocess, model, lambda chunk: chunk, pool=pool))
assert sorted(int(chunk["number"][0]) for chunk in chunks) == list(range(45))
assert bad not in {str(chunk["node"][0]) for chunk in chunks}
"""


@pytest.mark.cluster
def test_a_node_on_which_replicas_always_die_is_named_and_the_job_goes_on(machines, tmp_path):
    machines.complete()
    command = [sys.executable, "-c", ON_ONE_NODE, machines.address, str(tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"4 replicas of the model died on {NETWORK}." in done.stderr
    assert done.stderr.count("this node is left out, the others go on") == 1
