"""Chooses the device and precision of a network, runs it on whole images, and decides class ids."""

from __future__ import annotations

import contextlib
import ctypes
import math
import platform
from collections.abc import Callable

import torch
from torch import Tensor

from unet_ray.config import DataConfig, ModelConfig, UserError
from unet_ray.models.tiles import by_tiles, mirror_margin
from unet_ray.own_process import is_own


def device_here(wanted: str, workers: int) -> torch.device:
    """Returns the device of a `--local` command; `auto` is CUDA if torch can use it. Raises UserError."""
    if workers > 1:
        raise UserError(f"--workers {workers} with --local: one process has one worker; drop either")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has none that torch can use: use --device cpu")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def check_gpu() -> None:
    """Raises UserError if torch can't use the GPU that Ray has assigned. Ray counts GPUs without torch."""
    if not torch.cuda.is_available():
        raise UserError(
            f"torch can't use the GPU of {platform.node()}: install it for CUDA, with a driver that fits, or use "
            "--device cpu"
        )


def bf16_is_fast(device: torch.device) -> bool:
    """Returns whether the device computes in bfloat16 instead of emulating it."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "sve_bf16", "arm_bf16"))


def instruction_set() -> str:
    """Returns the instructions with which networks compute on this CPU, such as `AVX2` or `AVX512+VNNI+AMX`.

    Networks in int8 add up integers in other ways with VNNI and AMX, and their masks differ.
    """
    found = torch.cpu.get_capabilities()
    extra = {"VNNI": ("avx512_vnni", "avx_vnni"), "AMX": ("amx_int8",), "I8MM": ("arm_i8mm", "i8mm")}
    more = [name for name, keys in extra.items() if any(found.get(key) for key in keys)]
    return "+".join([torch.backends.cpu.get_cpu_capability(), *more])


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Returns the context for forward passes in `auto`, `fp32`, `bf16` or (on CUDA) `fp16`."""
    if precision == "fp16":
        return torch.autocast(device.type, torch.float16)
    return torch.autocast(device.type, torch.bfloat16) if in_bf16(device, precision) else contextlib.nullcontext()


def in_bf16(device: torch.device, precision: str) -> bool:
    """Returns whether this precision means bf16: `bf16` itself, or `auto` on a device that computes in it."""
    return precision == "bf16" or (precision == "auto" and bf16_is_fast(device))


def check_precision(precision: str, device: str) -> None:
    """Raises UserError for a precision that the device does not support."""
    if precision == "fp16" and device != "cuda":
        raise UserError("--precision fp16 is for CUDA: use bf16 or fp32 on CPUs")
    if precision == "int8" and device != "cpu":
        raise UserError("--precision int8 is for CPUs: add --device cpu, or use bf16")


def keep_freed_memory(*, of_any_size: bool = False) -> None:
    """Makes glibc keep the memory of freed arrays instead of returning it to the system.

    Returned memory costs a page fault for every 4 KiB when it is used again. Without these faults, on two CPU cores,
    decoding and writing was 27 % faster, and a training step of U-Net base 64 on four images of 512² was 14 % faster.

    `of_any_size`: also keep blocks over 32 MiB, which a network takes at every step. Don't use it if the size of the
    arrays keeps changing, since gaps would add up. Without glibc (musl, macOS, Windows) the function does nothing; nor
    does it in the process of a host, since glibc can't tell the settings that it would have to put back.
    """
    if not is_own():
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD, at its largest: blocks up to here come from the heap
    mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks
    mallopt(-2, 256 * 2**20)  # M_TOP_PAD: the heap grows by this much at a time
    if of_any_size:
        mallopt(-4, 0)  # M_MMAP_MAX: all blocks come from the heap


ONE_HEAP = {"MALLOC_ARENA_MAX": "1"}
"""Environment of a process whose network does not run on the main thread, as in Ray's workers. glibc gives the
other threads heaps of 64 MiB, and takes larger blocks from the system in spite of `keep_freed_memory`."""


def run_network(
    model: Callable[[Tensor], Tensor], image_NHWC: Tensor, model_config: ModelConfig, data: DataConfig
) -> Tensor:
    """Computes logits [N,K,H,W] of whole images, uint8 [N,H,W,C] on the model's device."""
    # The permuted NHWC memory is channels_last already: nothing is copied.
    image_NCHW = image_NHWC.permute(0, 3, 1, 2)
    if data.tile and model_config.padding == "valid":
        return by_tiles(model, image_NCHW, data.tile, model_config)
    return model(mirror_margin(image_NCHW, model_config.margin))


def decide(logits_NKHW: Tensor, threshold: float = 0.5) -> Tensor:
    """Decides class ids, uint8 [N,H,W], from logits. One class: 1 where the sigmoid is above `threshold`."""
    if logits_NKHW.shape[1] == 1:
        return (logits_NKHW[:, 0] > math.log(threshold / (1 - threshold))).to(torch.uint8)
    return logits_NKHW.argmax(dim=1).to(torch.uint8)
