"""The files of cluster/: Ray's own readers accept each and refuse each planted mistake, and no key is unknown."""

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "cluster"
LAUNCHER = ["aws.yaml", "gcp.yaml", "on-premises.yaml"]
KUBERAY = ["kuberay-raycluster.yaml", "kuberay-rayjob-predict.yaml", "kuberay-rayjob-train.yaml"]


def strict(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def one_of(*values: str) -> dict[str, Any]:
    return {"enum": list(values)}


def listed(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": 1}


# The part of KubeRay's ray.io/v1 (CRDs of v1.7) and of Kubernetes' pods that these files use. Other fields are errors.
TEXT, COUNT, YES_OR_NO = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
QUANTITY = {"type": "string", "pattern": r"^\d+(\.\d+)?(m|Ki|Mi|Gi|Ti)?$"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
RESOURCES = strict({name: {"type": "object", "additionalProperties": QUANTITY} for name in ("requests", "limits")})
METADATA = strict({"name": {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}, "namespace": TEXT}, "name")
CONTAINER = strict(
    {
        "name": TEXT,
        "image": TEXT,
        "imagePullPolicy": one_of("Always", "IfNotPresent", "Never"),
        "env": listed(strict({"name": TEXT, "value": TEXT}, "name")),
        "securityContext": strict(
            {"allowPrivilegeEscalation": YES_OR_NO, "capabilities": strict({"drop": listed(TEXT)})}
        ),
        "ports": listed(strict({"name": TEXT, "containerPort": COUNT}, "containerPort")),
        "resources": RESOURCES,
        "volumeMounts": listed(strict({"name": TEXT, "mountPath": TEXT}, "name", "mountPath")),
    },
    "name",
    "image",
    "resources",
)
POD = strict(
    {
        "nodeSelector": TEXTS,
        "tolerations": listed(strict({"key": TEXT, "operator": one_of("Exists", "Equal"), "effect": TEXT})),
        "serviceAccountName": TEXT,
        "securityContext": strict(
            {
                "runAsNonRoot": YES_OR_NO,
                "runAsUser": COUNT,
                "runAsGroup": COUNT,
                "fsGroup": COUNT,
                "seccompProfile": strict({"type": one_of("RuntimeDefault")}),
            }
        ),
        "terminationGracePeriodSeconds": COUNT,
        "containers": listed(CONTAINER),
        "volumes": listed(
            strict(
                {
                    "name": TEXT,
                    "persistentVolumeClaim": strict({"claimName": TEXT}, "claimName"),
                    "emptyDir": strict({"medium": one_of("Memory"), "sizeLimit": QUANTITY}),
                },
                "name",
            )
        ),
    },
    "containers",
)
TEMPLATE = strict({"spec": POD}, "spec")
RAY_CLUSTER = strict(
    {
        "rayVersion": TEXT,
        "authOptions": strict({"mode": one_of("token", "disabled")}, "mode"),
        "enableInTreeAutoscaling": YES_OR_NO,
        "autoscalerOptions": strict(
            {"version": one_of("v1", "v2"), "idleTimeoutSeconds": COUNT, "resources": RESOURCES}
        ),
        "headGroupSpec": strict({"rayStartParams": TEXTS, "template": TEMPLATE}, "rayStartParams", "template"),
        "workerGroupSpecs": listed(
            strict(
                {
                    "groupName": TEXT,
                    "replicas": COUNT,
                    "minReplicas": COUNT,
                    "maxReplicas": COUNT,
                    "rayStartParams": TEXTS,
                    "template": TEMPLATE,
                },
                "groupName",
                "minReplicas",
                "maxReplicas",
                "template",
            )
        ),
    },
    "rayVersion",
    "headGroupSpec",
)
RAY_JOB = strict(
    {
        "entrypoint": TEXT,
        "backoffLimit": COUNT,
        "submissionMode": one_of("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"),
        "submitterConfig": strict({"backoffLimit": COUNT}),
        "shutdownAfterJobFinishes": YES_OR_NO,
        "ttlSecondsAfterFinished": COUNT,
        "preRunningDeadlineSeconds": COUNT,
        "activeDeadlineSeconds": COUNT,
        "rayClusterSpec": RAY_CLUSTER,
    },
    "entrypoint",
    "rayClusterSpec",
)
CLAIM = strict(
    {
        "accessModes": listed(one_of("ReadWriteMany")),
        "storageClassName": TEXT,
        "resources": strict({"requests": strict({"storage": QUANTITY}, "storage")}, "requests"),
    },
    "accessModes",
    "resources",
)
KINDS = {
    ("ray.io/v1", "RayCluster"): RAY_CLUSTER,
    ("ray.io/v1", "RayJob"): RAY_JOB,
    ("v1", "PersistentVolumeClaim"): CLAIM,
}


def check_manifest(documents: list[dict[str, Any]]) -> None:
    for document in documents:
        spec = KINDS[document["apiVersion"], document["kind"]]
        jsonschema.validate(
            document,
            strict({"apiVersion": TEXT, "kind": TEXT, "metadata": METADATA, "spec": spec}, "metadata", "spec"),
        )


def check_launcher(config: dict[str, Any]) -> None:
    """Ray's own checks, and checks for unknown keys, which Ray ignores."""
    schema = json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text())
    assert not set(config) - set(schema["properties"]), "keys that Ray does not know"
    validate_config(prepare_config(copy.deepcopy(config)))
    kinds = config.get("available_node_types", {})
    assert not kinds or config["head_node_type"] in kinds
    assert not set(config["provider"]) - set(schema["properties"]["provider"]["properties"])
    for kind in kinds.values():
        assert not set(kind["node_config"]) - NODE_KEYS[config["provider"]["type"]], "unknown keys of a machine"


NODE_KEYS = {
    # Of EC2's RunInstances and of Compute Engine's instances.insert.
    "aws": {"InstanceType", "InstanceMarketOptions", "BlockDeviceMappings", "IamInstanceProfile", "ImageId"},
    "gcp": {"machineType", "disks", "metadata", "scheduling", "serviceAccounts"},
}


def read(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


def check(name: str, documents: list[dict[str, Any]]) -> None:
    if name in LAUNCHER:
        (config,) = documents
        check_launcher(config)
    else:
        check_manifest(documents)


def test_every_file_is_checked():
    assert sorted(path.name for path in CLUSTER.glob("*.yaml")) == sorted(LAUNCHER + KUBERAY)


@pytest.mark.parametrize("name", LAUNCHER + KUBERAY)
def test_each_file_passes_its_readers_checks(name):
    check(name, read(name))


def mappings(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from mappings(inner)


def cluster_of(document: dict[str, Any]) -> dict[str, Any]:
    """Returns the RayCluster of a manifest, as KubeRay makes it of a RayJob."""
    spec = document["spec"]
    metadata = {"name": document["metadata"]["name"], "namespace": "default"}
    return {"metadata": metadata, "spec": spec.get("rayClusterSpec", spec)}


@pytest.mark.parametrize("name", KUBERAY)
def test_rays_autoscaler_reads_the_groups_of_a_manifest(name):
    config = _derive_autoscaling_config_from_ray_cr(cluster_of(read(name)[-1]))
    groups = config["available_node_types"]
    assert {group: (found["min_workers"], found["max_workers"]) for group, found in groups.items()} == {
        "headgroup": (0, 0),
        "gpu": (0, 8),
        "cpu": (0, 4),
    }
    resources = {
        group: (found["resources"]["CPU"], found["resources"].get("GPU", 0)) for group, found in groups.items()
    }
    assert resources == {"headgroup": (0, 0), "gpu": (7, 1), "cpu": (15, 0)}
    assert config["idle_timeout_minutes"] == 5


def renamed(mapping: dict[str, Any], old: str, new: str) -> None:
    mapping[new] = mapping.pop(old)


@pytest.mark.parametrize("name", KUBERAY)
@pytest.mark.parametrize(
    "slip",
    [
        lambda spec: renamed(spec, "headGroupSpec", "headGroup"),
        lambda spec: renamed(spec, "workerGroupSpecs", "workerGroupSpec"),
        lambda spec: renamed(spec["workerGroupSpecs"][0], "groupName", "name"),
        lambda spec: renamed(spec["workerGroupSpecs"][0], "minReplicas", "minReplica"),
        lambda spec: renamed(spec["workerGroupSpecs"][0], "maxReplicas", "maxReplica"),
        lambda spec: renamed(spec["workerGroupSpecs"][0], "template", "pod"),
        lambda spec: renamed(spec["workerGroupSpecs"][0]["template"]["spec"], "containers", "container"),
        lambda spec: renamed(spec["workerGroupSpecs"][0]["template"]["spec"]["containers"][0], "resources", "resource"),
        lambda spec: spec["workerGroupSpecs"][0].update(maxReplicas="many"),
        lambda spec: spec["autoscalerOptions"].update(idleTimeoutSeconds="5m"),
        lambda spec: spec["headGroupSpec"]["rayStartParams"].update({"num-cpus": "none"}),
    ],
)
def test_rays_autoscaler_refuses_a_mistake_in_a_manifest(name, slip):
    document = copy.deepcopy(read(name)[-1])
    cluster = cluster_of(document)
    slip(cluster["spec"])
    with pytest.raises((KeyError, TypeError, ValueError)):
        _derive_autoscaling_config_from_ray_cr(cluster)


@pytest.mark.parametrize("name", KUBERAY)
def test_no_key_of_a_manifest_escapes_the_schema_above(name):
    """Each key in turn is misspelt, except for free labels, resources and parameters."""
    count = len(list(mappings(read(name))))
    for place in range(count):
        documents = read(name)
        mapping = list(mappings(documents))[place]
        free = {"nodeSelector", "rayStartParams", "requests", "limits"}
        owners = [key for other in mappings(documents) for key, value in other.items() if value is mapping]
        if set(owners) & free:
            continue
        key = next(iter(mapping))
        renamed(mapping, key, f"{key}s")
        with pytest.raises((jsonschema.ValidationError, KeyError)):
            check_manifest(documents)


@pytest.mark.parametrize("name", LAUNCHER)
@pytest.mark.parametrize(
    "slip",
    [
        lambda c: c.update(idle_timeout_minute=c.pop("idle_timeout_minutes")),
        lambda c: c.update(setup_command=c.pop("setup_commands")),
        lambda c: c["provider"].update(regoin="x"),
        lambda c: c["provider"].update(type="awz"),
        lambda c: c["auth"].update(user=c["auth"].pop("ssh_user")),
        lambda c: c.update(max_workers="many"),
    ],
)
def test_a_mistake_in_a_launcher_file_is_refused(name, slip):
    (config,) = read(name)
    slip(config)
    with pytest.raises(Exception):  # noqa: B017 - Ray's checks raise many kinds
        check_launcher(config)


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
@pytest.mark.parametrize(
    "slip",
    [
        lambda c: c.update(head_node_type="haed"),
        lambda c: c["available_node_types"]["gpu"].update(max_worker=1),
        lambda c: c["available_node_types"]["gpu"].update(min_workers=20),
        lambda c: c["available_node_types"]["gpu"].update(resources={"CPU": "eight"}),
        lambda c: c["available_node_types"]["gpu"]["node_config"].update(MachineTyp="x"),
    ],
)
def test_a_mistake_in_a_kind_of_machine_is_refused(name, slip):
    (config,) = read(name)
    slip(config)
    with pytest.raises(Exception):  # noqa: B017
        check_launcher(config)


@pytest.mark.parametrize("name", LAUNCHER + KUBERAY)
def test_versions_agree_and_nothing_is_open_or_secret(name):
    text = (CLUSTER / name).read_text()
    version = ray.__version__
    for found in re.findall(r"rayproject/ray:([\d.]+)|rayVersion: \"([\d.]+)\"|ray==([\d.]+)\*", text):
        assert version.startswith("".join(found).rstrip(".")), "Ray's version here and there"
    assert "token" in text, "token authentication is on"
    assert not re.search(r"(?i)(password|secret_access|api_key|private_key:\s*-----)", text)
    if name in LAUNCHER:
        assert "--dashboard-host=127.0.0.1" in text
        assert "EDIT" in text


def test_the_manifests_share_one_cluster():
    clusters = []
    for name in KUBERAY:
        spec = read(name)[-1]["spec"]
        clusters.append(spec.get("rayClusterSpec", spec))
    assert clusters[0] == clusters[1] == clusters[2]
