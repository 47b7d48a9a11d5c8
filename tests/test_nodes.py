"""Clusters of several nodes, each a `ray start` on this machine: nodes are lost and added, heads die, clusters grow."""

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from conftest import (
    NETWORK,
    TINY,
    Machines,
    environment,
    flags,
    make_discs,
    make_model,
    make_photos,
    processes_at_work,
    recorded,
    until,
)
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from unet_ray.ray_backend import autoscaling, internals, nodes
from unet_ray.ray_backend.inference import TASK_CPUS_BESIDE_A_MODEL


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Returns a model that is slow enough for a test to interrupt it."""
    settings = [("model.base_channels", 16), ("model.depth", 4), ("data.image_size", 128)]
    return make_model(tmp_path_factory.mktemp("model"), *settings)


@pytest.mark.parametrize("sizes", [(1,), (2,), (3,), (7, 2), (8,), (15,), (16, 4), (24, 2), (56,), (64, 16), (192,)])
def test_replicas_of_a_model_never_fill_a_node(monkeypatch, sizes):
    there = [{"NodeID": str(place), "Resources": {"CPU": float(cpus)}} for place, cpus in enumerate(sizes)]
    monkeypatch.setattr(nodes, "alive", lambda: there)
    default, replicas = nodes.replicas_on_cpus()
    assert replicas == sum(cpus // default for cpus in sizes)
    for threads in range(1, max(sizes) + 1):
        reserved = nodes.cpus_reserved_by_replica(threads)
        left = {}
        for cpus in sizes:
            fitting = int(cpus / reserved)
            assert fitting == cpus // threads, "as many as have all their CPUs"
            left[cpus] = cpus - fitting * reserved
        # With --workers, replicas may be so small that they leave the smallest nodes less than a task reserves.
        assert min(left.values()) > 0
        assert (min(left.values()) if threads == default else left[max(sizes)]) >= TASK_CPUS_BESIDE_A_MODEL


@pytest.mark.parametrize("busy", range(9))
def test_what_others_hold_is_left_to_them(monkeypatch, busy):
    monkeypatch.setattr(nodes, "alive", lambda: [{"NodeID": "a", "Resources": {"CPU": 8.0, "memory": 1.0}}])
    monkeypatch.setattr(nodes, "LOOK_SECONDS", 0.0)
    # Ray leaves out a resource of which nothing is free.
    free = {"a": {"CPU": 8.0 - busy, "memory": 1.0} if busy < 8 else {"memory": 1.0}}
    monkeypatch.setattr(internals, "available_resources", lambda: free)
    nodes.look()
    assert (nodes.room({"CPU": 1.0}), nodes.total("CPU"), nodes.held("CPU")) == (8 - busy, 8.0 - busy, busy)
    assert nodes.room_without_others({"CPU": 1.0}) == 8
    if busy < 8:
        threads, replicas = nodes.replicas_on_cpus()
        assert (threads, replicas) == (8 - busy, 1)
        assert nodes.cpus_reserved_by_replica(threads) + 2 * TASK_CPUS_BESIDE_A_MODEL <= 8 - busy
    free["a"] = {"CPU": 8.0}
    nodes.look()
    assert nodes.room({"CPU": 1.0}) == 8


AS_MANY_GPUS_AS_CPUS = """
import sys
import numpy as np
import ray
from unet_ray.ray_backend.data_context import configure
from unet_ray.ray_backend.inference import pool_of_replicas, run_on_cluster

