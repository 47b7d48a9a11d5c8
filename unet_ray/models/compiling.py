"""Compiles a network with torch.compile, in prediction and training, if that saves time."""

from __future__ import annotations

import importlib.util
import logging
import os
import platform
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from unet_ray.config import UserError, first_line
from unet_ray.own_process import is_own

log = logging.getLogger("unet_ray")

SECONDS = {"cpu": 30.0, "cuda": 60.0}
"""Seconds that compiling takes for each batch size. Measured for prediction: 19 s for base 64 on two cores, 7 to 28 s
on others; for training: 28 s. CUDA is assumed, not measured."""
GAIN = 0.05
"""Share of the time that a compiled network saves. Measured in bf16: 5 % on AVX-512 cores, 0 to 7 % in training there;
12 % on AMX cores."""
FLOPS = {"cpu": 0.2e12, "cuda": 200e12}
"""Operations per second of a CPU thread, or a GPU, in bf16: measured on two AVX-512 cores, assumed for a GPU."""


def pays(operations: float, device: torch.device, *, bf16: bool, sizes: int = 1, threads: int | None = None) -> bool:
    """Returns whether compiling saves twice the time it takes, in a process that will do this many operations.

    `sizes`: number of batch sizes that it compiles for. `threads`: its threads on a CPU; None: as many as here. The
    decision uses the network's operations and measured rates instead of a clock, so that a run that is stopped and
    resumed decides the same.
    """
    kind = device.type
    if not (bf16 or kind == "cuda"):
        return False
    return estimated_seconds(operations, kind, threads) * GAIN > 2 * SECONDS[kind] * sizes


def estimated_seconds(operations: float, kind: str, threads: int | None = None) -> float:
    """Returns how long a process takes for so many operations, by the measured rate. `kind`: `cpu` or `cuda`.
    `threads`: its threads on a CPU; None: as many as here."""
    threads = (threads or torch.get_num_threads()) if kind == "cpu" else 1
    return operations / (FLOPS[kind] * threads)


def is_possible(device: torch.device) -> bool:
    """Returns whether this machine has what torch.compile needs: a C++ compiler for CPUs, Triton for GPUs."""
    if device.type == "cuda":
        return importlib.util.find_spec("triton") is not None
    # The names under which torch looks for a compiler.
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++", "cl"))


class Compiled:
    """A network that torch compiles at its first call.

    If compiling fails, it runs uncompiled; with `required` it raises UserError instead.
    """

    def __init__(self, model: nn.Module, *, required: bool = False, **options: Any) -> None:
        without_cuda_chatter()
        # Inductor keeps compiled code in a folder of the machine, where other processes and later runs find it.
        self.model, self.required = model, required
        self.run: Callable[[Tensor], Tensor] = torch.compile(model, dynamic=False, options=options)

    def __call__(self, image_NCHW: Tensor) -> Tensor:
        try:
            return self.run(image_NCHW)
        except Exception as error:
            if self.run is self.model or isinstance(error, torch.OutOfMemoryError):
                raise
            # Usually a C++ compiler or Python's headers are missing.
            if self.required:
                raise UserError(
                    f"{platform.node()} can't compile this network: {first_line(error)[:200]}. Use --backend torch"
                ) from None
            log.warning("this network can't be compiled here, it runs uncompiled: %s", first_line(error)[:200])
            self.run = self.model
            return self.run(image_NCHW)


def without_cuda_chatter() -> None:
    """Silences torch's message about CUDA's compiler, which it prints even on machines without a GPU. A host's process
    keeps its loggers as they are."""
    if is_own():
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
