"""torch.compile, where it pays: for prediction (`backends`) and training (`engine`)."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from unet_ray.config import ModelConfig
from unet_ray.models import SegmentationModel, build

log = logging.getLogger("unet_ray")

SECONDS = {"cpu": 30.0, "cuda": 60.0}
"""What compiling costs, for each size of batch: for prediction 19 s measured for base 64 on two cores, 7 to 28 s on
others; for training 28 s; CUDA is assumed, not measured."""
GAIN = 0.05
"""Share of the time that a compiled network saves: 5 % measured on AVX-512 cores in bf16, in training 0 to 7 %; 12 % on
AMX cores."""
FLOPS = {"cpu": 0.2e12, "cuda": 200e12}
"""Rate at which a CPU thread, or a GPU, gets through a network in bf16: two AVX-512 cores measured, a GPU assumed."""


def pays(operations: float, device: torch.device, *, bf16: bool, sizes: int = 1) -> bool:
    """Whether a process that has so many floating-point operations before it saves twice what compiling for `sizes`
    sizes of batch costs.

    Decided from the network's own operations and measured rates rather than a clock, so that what is stopped and goes
    on decides alike.
    """
    kind = device.type
    if not (bf16 or kind == "cuda"):
        return False
    threads = torch.get_num_threads() if kind == "cpu" else 1
    return operations / (FLOPS[kind] * threads) * GAIN > 2 * SECONDS[kind] * sizes


def without_weights(config: ModelConfig) -> SegmentationModel:
    """The network's form, which takes neither memory nor time."""
    with torch.device("meta"):
        return build(dataclasses.replace(config, pretrained=False))


def floating_point_operations(config: ModelConfig, size_hw: tuple[int, int]) -> int:
    """Of a network on one image of the size: a multiplication and an addition are two."""
    from torch.utils.flop_counter import FlopCounterMode

    height, width = size_hw
    model, margin = without_weights(config).eval(), 2 * config.margin
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, config.in_channels, height + margin, width + margin, dtype=torch.uint8))
    return counter.get_total_flops()


class Compiled:
    """A network as torch compiles it at its first call; where that fails, as it is."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        without_cuda_chatter()
        # Inductor keeps what it has compiled in a folder of the machine, where other processes and later runs find it.
        self.model = model
        self.run: Callable[[Tensor], Tensor] = torch.compile(model, dynamic=False, options=options)

    def __call__(self, image_NCHW: Tensor) -> Tensor:
        try:
            return self.run(image_NCHW)
        except Exception as error:
            if self.run is self.model or isinstance(error, torch.OutOfMemoryError):
                raise
            # Most often there is no C++ compiler, or Python's headers are missing.
            log.warning("this network can't be compiled here, it runs as it is: %s", first_line(error))
            self.run = self.model
            return self.run(image_NCHW)


def without_cuda_chatter() -> None:
    """Torch tells where it has found CUDA's compiler on a machine without a GPU, where nothing uses it."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
