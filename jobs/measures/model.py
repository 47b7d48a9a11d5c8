"""Measures the network alone, one image at a time."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch

from measures.common import Apart, Job, Line, arithmetic_for, dice, in_turns, mask_of, network_of, table
from unet_ray.inference import backends
from unet_ray.models import checkpoint
from unet_ray.models.device import bf16_is_fast, keep_freed_memory
from unet_ray.models.operations import floating_point_operations
from unet_ray.own_process import claim


def plain_network(job: Job) -> Callable[[np.ndarray], np.ndarray]:
    """Returns image -> mask with the same weights in fp32, as a tutorial runs them: nothing folded, no memory format,
    no autocast."""
    network = checkpoint.load_model(job.model)[0].eval().to(job.device)
    return lambda image: mask_of(lambda tensor: network(tensor.contiguous()), image, job)


def networks(job: Job) -> Iterator[tuple[str, backends.Network]]:
    """Yields the network on each of our backends that this machine has."""
    yield "torch", network_of(job, backend="torch")
    yield "compiled", network_of(job, backend="compiled")
    if job.device == "cpu" and importlib.util.find_spec("openvino"):
        yield "OpenVINO fp32", network_of(job, "fp32", "openvino")
        if bf16_is_fast(torch.device("cpu")):
            yield "OpenVINO bf16", network_of(job, "bf16", "openvino")
        if arithmetic_for(job).int8:
            yield "OpenVINO int8", network_of(job)


def model_section(job: Job) -> Iterator[Line]:
    claim()
    keep_freed_memory(of_any_size=True)
    decoded = job.decoded(16)
    ours = {name: partial(mask_of, network, job=job) for name, network in networks(job)}
    upcoming = itertools.cycle(decoded)
    with Apart(plain_network, job) as plain:
        ways: dict[str, Callable[[np.ndarray], np.ndarray]] = {"plain fp32": plain, **ours}
        steps = {name: lambda way=way: way(next(upcoming)) for name, way in ways.items()}
        seconds = in_turns(steps, job.rounds)
        expected = [plain(image) for image in decoded[:8]]
    flops = floating_point_operations(job.card.model, job.card.image_size)
    notes = {}
    for name, value in seconds.items():
        notes[name] = f"{flops / value / 1e12:.3f} TFLOPS"
        if name in ours:
            agree = np.mean([dice(ours[name](image), mask) for image, mask in zip(decoded, expected, strict=False)])
            notes[name] += f"; Dice with plain fp32's masks {agree:.5f}"
    yield from table("model", seconds, notes)
