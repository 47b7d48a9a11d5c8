"""The device a network runs on: precision, memory, running it, deciding classes."""

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


def device_here(wanted: str, workers: int) -> torch.device:
    """The device of a `--local` command; `auto` is CUDA where torch can use it. Raises UserError."""
    if workers > 1:
        raise UserError(f"--workers {workers} with --local: one process has one worker; drop either")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has none that torch can use: use --device cpu")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def check_gpu() -> None:
    """Raises UserError where torch can't use the GPU that Ray, which counts them without torch, has given."""
    if not torch.cuda.is_available():
        raise UserError(
            f"torch can't use the GPU of {platform.node()}: install it for CUDA, with a driver that fits, or use "
            "--device cpu"
        )


def bf16_is_fast(device: torch.device) -> bool:
    """Whether the device multiplies in bfloat16, rather than emulating it."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    able = torch.cpu.get_capabilities()
    return bool(able.get("amx_bf16") or able.get("avx512_bf16") or able.get("sve_bf16") or able.get("arm_bf16"))


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """The arithmetic of a forward pass: `auto`, `fp32`, `bf16` or (on CUDA) `fp16`."""
    if precision == "fp16":
        return torch.autocast(device.type, torch.float16)
    return torch.autocast(device.type, torch.bfloat16) if in_bf16(device, precision) else contextlib.nullcontext()


def in_bf16(device: torch.device, precision: str) -> bool:
    """Whether `bf16`, or `auto` on a device that is good at it, was asked for."""
    return precision == "bf16" or (precision == "auto" and bf16_is_fast(device))


def check_precision(precision: str, device: str) -> None:
    """Raises UserError for what the device does not do."""
    if precision == "fp16" and device != "cuda":
        raise UserError("--precision fp16 is for CUDA: use bf16 or fp32 on CPUs")
    if precision == "int8" and device != "cpu":
        raise UserError("--precision int8 is for CPUs: add --device cpu, or use bf16")


def keep_freed_memory(*, of_any_size: bool = False) -> None:
    """Tells glibc to keep the memory of freed arrays instead of handing it back to the system.

    Taking it anew means a page fault for every 4 KiB: on two CPU cores decoding and writing was 27 % faster without,
    a training step of U-Net base 64 on four images of 512² 14 %.

    `of_any_size`: blocks over 32 MiB, too, as a network takes at every step; not for what is of another size each time,
    whose gaps would add up. Elsewhere (musl, macOS, Windows) it does nothing.
    """
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
"""Environment of a process whose network does not run on the main thread, as in Ray's workers: glibc gives other
threads heaps of 64 MiB, and takes larger blocks from the system whatever `keep_freed_memory` says."""


def run_network(
    model: Callable[[Tensor], Tensor], image_NHWC: Tensor, model_config: ModelConfig, data: DataConfig
) -> Tensor:
    """Logits [N,K,H,W] of whole images, uint8 [N,H,W,C] on the model's device."""
    # The permuted NHWC memory is channels_last already, so nothing is copied to get there.
    image_NCHW = image_NHWC.permute(0, 3, 1, 2)
    if data.tile and model_config.padding == "valid":
        return by_tiles(model, image_NCHW, data.tile, model_config)
    return model(mirror_margin(image_NCHW, model_config.margin))


def decide(logits_NKHW: Tensor, threshold: float = 0.5) -> Tensor:
    """Class ids, uint8 [N,H,W]."""
    if logits_NKHW.shape[1] == 1:
        return (logits_NKHW[:, 0] > math.log(threshold / (1 - threshold))).to(torch.uint8)
    return logits_NKHW.argmax(dim=1).to(torch.uint8)
