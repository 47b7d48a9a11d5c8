"""Prediction reads images from a bucket over HTTP, writes masks and manifest to it, and continues after a kill."""

import json
import shutil
import signal
import subprocess
import sys
import time
import urllib.parse

import pyarrow.parquet as pq
import pytest
from conftest import make_bad, make_model, make_photos

from unet_ray.config import PredictConfig
from unet_ray.data import storage
from unet_ray.inference.predict import predict
from unet_ray.ray_backend.session import LOCAL


@pytest.fixture(scope="module")
def bucket():
    """Serves the bucket `images`. Yields its client and the options of its URIs: s3://images{path}{options}."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    import boto3

    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
    client.create_bucket(Bucket="images")
    endpoint = urllib.parse.quote(f"{host}:{port}", safe="")
    yield client, f"?scheme=http&region=us-east-1&endpoint_override={endpoint}"
    server.stop()


def uploaded(client, folder, prefix: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            client.put_object(Bucket="images", Key=f"{prefix}/{path.relative_to(folder)}", Body=path.read_bytes())


def stored(client, prefix: str) -> dict[str, bytes]:
    found = {}
    for page in client.get_paginator("list_objects_v2").paginate(Bucket="images", Prefix=prefix):
        for entry in page.get("Contents", []):
            key = entry["Key"]
            found[key.removeprefix(prefix)] = client.get_object(Bucket="images", Key=key)["Body"].read()
    return found


def masks_of(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name.startswith("masks/")}


def test_a_prediction_in_a_bucket_is_killed_and_goes_on(bucket, tmp_path):
    client, options = bucket
    folder = make_photos(tmp_path / "images", 160)
    make_bad(folder / "bad")
    for name in ("vanished.jpg", "pipe.jpg"):
        (folder / "bad" / name).unlink()
    uploaded(client, folder, "in")
    model = make_model(tmp_path / "model")
    uploaded(client, model, "model")
    arguments = [f"s3://images/model{options}", f"s3://images/in{options}", "--out", f"s3://images/out{options}"]
    command = [sys.executable, "-m", "unet_ray", "predict", *arguments, "--format", "png,parquet,kaggle", "--local"]
    command += ["--precision", "fp32", "--allow-failures", "8", "--json"]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 90
    while len([name for name in stored(client, "out/") if name.startswith(".work/done/")]) < 1:
        assert time.monotonic() < deadline and first.poll() is None, first.communicate()
    first.send_signal(signal.SIGKILL)
    first.communicate()
    done = len(masks_of(stored(client, "out/")))
    assert 0 < done < 160
    second = subprocess.run(command, capture_output=True, text=True, check=True)
    summary = json.loads(second.stdout)
    assert (summary["images"], summary["ok"], summary["failed"]) == (168, 160, 8)
    assert 0 < summary["already_done"] < 160
    local = PredictConfig(
        model=str(model),
        inputs=(str(folder),),
        out=str(tmp_path / "out"),
        formats=("png", "parquet", "kaggle"),
        precision="fp32",
    )
    predict(local, runtime=LOCAL)
    files = stored(client, "out/")
    here = {
        str(p.relative_to(tmp_path / "out")): p.read_bytes() for p in (tmp_path / "out/masks").rglob("*") if p.is_file()
    }
    assert masks_of(files) == here
    assert files["submission.csv"] == (tmp_path / "out/submission.csv").read_bytes()
    filesystem, path = storage.resolve(f"s3://images/out/manifest.parquet{options}")
    rows = pq.read_table(path, filesystem=filesystem).to_pylist()
    assert len({row["path"] for row in rows}) == len(rows) == 168
    # Rows have no options, which may hold secrets.
    assert rows[0]["path"] == "s3://images/in/bad/bomb.png"
    assert "endpoint" not in files["settings.json"].decode()
    assert "lock.json" not in str(files)


def test_ray_reads_and_writes_a_bucket(bucket, ray_cluster, tmp_path):
    client, options = bucket
    folder = make_photos(tmp_path / "images", 19)
    shutil.copy(folder / "sub 0/0000.jpg", folder / "what? ü.jpg")
    uploaded(client, folder, "few")
    config = PredictConfig(
        model=str(make_model(tmp_path / "model")),
        inputs=(f"s3://images/few{options}",),
        out=f"s3://images/masks-of-few{options}",
        precision="fp32",
    )
    summary = predict(config)
    assert (summary.ok, summary.failed) == (20, 0)
    masks = masks_of(stored(client, "masks-of-few/"))
    assert len(masks) == 20 and "masks/what? ü.png" in masks
    assert predict(config).already_done == 20
