"""jobs/serve.py: many requests at once, each with its own mask; what is no image; a replica that dies."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from conftest import ROOT, environment, free_port, make_model, make_photos
from pycocotools import mask as coco

import unet_ray

pytest.importorskip("starlette")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Serves a model with two replicas. Yields its address, its process, the photographs, and the mask of each."""
    folder = tmp_path_factory.mktemp("serve")
    model = make_model(folder / "model")
    photos = sorted(path for path in make_photos(folder / "photos", 40).rglob("*") if path.is_file())
    summary = unet_ray.predict(model, folder / "photos", folder / "MASKS", local=True)
    assert summary.ok == 40
    masks = {
        photo: (folder / "MASKS/masks" / photo.relative_to(folder / "photos")).with_suffix(".png").read_bytes()
        for photo in photos
    }
    port = free_port()
    words = [sys.executable, ROOT / "jobs/serve.py", model, "--replicas", 2, "--port", port]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*map(str, words)], env=environment(), stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while "serving" not in (folder / "log").read_text():
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/", process, photos, masks
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def post(address: str, body: bytes) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, data=body), timeout=120) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_what_is_no_image_is_an_answer_and_json_tells_the_regions(served):
    address, _, photos, _ = served
    code, body = post(address, b"hello")
    assert code == 400 and "not an image" in json.loads(body)["error"]
    code, body = post(f"{address}?as=json", photos[0].read_bytes())
    answer = json.loads(body)
    assert code == 200 and {"height", "width", "confidence", "uncertainty", "regions"} == set(answer)
    [region] = answer["regions"]
    size = [answer["height"], answer["width"]]
    assert coco.decode({"size": size, "counts": region["counts"]}).sum() == region["pixels"]
    with urllib.request.urlopen(address, timeout=60) as response:
        assert json.loads(response.read())["classes"] == ["background", "foreground"]
    with urllib.request.urlopen(f"{address}-/healthz", timeout=60) as response:
        assert response.read() == b"success"


def test_200_requests_at_once_and_a_replica_that_dies(served):
    address, process, photos, masks = served
    wanted = [photos[number % len(photos)] for number in range(200)]
    replicas = [p for p in psutil.Process(process.pid).children(recursive=True) if "ServeReplica" in _title(p)]
    assert len(replicas) == 2
    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(lambda photo: post(address, photo.read_bytes()), wanted))
        assert [(code, body == masks[photo]) for photo, (code, body) in zip(wanted, answers, strict=True)] == [
            (200, True)
        ] * 200
        futures = [pool.submit(post, address, photo.read_bytes()) for photo in wanted]
        next(future for future in futures if future.result())
        os.kill(replicas[0].pid, signal.SIGKILL)
        answers = [future.result() for future in futures]
    lost = [photo for photo, (code, _) in zip(wanted, answers, strict=True) if code != 200]
    assert {code for code, _ in answers} <= {200, 500}
    assert all(body == masks[photo] for photo, (code, body) in zip(wanted, answers, strict=True) if code == 200)
    assert all(post(address, photo.read_bytes()) == (200, masks[photo]) for photo in lost)


def _title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""
