"""doctor says whether the CPUs of a cluster can feed its GPUs."""

import pytest
from conftest import make_model, make_photos

from unet_ray.doctor import cluster, examine
from unet_ray.models import checkpoint
from unet_ray.ray_backend import nodes

L4 = {"CPU": 8.0, "GPU": 1.0, "accelerator_type:L4": 1.0, "node:10.0.0.1": 1.0}


def test_gpus_that_cpus_can_feed_and_gpus_that_wait():
    (found,) = cluster.balance([L4] * 64, 0.018, 385e9)  # U-Net of 64 channels
    assert found.code == "cpus-for-each-gpu"
    assert (
        "64 GPUs, 8 CPUs for each" in found.text and "444 images/s" in found.text and "takes 141 of one" in found.text
    )
    (found,) = cluster.balance([L4] * 64, 0.018, 3.2e9)
    assert found.code == "gpus-wait-for-cpus"
    assert "307 CPUs for each GPU" in found.remedy
    (found,) = cluster.balance([L4, {"CPU": 298.0}], 0.018, 3.2e9)
    assert found.code == "gpus-wait-for-cpus" and "1 GPU, 306 CPUs" in found.text
    (found,) = cluster.balance([L4, {"CPU": 299.0}], 0.018, 3.2e9)
    assert found.code == "cpus-for-each-gpu"


def test_a_gpu_of_an_unknown_kind_is_not_guessed():
    (found,) = cluster.balance([{"CPU": 4.0, "GPU": 2.0, "accelerator_type:NEW": 1.0}], 0.01, 3.2e9)
    assert "200 images/s" in found.text and "estimated" not in found.text
    (found,) = cluster.balance([{"CPU": 4.0, "GPU": 1.0, "accelerator_type:A100-80G": 1.0}], 0.01, 3.2e9)
    assert "312 TFLOPS of A100" in found.text


@pytest.mark.parametrize("gpus", [0, 1])
def test_doctor_says_it_where_a_cluster_is_named(ray_cluster, tmp_path, monkeypatch, gpus):
    model = make_model(tmp_path / "model")
    photos = make_photos(tmp_path / "photos", 3)
    monkeypatch.setattr(checkpoint, "read_looks", lambda _location: LOOKS)
    monkeypatch.setattr("unet_ray.doctor.unlike", lambda *_arguments: [])
    here = nodes.able_to_work
    monkeypatch.setattr(nodes, "able_to_work", lambda: [*here(), {"Resources": {"CPU": 2.0, "GPU": float(gpus)}}])
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster.get_runtime_context().gcs_address)
    found = [f for f in examine(str(photos), against=str(model)).findings if "gpu" in f.code]
    assert len(found) == gpus
    if gpus:
        assert "1 GPU, 6 CPUs for each" in found[0].text  # four of this Ray
    monkeypatch.delenv("RAY_ADDRESS")
    assert not [f for f in examine(str(photos), against=str(model)).findings if "gpu" in f.code]


LOOKS = {"brightness": [0.5]}
