"""Serves a model over HTTP with Ray Serve. It needs `pip install 'unet_ray[serve]'`.

    python jobs/serve.py RUN --replicas 2
    curl --data-binary @photo.jpg http://127.0.0.1:8000/ > mask.png
    curl --data-binary @photo.jpg 'http://127.0.0.1:8000/?as=json'

The body of a request is an image file of any kind that `predict` reads. The answer is its mask as `predict` writes it:
PNG at the image's own size, or with `?as=json` COCO's run lengths of each class found. 400: not an image, with the
reason. `GET /` describes the model, and `GET /-/healthz` is Serve's own answer that it works. A request whose replica
dies is answered with 500, as Serve documents: send it again. Serve starts another replica.

It runs on the cluster of RAY_ADDRESS, or else starts a Ray here, until Ctrl-C. Whoever reaches the port may use it: put
what checks users before it, and give --host 0.0.0.0 for others than this machine.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Any

import click

# Import the checkout that was sent as the working directory, not a copy that may be installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import unet_ray
from unet_ray.data import storage
from unet_ray.data.run_lengths import coco_region
from unet_ray.own_process import claim
from unet_ray.ray_backend.session import Runtime

TOGETHER, WAIT_SECONDS = 8, 0.01
"""Images of different requests that a replica segments together, and how long it waits for them."""


@serve.deployment(name="unet_ray", max_ongoing_requests=4 * TOGETHER)
class Model:
    """A replica: holds the model, and segments the images of several requests at once."""

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        claim()
        self.segmenter = unet_ray.Segmenter(model, **options)

    @serve.batch(max_batch_size=TOGETHER, batch_wait_timeout_s=WAIT_SECONDS)
    async def segment(self, images: list[bytes]) -> list[unet_ray.SegmentedImage | unet_ray.UserError]:
        # In a thread, so that the replica answers Serve's questions after its health meanwhile.
        return await asyncio.to_thread(self.segmenter.batch, images)

    async def __call__(self, request: Request) -> Response:
        if request.method == "GET":
            return JSONResponse({"model": repr(self.segmenter), "classes": self.segmenter.classes})
        found = await self.segment(await request.body())
        if isinstance(found, unet_ray.UserError):
            return JSONResponse({"error": str(found)}, status_code=400)
        if request.query_params.get("as") == "json":
            return JSONResponse(as_json(found))
        return Response(found.png(), media_type="image/png", headers={"X-Uncertainty": f"{found.uncertainty:.4f}"})


def as_json(found: unet_ray.SegmentedImage) -> dict[str, Any]:
    """Returns size, certainty, and the regions of each class but the first: pixels, box and COCO's run lengths."""
    height, width = found.mask.shape
    regions = [(name, found.mask == class_id) for class_id, name in enumerate(found.classes) if class_id]
    return {
        "height": height,
        "width": width,
        "confidence": found.confidence,
        "uncertainty": found.uncertainty,
        "regions": [
            {"class": name, "pixels": int(np.count_nonzero(region)), **coco_region(region)}
            for name, region in regions
            if region.any()
        ],
    }


def of_a_replica(replicas: int) -> dict[str, float]:
    """Returns what Ray gives a replica: a GPU, or its share of the CPUs of a node. Raises UserError if the cluster has
    not enough."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    kind = "GPU" if any(node.get("GPU") for node in nodes) else "CPU"
    there = sum(int(node.get(kind, 0)) for node in nodes)
    if replicas > there:
        raise unet_ray.UserError(f"--replicas {replicas}: the cluster has {there} {kind}s, and each needs one")
    if kind == "GPU":
        return {"num_gpus": 1}
    largest = max(int(node.get("CPU", 0)) for node in nodes)
    return {"num_cpus": max(1, min(largest, there // replicas, largest // -(-replicas // len(nodes))))}


@click.command(help=__doc__)
@click.argument("model")
@click.option("--replicas", default=1, show_default=True, help="Copies of the model.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8000, show_default=True)
@click.option("--tile", default=0, help="See `unet-ray predict --help`.")
@click.option("--precision", default="auto", help="See `unet-ray predict --help`.")
@click.option("--allow-code", is_flag=True, help="See `unet-ray predict --help`.")
def main(model: str, replicas: int, host: str, port: int, **options: Any) -> None:
    unet_ray.Segmenter(model, **options)  # what is wrong with it is said here, at once
    with Runtime().started():
        one = of_a_replica(replicas)
        serve.start(http_options={"host": host, "port": port}, logging_config={"log_level": "WARNING"})
        deployment = Model.options(num_replicas=replicas, ray_actor_options=one)  # type: ignore[attr-defined]
        serve.run(deployment.bind(storage.absolute(model), options))
        click.echo(f"serving {model} at http://{host}:{port}/")
        while True:
            time.sleep(1)


if __name__ == "__main__":
    claim()
    try:
        main()
    except unet_ray.UserError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)
