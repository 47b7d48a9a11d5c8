"""Clusters of several nodes, each a `ray start` on this machine: nodes that die and come, dead heads, autoscaling."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pyarrow.parquet as pq
import pytest
import torch
from conftest import SLOW, TINY, Machines, environment, epochs_done, make_discs, make_model, make_photos, recorded
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from unet_ray.ray_backend import nodes
from unet_ray.ray_backend.inference import A_TASK_BESIDE_A_MODEL
from unet_ray.ray_backend.session import LOCAL
from unet_ray.settings import load_train_config
from unet_ray.training.run import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Slow enough to be caught at work."""
    settings = [("model.base_channels", 16), ("model.depth", 4), ("data.image_size", 128)]
    return make_model(tmp_path_factory.mktemp("model"), *settings)


def working(machine: psutil.Process, kind: str) -> list[psutil.Process]:
    """The processes below a machine's raylet that are at such work."""
    try:
        return [p for p in machine.children(recursive=True) if kind in "".join(p.cmdline()[:1])]
    except psutil.Error:
        return []


def until(condition, process: subprocess.Popen | None = None, seconds: float = 200):
    """Waits for what `condition` returns, as long as the process runs."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert process is None or process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.05)
    return found


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("sizes", [(1,), (2,), (3,), (7, 2), (8,), (15,), (16, 4), (24, 2), (56,), (64, 16), (192,)])
def test_copies_of_a_model_never_fill_a_node(monkeypatch, sizes):
    there = [{"Alive": True, "Resources": {"CPU": float(cpus)}} for cpus in sizes]
    monkeypatch.setattr(nodes, "alive", lambda: there)
    default, copies = nodes.models_on_cpus()
    assert copies == sum(cpus // default for cpus in sizes)
    for each in range(1, max(sizes) + 1):
        held = nodes.cpus_of_a_model(each)
        left = {}
        for cpus in sizes:
            fit = int(cpus / held)
            assert fit == cpus // each, "as many as have a share of their own"
            left[cpus] = cpus - fit * held
        # Where --workers makes the shares small, the smallest nodes may be left to the models.
        assert min(left.values()) > 0
        assert (min(left.values()) if each == default else left[max(sizes)]) >= A_TASK_BESIDE_A_MODEL


AS_MANY_GPUS_AS_CPUS = """
import sys
import numpy as np
import ray
from unet_ray.ray_backend.data_context import configure
from unet_ray.ray_backend.inference import run_on_cluster

