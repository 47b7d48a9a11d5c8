"""Says whether the CPUs of the cluster at hand can feed its GPUs."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from unet_ray.config import MAX_PIXELS
from unet_ray.data import own_size, pictures
from unet_ray.data.imaging import ImageError
from unet_ray.data.inputs import ImageFile, evenly
from unet_ray.doctor.against import Training
from unet_ray.doctor.report import Finding, note
from unet_ray.inference.reader import Reader
from unet_ray.models.operations import floating_point_operations
from unet_ray.ray_backend.session import Runtime

SAMPLE = 16
TFLOPS = {"T4": 65, "V100": 125, "A10G": 70, "L4": 121, "L40S": 362, "A100": 312, "H100": 989, "H200": 989}
"""Dense matrix products in bf16, T4 and V100 in fp16: NVIDIA's data sheets. The names are Ray's, without the memory."""
SHARE = 0.45
"""Share of that which a U-Net is assumed to reach. No GPU of these was measured."""
ACCELERATOR = "accelerator_type:"


def feeding(images: Sequence[ImageFile], training: Training) -> list[Finding]:
    """Returns a note on the CPUs for each GPU, if RAY_ADDRESS names a cluster with GPUs."""
    if os.environ.get("RAY_ADDRESS", "local") in ("", "local") or not images:
        return []
    with Runtime().started():
        from unet_ray.ray_backend import nodes

        resources = [node["Resources"] for node in nodes.able_to_work()]
    if not any(node.get("GPU") for node in resources):
        return []
    core = _seconds_of_a_core(evenly(images, SAMPLE), training)
    operations = floating_point_operations(training.card.model, training.card.image_size)
    return balance(resources, core, operations) if core else []


def balance(nodes: Sequence[Mapping[str, float]], core: float, operations: float) -> list[Finding]:
    """Compares what CPUs and GPUs can do. `nodes`: the resources of each, as Ray names them; `core`: seconds of a CPU
    core to read an image and write its mask; `operations`: of the network on an image."""
    gpus, cpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("GPU", "CPU"))
    kinds: Counter[str] = Counter()
    for node in nodes:
        kinds.update({name: node["GPU"] for name in node if name.startswith(ACCELERATOR) and node.get("GPU")})
    fed = cpus / gpus / core
    text = (
        f"{gpus:g} GPU{'' if gpus == 1 else 's'}, {cpus / gpus:.3g} CPUs for each: these read images and write masks "
        f"for {fed:,.0f} images/s of a GPU ({1e3 * core:.0f} ms of a core here)"
    )
    kind = kinds.most_common(1)[0][0].removeprefix(ACCELERATOR).partition("-")[0] if kinds else ""
    if kind not in TFLOPS:
        return note("cpus-for-each-gpu", text, "if the network is faster than that, GPUs wait: add nodes without GPUs")
    speed = SHARE * TFLOPS[kind] * 1e12 / operations
    text += f"; the network takes {speed:,.0f} of one (estimated: {SHARE:.0%} of the {TFLOPS[kind]} TFLOPS of {kind})"
    if speed <= fed:
        return note("cpus-for-each-gpu", text, "nothing: the GPUs decide")
    needed = math.ceil(speed * core)
    return note("gpus-wait-for-cpus", text, f"add nodes without GPUs: {needed} CPUs for each GPU would feed it")


def _seconds_of_a_core(images: Sequence[ImageFile], training: Training) -> float:
    """Returns how long one core takes to read an image and to write its mask; 0 if none can be read."""
    card, (height, width) = training.card, training.card.image_size
    reader = Reader.of(card, MAX_PIXELS)
    y, x = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    inside = (0.4 - x**2 - y**2).astype(np.float16)  # an object that takes a third of the image
    scores = np.stack([inside, *[-inside] * (card.model.num_classes - 1)])
    seconds = []
    for data in reader.encoded_files(image.path for image in images):
        started = time.process_time()
        try:
            _, own_hw = reader.resized(data, card.image_size)
        except ImageError:
            continue
        mask = own_size.to_own_size(scores, own_hw, card.threshold)
        pictures.encode_png(mask, card.model.num_classes)
        seconds.append(time.process_time() - started)
    return float(np.median(seconds)) if seconds else 0.0
