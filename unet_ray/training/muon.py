"""Muon, an optimizer for the weights of convolutions. It needs fewer images than AdamW for the same score."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised steps (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).

    The weight of a convolution is a matrix with one row per output channel (of a transposed convolution: per input
    channel). All singular values of its step are near 1, so that rare directions move as fast as common ones. Groups
    with `orthogonal=False` (biases, norms, the last layer) take AdamW's step (Loshchilov & Hutter 2019).

    `lr`: for orthogonal groups the size of a singular value of a step; for the others that of AdamW.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, "orthogonal": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "no line search"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros(())
                    state["exp_avg"] = torch.zeros_like(parameter)
                    if not group["orthogonal"]:
                        state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["step"] += 1
                update = orthogonal_step(parameter, state) if group["orthogonal"] else adam_step(parameter, state)
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])


def orthogonal_step(parameter: Tensor, state: dict[str, Tensor], momentum: float = 0.95) -> Tensor:
    """Returns the orthogonalised step of Nesterov momentum (0.95 as in the paper). A tall matrix's step is scaled by
    sqrt(rows / columns)."""
    assert parameter.grad is not None
    state["exp_avg"].lerp_(parameter.grad, 1 - momentum)
    update = parameter.grad.lerp(state["exp_avg"], momentum)
    matrix = orthogonalise(update.reshape(len(update), -1))
    return matrix.view_as(update) * max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5


def orthogonalise(matrix: Tensor) -> Tensor:
    """Returns the nearest matrix whose singular values are all about 1; float32 [R,C].

    Takes five Newton–Schulz steps with the source's coefficients; the values end between 0.7 and 1.2. Each step
    multiplies the matrix X from the left by a polynomial P of XXᵀ. A step computes only XXᵀ, which becomes P·XXᵀ·P, and
    the product of all P. Both are as small as the shorter side. X itself is multiplied once, at the end. For U-Net base
    64 that takes 0.4 of the time.
    """
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / (wide.norm() + 1e-7)
    gram = wide @ wide.T
    product = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for _ in range(5):
        step = -4.7750 * gram + 2.0315 * gram @ gram
        step.diagonal().add_(3.4445)
        product, gram = product @ step, step @ (gram @ step)
    wide = product @ wide
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide


def adam_step(parameter: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Returns Adam's step with torch's defaults: betas 0.9 and 0.999, epsilon 1e-8."""
    assert parameter.grad is not None
    state["exp_avg"].lerp_(parameter.grad, 0.1)
    state["exp_avg_sq"].mul_(0.999).addcmul_(parameter.grad, parameter.grad, value=0.001)
    mean = state["exp_avg"] / (1 - 0.9 ** state["step"])
    spread = (state["exp_avg_sq"] / (1 - 0.999 ** state["step"])).sqrt_().add_(1e-8)
    return mean / spread
