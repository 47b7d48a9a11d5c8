"""The private names of Ray that `internals` uses still exist in the installed Ray. Needs no running Ray."""

import ast
import importlib.util
import inspect
import mmap
import re
from pathlib import Path

import pytest

import unet_ray
from unet_ray.ray_backend import internals

RAY = Path(importlib.util.find_spec("ray").origin).parent
PACKAGE = Path(unet_ray.__file__).parent


def source(path: str) -> str:
    return (RAY / path).read_text()


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("data/_internal/cluster_autoscaler/rate_based_cluster_autoscaler.py", internals.DATA_SCALING_VARIABLES),
        ("train/v2/_internal/constants.py", [internals.TRAIN_PRINT_VARIABLE, internals.TRAIN_PREEMPTION_VARIABLE]),
    ],
)
def test_ray_reads_the_environment_variables(path, names):
    assert all(f'"{name}"' in source(path) for name in names)
    assert set(names) <= set(internals.ENVIRONMENT)


def in_binary(path: str, text: str) -> bool:
    with (RAY / path).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return data.find(text.encode()) >= 0


def test_rays_core_has_the_settings_of_c_plus_plus():
    assert in_binary("_raylet.so", internals.BACKEND_LOG_VARIABLE)
    assert all(in_binary("core/src/ray/raylet/raylet", name) for name in internals.SYSTEM_CONFIG)


def test_ray_init_takes_the_options_of_an_own_ray():
    worker = source("_private/worker.py")
    assert all(f'kwargs.pop("{name}"' in worker for name in internals.own_ray_options("folder"))


def test_ray_finds_and_asks_a_head_keeps_a_token_and_knows_the_memory(monkeypatch):
    from ray._private import services

    monkeypatch.setattr(services, "find_gcs_addresses", set)
    monkeypatch.setattr(services, "find_bootstrap_address", lambda _folder: "10.0.0.1:6379")
    assert internals.running_here() == "10.0.0.1:6379"
    assert hasattr(internals._core(), "GcsClient")
    assert in_binary("_raylet.so", internals.TOKEN_MODE_VARIABLE) and in_binary("_raylet.so", internals.TOKEN_VARIABLE)
    internals.read_token_variables()
    assert internals.memory_of_machine() > 2**28


def test_ray_data_looks_for_finished_tasks_at_an_interval():
    path = "data/_internal/execution/streaming_executor_state.py"
    assert re.search(r"^WAIT_FOR_TASK_COMPLETION_TIMEOUT_S = 0\.1$", source(path), re.MULTILINE)
    assert "timeout=WAIT_FOR_TASK_COMPLETION_TIMEOUT_S" in source(path)


def test_ray_data_maps_blocks_without_checking_the_batch_size():
    tree = ast.parse(source("data/dataset.py"))
    dataset = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Dataset")
    method = next(n for n in dataset.body if isinstance(n, ast.FunctionDef) and n.name == "map_batches_internal")
    keywords = {argument.arg for argument in method.args.kwonlyargs}
    assert {"batch_size", "batch_format", "compute", "fn_constructor_kwargs", "num_cpus", "num_gpus"} <= keywords
    assert "runtime_env" in keywords


def test_autoscalers_can_be_asked():
    from ray.autoscaler.v2.schema import ClusterStatus, LaunchRequest, NodeInfo
    from ray.autoscaler.v2.sdk import get_cluster_status
    from ray.experimental.internal_kv import _internal_kv_get

    assert next(iter(inspect.signature(_internal_kv_get).parameters)) == "key"
    assert 'DEBUG_AUTOSCALING_STATUS = "__autoscaling_status"' in source("_private/ray_constants.py")
    assert '"autoscaler_report"' in source("autoscaler/_private/monitor.py")
    assert next(iter(inspect.signature(get_cluster_status).parameters)) == "gcs_address"
    fields = {"active_nodes", "idle_nodes", "pending_launches", "pending_nodes"}
    assert fields <= set(ClusterStatus.__dataclass_fields__)
    assert "count" in LaunchRequest.__dataclass_fields__
    assert "ray_node_type_name" in NodeInfo.__dataclass_fields__


PRIVATE = re.compile(
    r"ray(\.\w+)*\._(private|internal)|_logical_plan|_internal_kv|_global_node|_base_exc|autoscaler\.v2|\"RAY_\w+\""
)
PUBLIC = {'"RAY_ADDRESS"'}


def test_only_internals_names_what_is_private():
    found = {
        (path.relative_to(PACKAGE).as_posix(), match.group())
        for path in PACKAGE.rglob("*.py")
        for match in PRIVATE.finditer(path.read_text())
        if match.group() not in PUBLIC
    }
    assert {name for name, _ in found} == {"ray_backend/internals.py"}, found