ray.init(
    address="local", num_cpus=1, num_gpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
    object_store_memory=200 * 2**20, _temp_dir=sys.argv[1], _node_ip_address="127.0.0.1",
)
configure()
before = lambda number: {"number": np.array([number])}
model = lambda device, threads, copies: lambda chunk: {"number": chunk["number"], "device": np.array([device])}
made = run_on_cluster(range(20), before, model, lambda chunk: chunk, workers=0, device="auto", shared={})
assert sorted((int(chunk["number"][0]), str(chunk["device"][0])) for chunk in made) == [(n, "cuda") for n in range(20)]
"""


def test_models_on_gpus_leave_the_cpus_to_the_images():
    with tempfile.TemporaryDirectory(prefix="ur-", ignore_cleanup_errors=True) as temporary:
        command = [sys.executable, "-c", AS_MANY_GPUS_AS_CPUS, temporary]
        subprocess.run(command, env=environment(), check=True, timeout=200)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use a GPU here")
def test_a_gpu_that_torch_cannot_use_is_one_line(model, tmp_path):
    images, masks = make_discs(tmp_path / "discs", 6)
    tiny = [part for name, value in TINY for part in ("--set", f"{name}={value}")]
    with Machines() as cluster:
        cluster.head(2, "--num-gpus=1")
        for arguments in (
            ("predict", model, images, "--out", tmp_path / "out"),
            ("train", "--images", images, "--masks", masks, "--out", tmp_path / "run", *tiny),
        ):
            process = cluster.command(*arguments)
            output = process.communicate(timeout=200)[0]
            assert process.returncode == 2 and "Error: torch can't use the GPU of " in output, output[-3000:]
            assert "--device cpu" in output and "Traceback" not in output


def test_an_autoscaler_that_has_just_begun_is_waited_for(monkeypatch):
    monkeypatch.setattr(nodes, "STEP_SECONDS", 0.01)
    monkeypatch.setattr("ray._private.worker._global_node", SimpleNamespace(is_head=lambda: False))
    for kind, grows in (("worker", True), ("node_0123", False)):
        reports = iter([{}, {"active_nodes": {}}, {"active_nodes": {kind: 1}}])
        monkeypatch.setattr(nodes, "_report_of_v1", lambda reports=reports: next(reports))
        assert nodes.may_grow() is grows


@pytest.fixture(scope="module")
def machines():
    """A head that runs nothing and two nodes of two CPUs."""
    with Machines() as cluster:
        cluster.head(0)
        for _ in range(2):
            cluster.node(2)
        yield cluster


def test_training_goes_on_with_the_node_that_is_left(machines, tmp_path):
    images, masks = make_discs(tmp_path / "discs", 21, size=128)
    same = [*SLOW, ("data.images", str(images)), ("data.masks", str(masks))]
    train(load_train_config(settings=same), str(tmp_path / "undisturbed"), runtime=LOCAL)
    run = tmp_path / "run"
    settings = [*same, ("compute.cpus_per_worker", 2), ("compute.workers", [1, 2])]
    process = machines.command(
        "train", "--out", run, *(part for name, value in settings for part in ("--set", f"{name}={value}"))
    )
    until(lambda: epochs_done(run) >= 2, process)
    machines.kill(next(m for m in machines.running[1:] if working(m, "RayTrainWorker")))
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output[-3000:]
    assert output.count("lost a worker") == 1, output
    workers = [line["workers"] for line in lines(run)]
    assert workers[0] == 2 and workers[-1] == 1, workers
    for ours, theirs in zip(lines(run), lines(tmp_path / "undisturbed"), strict=True):
        for name in ("epoch", "val_pixels", "train_loss", "val_loss"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-3), (ours["epoch"], name)


def test_a_folder_that_only_one_node_sees_is_refused(machines, model, tmp_path):
    local = tmp_path / "local"
    local.mkdir()
    if subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode:
        pytest.skip("only root can give a node a disk of its own")
    alone = machines.node(2, own_folder=local)
    images, masks = make_discs(tmp_path / "discs", 6)
    tiny = [part for name, value in TINY for part in ("--set", f"{name}={value}")]
    for arguments, named in (
        (("train", "--images", images, "--masks", masks, "--out", local / "run", *tiny), f"--out {local / 'run'}"),
        (("predict", model, images, "--out", local / "out"), f"--out {local / 'out'}"),
    ):
        process = machines.command(*arguments)
        output = process.communicate(timeout=200)[0]
        assert process.returncode == 2, output[-3000:]
        assert f"Error: {named}: the node 127.0.0." in output and f"does not see {local}" in output
        assert "use a folder that all nodes share" in output
    assert not list((local / "run").iterdir())  # nothing of it is in the way of another try
    machines.kill(alone)


def test_a_prediction_loses_a_node_gets_one_and_outlives_its_cluster(machines, model, tmp_path):
    while len(machines.running) < 3:  # the head and two
        machines.node(2)
    folder, out = make_photos(tmp_path / "images", 1000), tmp_path / "out"
    arguments = ("predict", model, folder, "--out", out, "--precision", "fp32")
    process = machines.command(*arguments)
    until(lambda: len(recorded(out)) > 60, process)
    machines.kill(next(m for m in machines.running[1:] if working(m, "_ModelActor")))
    left = len(recorded(out))
    until(lambda: len(recorded(out)) > left + 60, process)  # models do not fill the one that is left
    added = machines.node(2)
    until(lambda: working(added, "ray::MapBatches") or working(added, "_ModelActor"), process)
    machines.kill(machines.running[0])
    process.kill()  # a job's command runs on the head
    process.communicate()
    for machine in [*machines.running]:
        machines.kill(machine)
    before = recorded(out)
    assert 60 < len(before) < 1000
    with Machines() as second:
        second.head(0)
        second.node(2)
        process = second.command(*arguments, "--json")
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output[-3000:]
    summary = json.loads(output[output.index("{") :])
    assert (summary["images"], summary["ok"], summary["already_done"]) == (1000, 1000, len(before))
    rows = pq.read_table(out / "manifest.parquet").to_pylist()
    assert len({row["path"] for row in rows}) == len(rows) == 1000
    assert before.items() <= recorded(out).items(), "what was done stays as it was"


def autoscaling(address: str, idle_minutes: float) -> dict:
    """What `ray start --autoscaling-config` takes: up to two nodes of three CPUs, which Ray starts on this machine."""
    commands = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")
    starts = ("head_start_ray_commands", "worker_start_ray_commands")
    files = ("cluster_synced_files", "rsync_exclude", "rsync_filter")
    worker = {"resources": {"CPU": 3, "object_store_memory": 150 * 2**20}, "node_config": {}}
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
    """How many nodes with CPUs the cluster has."""
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


def test_an_autoscaling_cluster_grows_for_a_prediction_and_shrinks_after_it(tmp_path):
    settings = [("model.base_channels", 32), ("model.depth", 4), ("data.image_size", 256)]
    model = make_model(tmp_path / "model", *settings)
    folder, out = make_photos(tmp_path / "images", 260), tmp_path / "out"
    variables = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",  # as KubeRay's
        "RAY_NODE_TYPE_NAME": "ray.head.default",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        # Ray starts the nodes by itself, and with this one keeps them on 127.0.0.1.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
    with Machines(**variables) as cluster:
        config = tmp_path / "autoscaling.json"
        config.write_text(json.dumps(autoscaling(cluster.address, 0.2)))
        head = cluster.head(0, f"--autoscaling-config={config}")
        assert nodes_of(cluster.address) == 0
        arguments = ("predict", model, folder, "--out", out, "--precision", "fp32", "--device", "cpu")
        process = cluster.command(*arguments)

        def raylets_with_models() -> int:
            return sum(bool(working(raylet, "_ModelActor")) for raylet in working(head, "raylet/raylet"))

        until(lambda: raylets_with_models() == 2, process)
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output[-3000:]
        assert "autoscaler" not in output, output
        assert pq.read_table(out / "manifest.parquet").num_rows == 260
        # What no node could ever hold is said within a minute; meanwhile those that are idle go.
        images, masks = make_discs(tmp_path / "discs", 6)
        begun = time.monotonic()
        process = cluster.command(
            *("train", "--images", images, "--masks", masks, "--out", tmp_path / "run", "--device", "cpu"),
            *("--workers", 2, "--set", "compute.cpus_per_worker=8"),
            *(part for name, value in TINY for part in ("--set", f"{name}={value}")),
        )
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 2, output[-3000:]
        assert "no node that would do is being started" in output
        assert time.monotonic() - begun < 60 + 30  # a command's start included
        until(lambda: not nodes_of(cluster.address))
