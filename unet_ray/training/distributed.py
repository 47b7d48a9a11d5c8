"""Sums and averages over the ranks, the processes of a training."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from unet_ray.models import SegmentationModel


def world_size() -> int:
    """Returns the number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Returns the number of this process among them, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def sum_over_ranks(tensor: Tensor, device: torch.device) -> None:
    """Adds a CPU tensor up over all ranks, in place."""
    if world_size() > 1:
        shared = tensor.to(device)
        dist.all_reduce(shared)
        tensor.copy_(shared)


def average_buffers(model: nn.Module, device: torch.device) -> None:
    """Gives every rank the mean of the ranks' running statistics, so that all score and save the same network."""
    for buffer in model.buffers():
        if buffer.is_floating_point() and world_size() > 1:
            sum_over_ranks(buffer, device)
            buffer /= world_size()


def over_ranks(network: SegmentationModel, device: torch.device) -> DistributedDataParallel:
    """Wraps the network so that its gradients are averaged over ranks."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        # These layers normalise over the whole batch, as one worker would; there are none for CPUs. This converts in
        # place, because the outermost module is no norm itself.
        nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return DistributedDataParallel(network, device_ids=[device] if on_gpu else None, broadcast_buffers=False)