ray.init(
    address="local", num_cpus=1, num_gpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
    object_store_memory=200 * 2**20, _temp_dir=sys.argv[1], _node_ip_address="127.0.0.1",
)
configure()
preprocess = lambda number: {"number": np.array([number])}
pool = pool_of_replicas(0, "auto")
model = lambda threads: lambda chunk: {"number": chunk["number"], "device": np.array([pool.device])}
chunks = run_on_cluster(range(20), preprocess, model, lambda chunk: chunk, pool=pool)
found = sorted((int(chunk["number"][0]), str(chunk["device"][0])) for chunk in chunks)
assert found == [(number, "cuda") for number in range(20)], found
"""


@pytest.mark.cluster
def test_models_on_gpus_leave_the_cpus_to_the_images():
    with tempfile.TemporaryDirectory(prefix="ur-", ignore_cleanup_errors=True) as temporary:
        command = [sys.executable, "-c", AS_MANY_GPUS_AS_CPUS, temporary]
        subprocess.run(command, env=environment(), check=True, timeout=200)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use a GPU here")
@pytest.mark.cluster
def test_a_gpu_that_torch_cannot_use_is_one_line(machines, model, tmp_path):
    images, masks = make_discs(tmp_path / "discs", 6)
    machines.complete()
    with machines.joined(2, gpus=1):
        for arguments in (
            ("predict", model, images, "--out", tmp_path / "out"),
            ("train", "--images", images, "--masks", masks, "--out", tmp_path / "run", *flags(TINY)),
        ):
            process = machines.command(*arguments)
            output = process.communicate(timeout=200)[0]
            assert process.returncode == 2 and "Error: torch can't use the GPU of " in output, output[-3000:]
            assert "--device cpu" in output and "Traceback" not in output


WITHOUT_OPENVINO = """
import importlib.metadata, sys
version, sys.modules["openvino"] = importlib.metadata.version, None
def hidden(name):
    if name == "openvino":
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = hidden
"""


@pytest.mark.cluster
def test_where_one_node_has_no_openvino_all_use_torch(machines, model, tmp_path):
    pytest.importorskip("openvino")
    photos, out = make_photos(tmp_path / "photos", 30), tmp_path / "out"
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_OPENVINO)
    machines.complete()

    def answer(*options: str) -> tuple[str, int]:
        process = machines.command("predict", model, photos, "--out", out, *options)
        return process.communicate(timeout=200)[0], process.returncode

    with machines.joined(2, start_up=tmp_path):
        output, code = answer("--backend", "openvino")
        assert code == 2 and "has no OpenVINO: pip install 'unet_ray[cpu]'" in output and "Traceback" not in output
        output, code = answer()
        assert code == 0 and re.search(r"torch in (fp32|bf16) on CPUs is used instead", output), output
    [used] = json.loads((out / "settings.json").read_text())["arithmetic"]
    assert used["backend"] == "torch"


def test_an_autoscaler_that_has_just_started_is_waited_for(monkeypatch):
    monkeypatch.setattr(autoscaling, "STEP_SECONDS", 0.01)
    for kind, grows in (("worker", True), ("node_0123", False)):
        reports = iter([{}, {"active_nodes": {}}, {"active_nodes": {kind: 1}}])
        monkeypatch.setattr(internals, "autoscaler_report", lambda reports=reports: next(reports))
        assert autoscaling.may_grow() is grows


@pytest.mark.cluster
def test_a_folder_that_only_one_node_sees_is_refused(machines, model, tmp_path):
    local = tmp_path / "local"
    local.mkdir()
    if subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode:
        pytest.skip("only root can give a node a disk of its own")
    machines.complete()
    with machines.joined(2, own_folder=local):
        images, masks = make_discs(tmp_path / "discs", 6)
        for arguments, named in (
            (
                ("train", "--images", images, "--masks", masks, "--out", local / "run", *flags(TINY)),
                f"--out {local / 'run'}",
            ),
            (("predict", model, images, "--out", local / "out"), f"--out {local / 'out'}"),
        ):
            process = machines.command(*arguments)
            output = process.communicate(timeout=200)[0]
            assert process.returncode == 2, output[-3000:]
            assert f"Error: {named}: the node {NETWORK}." in output and f"does not see {local}" in output
            assert "use a folder that all nodes share" in output
        assert not list((local / "run").iterdir())  # nothing blocks another attempt


@pytest.mark.cluster
def test_a_prediction_loses_a_node_gains_one_and_outlives_its_cluster(machines, model, tmp_path):
    machines.complete()
    folder, out = make_photos(tmp_path / "images", (count := 1200)), tmp_path / "out"
    arguments = ("predict", model, folder, "--out", out, "--precision", "fp32")
    process = machines.command(*arguments)
    until(lambda: len(recorded(out)) > 60, process)
    machines.kill(next(iter(machines.working("_ModelActor"))))
    left = len(recorded(out))
    until(lambda: len(recorded(out)) > left + 60, process)  # replicas leave room on the node that is left
    machines.hold("_ModelActor")  # else fast cores end the prediction before a node has joined
    added = machines.node(2)
    until(lambda: added in machines.working("ray::MapBatches") | machines.working("_ModelActor"), process)
    machines.kill(machines.running[0])
    process.kill()  # like the head's own processes: a job's command runs there
    process.communicate()
    machines.kill_all()
    before = recorded(out)
    assert 60 < len(before) < count
    machines.complete()  # another cluster
    process = machines.command(*arguments, "--json")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output[-3000:]
    summary = json.loads(output[output.index("{") :])
    assert (summary["images"], summary["ok"], summary["already_done"]) == (count, count, len(before))
    rows = pq.read_table(out / "manifest.parquet").to_pylist()
    assert len({row["path"] for row in rows}) == len(rows) == count
    assert before.items() <= recorded(out).items(), "finished masks are not written again"


def autoscaling_config(address: str, idle_minutes: float) -> dict:
    """Returns a config for `ray start --autoscaling-config`: up to two nodes of two CPUs, started on this machine."""
    commands = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")
    starts = ("head_start_ray_commands", "worker_start_ray_commands")
    files = ("cluster_synced_files", "rsync_exclude", "rsync_filter")
    worker = {"resources": {"CPU": 2, "object_store_memory": 150 * 2**20}, "node_config": {}}
    return {
        "cluster_name": "fake",
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": address,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
        },
        "max_workers": 2,
        "upscaling_speed": 10.0,
        "idle_timeout_minutes": idle_minutes,
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {**worker, "min_workers": 0, "max_workers": 2},
        },
        **{"auth": {}, "docker": {}, "file_mounts": {}, "file_mounts_sync_continuously": False},
        **{name: [] for name in (*commands, *starts, *files)},
    }


def nodes_of(address: str) -> int:
    """Returns how many nodes with CPUs the cluster has."""
    alive = "sum(node['Alive'] and 'CPU' in node['Resources'] for node in ray.nodes())"
    code = f"import ray; ray.init(logging_level='ERROR', log_to_driver=False); print({alive})"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(RAY_ADDRESS=address),
        capture_output=True,
        text=True,
        check=True,
    )
    return int(ran.stdout.split()[-1])


@pytest.mark.cluster
def test_an_autoscaling_cluster_grows_for_a_prediction_and_shrinks_after_it(tmp_path):
    settings = [("model.base_channels", 32), ("model.depth", 4), ("data.image_size", 256)]
    model = make_model(tmp_path / "model", *settings)
    folder, out = make_photos(tmp_path / "images", 1000), tmp_path / "out"
    images, masks = make_discs(tmp_path / "discs", 6)
    variables = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",  # as in KubeRay
        "RAY_NODE_TYPE_NAME": "ray.head.default",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        # Ray starts the nodes itself; this keeps them on 127.0.0.1.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
    with Machines(**variables) as cluster:
        config = tmp_path / "autoscaling.json"
        config.write_text(json.dumps(autoscaling_config(cluster.address, 0.2)))
        head = cluster.head(0, f"--autoscaling-config={config}")
        assert nodes_of(cluster.address) == 0
        arguments = ("predict", model, folder, "--out", out, "--precision", "fp32", "--device", "cpu")
        process = cluster.command(*arguments)

        def raylets_with_models() -> int:
            return sum(
                bool(processes_at_work(raylet, "_ModelActor")) for raylet in processes_at_work(head, "raylet/raylet")
            )

        until(lambda: raylets_with_models() == 2, process, seconds=400)
        # A request that no node can meet is refused within a minute, while others work.
        begun = time.monotonic()
        refused = cluster.command(
            *("train", "--images", images, "--masks", masks, "--out", tmp_path / "run", "--device", "cpu"),
            *("--workers", 2, "--set", "compute.cpus_per_worker=8"),
            *flags(TINY),
        )
        process.terminate()  # not SIGINT, which a shell's background job ignores
        output = process.communicate(timeout=60)[0]
        assert process.returncode == 130, output[-3000:]
        assert "autoscaler" not in output, output
        output = refused.communicate(timeout=300)[0]
        assert refused.returncode == 2, output[-3000:]
        assert "no node that would do is being started" in output
        assert time.monotonic() - begun < 60 + 60  # to start the command, where cores are few
        until(lambda: not nodes_of(cluster.address))  # idle nodes are removed
