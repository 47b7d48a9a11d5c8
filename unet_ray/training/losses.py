"""What training minimises. Every loss is one number an image, so that a batch's mean does not depend on how the batch
is divided among workers.

Legend: N images, K classes (1: a single logit), H, W pixels. `mask` holds class ids, uint8, `IGNORE` where a pixel does
not count. All are computed in float32, whatever precision the network ran in.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from unet_ray.config import IGNORE, OptimizationConfig


@dataclass(frozen=True, slots=True)
class Loss:
    """A sum of losses: (logits float [N,K,H,W], mask uint8 [N,H,W], border uint8 [N,H,W] or None) -> float32 [N].

    `border`: 255 where two objects touch, 0 far from any gap (`masks.border_map`).
    """

    terms: tuple[str, ...]
    """Names in `config.LOSSES`, each with weight 1."""
    class_weights: tuple[float, ...] | None = None
    """Of the class ids; for a single logit of background and foreground."""
    border_weight: float = 0.0
    focal_gamma: float = 2.0
    tversky_alpha: float = 0.3

    def __call__(self, logits_NKHW: Tensor, mask_NHW: Tensor, border_NHW: Tensor | None = None) -> Tensor:
        logits_NKHW = logits_NKHW.float()
        pixels = _Pixels(logits_NKHW, mask_NHW, self._pixel_weights(mask_NHW, border_NHW))
        return torch.stack([getattr(self, f"_{term}")(pixels) for term in self.terms]).sum(dim=0)

    def _pixel_weights(self, mask_NHW: Tensor, border_NHW: Tensor | None) -> Tensor:
        """Float [N,H,W], 0 where a pixel does not count: w_c + w0 * border, equation 2 of Ronneberger et al. 2015."""
        weights = (mask_NHW != IGNORE).float()
        if self.class_weights is not None:
            table = torch.zeros(256, device=mask_NHW.device)
            table[: len(self.class_weights)] = torch.tensor(self.class_weights, device=mask_NHW.device)
            weights = table[mask_NHW.int()]
        if border_NHW is not None and self.border_weight:
            weights = weights + (mask_NHW != IGNORE) * (self.border_weight / 255) * border_NHW.float()
        return weights

    def _ce(self, pixels: _Pixels) -> Tensor:
        """Cross-entropy, binary of a single logit and softmax of more, weighted mean over an image's valid pixels."""
        return pixels.mean(pixels.cross_entropy())

    _bce = _ce

    def _focal(self, pixels: _Pixels) -> Tensor:
        """(1 - p) ** gamma * cross-entropy, p the probability of the true class (Lin et al. 2017, equation 4)."""
        cross_entropy = pixels.cross_entropy()
        # Not from 0: its power below 1 has no finite slope.
        wrong = (-torch.expm1(-cross_entropy)).clamp(min=1e-7)
        return pixels.mean(wrong**self.focal_gamma * cross_entropy)

    def _dice(self, pixels: _Pixels) -> Tensor:
        """1 - soft Dice, (2 Σpt + 1) / (Σp + Σt + 1) over an image's valid pixels (Milletari et al. 2016 with plain
        sums in the denominator; the 1 makes an empty class right when nothing is predicted), mean over the classes.

        A single logit: of the foreground. More: of every class, the first included.
        """
        hit, predicted, true = pixels.sums()
        return self._class_mean(1 - (2 * hit + 1) / (predicted + true + 1))

    def _tversky(self, pixels: _Pixels) -> Tensor:
        """1 - Tversky index, (TP + 1) / (TP + α FP + (1 - α) FN + 1) with soft counts (Salehi et al. 2017, equation 3);
        α = 0.5 is nearly Dice. Classes as in `dice`."""
        hit, predicted, true = pixels.sums()
        wrong = self.tversky_alpha * (predicted - hit) + (1 - self.tversky_alpha) * (true - hit)
        return self._class_mean(1 - (hit + 1) / (hit + wrong + 1))

    def _class_mean(self, loss_NK: Tensor) -> Tensor:
        if self.class_weights is None or loss_NK.shape[1] == 1:
            return loss_NK.mean(dim=1)
        weights_K = torch.tensor(self.class_weights, device=loss_NK.device)
        return (loss_NK * weights_K).sum(dim=1) / weights_K.sum()


@dataclass(slots=True)
class _Pixels:
    """What the terms of a loss share."""

    logits: Tensor
    """Float [N,K,H,W]."""
    mask: Tensor
    """uint8 [N,H,W]."""
    weights: Tensor
    """Float [N,H,W]."""
    _cross_entropy: Tensor | None = field(default=None, init=False)

    def cross_entropy(self) -> Tensor:
        """Of each pixel, float [N,H,W]; of ignored ones anything finite."""
        if self._cross_entropy is None:
            if self.logits.shape[1] == 1:
                target = (self.mask == 1).to(self.logits.dtype)
                self._cross_entropy = F.binary_cross_entropy_with_logits(self.logits[:, 0], target, reduction="none")
            else:
                self._cross_entropy = F.cross_entropy(
                    self.logits, self.mask.long(), ignore_index=IGNORE, reduction="none"
                )
        return self._cross_entropy

    def mean(self, loss_NHW: Tensor) -> Tensor:
        """Weighted mean over an image's pixels, as torch's own cross-entropy takes it; 0 for an image without any."""
        total = self.weights.sum(dim=(1, 2))
        return (loss_NHW * self.weights).sum(dim=(1, 2)) / torch.where(total > 0, total, 1)

    def sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of each class over an image's valid pixels, float [N,K] each: Σpt, Σp, Σt."""
        if self.logits.shape[1] == 1:
            probability, target = self.logits.sigmoid(), (self.mask == 1)[:, None]
        else:
            probability = self.logits.softmax(dim=1)
            classes = torch.arange(self.logits.shape[1], device=self.mask.device)
            target = self.mask[:, None] == classes[:, None, None]
        probability = probability * (self.mask != IGNORE)[:, None]
        return (probability * target).sum(dim=(2, 3)), probability.sum(dim=(2, 3)), target.sum(dim=(2, 3))


def build(config: OptimizationConfig, num_classes: int) -> Loss:
    """The loss that a training's settings name; `inverse` class weights must have been resolved to numbers."""
    assert config.class_weights != "inverse", "resolve class_weights first: see masks.inverse_frequencies"
    name = config.loss
    if name == "auto":
        name = "bce+dice" if num_classes == 1 else "ce+dice"
    return Loss(
        terms=tuple(name.split("+")),
        class_weights=None if isinstance(config.class_weights, str) else config.class_weights,
        border_weight=config.border_weight,
        focal_gamma=config.focal_gamma,
        tversky_alpha=config.tversky_alpha,
    )
