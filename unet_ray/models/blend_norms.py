"""Blends the statistics of other images into a network's batch norms (α-BN, You et al. 2021,
https://arxiv.org/abs/2110.04065). It needs no masks.

Legend: N images, C channels, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def batch_norms(network: nn.Module) -> list[nn.BatchNorm2d]:
    """Returns the batch norms that use running statistics, in the order in which they were built."""
    return [norm for norm in network.modules() if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None]


@torch.no_grad()
def blend(network: nn.Module, batches: Iterable[Tensor], strength: float) -> bool:
    """Moves mean and variance of each batch norm toward those of these images: (1 - strength) of its own, plus
    `strength` of theirs. Returns whether there were any.

    `batches`: images as `network` takes them. Each layer sees what the layers before it make with the statistics of
    this batch blended in, as it will after the blending.
    """
    norms = [_Blending(norm, strength) for norm in batch_norms(network.eval())]
    hooks = [each.norm.register_forward_pre_hook(each.see) for each in norms]
    try:
        for batch in batches:
            network(batch)
    finally:
        for hook in hooks:
            hook.remove()
        for each in norms:
            each.finish()
    return any(each.values for each in norms)


class _Blending:
    """Blends the statistics of one batch norm."""

    def __init__(self, norm: nn.BatchNorm2d, strength: float) -> None:
        assert norm.running_mean is not None and norm.running_var is not None
        self.norm, self.strength = norm, strength
        self.own = norm.running_mean.clone(), norm.running_var.clone()
        self.values = 0
        self.total, self.total_squares = (torch.zeros_like(value, dtype=torch.float64) for value in self.own)

    def see(self, _norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Adds the statistics of a batch, and normalises this batch with them blended in."""
        x_CV = inputs[0].float().transpose(0, 1).flatten(1)
        mean, var = x_CV.mean(dim=1), x_CV.var(dim=1, correction=0)
        values = x_CV.shape[1]
        self.values += values
        self.total += values * mean.double()
        self.total_squares += values * (var.double() + mean.double() ** 2)
        self._set(mean, var)

    def finish(self) -> None:
        """Blends in the statistics of all batches."""
        if self.values:
            mean = self.total / self.values
            self._set(mean, self.total_squares / self.values - mean**2)

    def _set(self, mean: Tensor, var: Tensor) -> None:
        for running, own, new in zip(
            (self.norm.running_mean, self.norm.running_var), self.own, (mean, var), strict=True
        ):
            assert running is not None
            running.copy_(torch.lerp(own, new.to(own.dtype), self.strength))
