"""The losses. Each gives one number per image, so that a batch's mean does not depend on how the batch is divided.

To add one, write a function (pixels, config) -> float32 [N] here and name it in `registry.LOSSES`.

Legend: N images, K classes (1: a single logit), H, W pixels. Masks hold class ids, uint8, `IGNORE` where a pixel does
not count. All losses are computed in float32, whatever precision the network ran in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from unet_ray.config import IGNORE, OptimizationConfig, UserError
from unet_ray.custom_parts import load
from unet_ray.registry import LOSSES, is_custom


@dataclass(frozen=True)
class Pixels:
    """The arrays from which a loss is computed."""

    logits: Tensor
    """float32 [N,K,H,W]."""
    mask: Tensor
    """uint8 [N,H,W]."""
    weights: Tensor
    """float32 [N,H,W], 0 where a pixel does not count."""

    @cached_property
    def cross_entropy(self) -> Tensor:
        """Cross-entropy of each pixel, float32 [N,H,W]: binary for a single logit, softmax for more. It is finite for
        ignored pixels too."""
        if self.logits.shape[1] == 1:
            target = (self.mask == 1).to(self.logits.dtype)
            return F.binary_cross_entropy_with_logits(self.logits[:, 0], target, reduction="none")
        return F.cross_entropy(self.logits, self.mask.long(), ignore_index=IGNORE, reduction="none")

    def mean(self, loss_NHW: Tensor) -> Tensor:
        """Returns the weighted mean over each image's pixels, float32 [N], as torch's cross-entropy takes it. It is 0
        for an image whose weights are all 0."""
        total = self.weights.sum(dim=(1, 2))
        return (loss_NHW * self.weights).sum(dim=(1, 2)) / torch.where(total > 0, total, 1)

    def sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns Σpt, Σp and Σt over each image's valid pixels, float32 [N,K] each: p are probabilities, t one-hot
        targets."""
        if self.logits.shape[1] == 1:
            probability, target = self.logits.sigmoid(), (self.mask == 1)[:, None]
        else:
            probability = self.logits.softmax(dim=1)
            classes = torch.arange(self.logits.shape[1], device=self.mask.device)
            target = self.mask[:, None] == classes[:, None, None]
        probability = probability * (self.mask != IGNORE)[:, None]
        return (probability * target).sum(dim=(2, 3)), probability.sum(dim=(2, 3)), target.sum(dim=(2, 3))


Term = Callable[[Pixels, OptimizationConfig], Tensor]


def cross_entropy(pixels: Pixels, _config: OptimizationConfig) -> Tensor:
    """Cross-entropy, weighted mean over an image's valid pixels; `bce` for a single logit, `ce` for more."""
    return pixels.mean(pixels.cross_entropy)


def focal(pixels: Pixels, config: OptimizationConfig) -> Tensor:
    """(1 - p) ** gamma * cross-entropy, p the probability of the true class (Lin et al. 2017, equation 4)."""
    # At 0 a power below 1 has no finite slope, so the base stays above 0.
    wrong = (-torch.expm1(-pixels.cross_entropy)).clamp(min=1e-7)
    return pixels.mean(wrong**config.focal_gamma * pixels.cross_entropy)


def dice(pixels: Pixels, config: OptimizationConfig) -> Tensor:
    """1 - soft Dice, (2 Σpt + 1) / (Σp + Σt + 1) over an image's valid pixels, mean over the classes.

    Milletari et al. 2016 with plain sums in the denominator. The 1 makes an empty class right when nothing is
    predicted. Classes: of a single logit the foreground; of more every class, the first included.
    """
    hit, predicted, true = pixels.sums()
    return _class_mean(1 - (2 * hit + 1) / (predicted + true + 1), config)


def tversky(pixels: Pixels, config: OptimizationConfig) -> Tensor:
    """1 - Tversky index, (TP + 1) / (TP + α FP + (1 - α) FN + 1) with soft counts (Salehi et al. 2017, equation 3).

    With α = 0.5 it is nearly Dice. Classes as in `dice`.
    """
    hit, predicted, true = pixels.sums()
    wrong = config.tversky_alpha * (predicted - hit) + (1 - config.tversky_alpha) * (true - hit)
    return _class_mean(1 - (hit + 1) / (hit + wrong + 1), config)


def _class_mean(loss_NK: Tensor, config: OptimizationConfig) -> Tensor:
    if isinstance(config.class_weights, str) or loss_NK.shape[1] == 1:
        return loss_NK.mean(dim=1)
    weights_K = torch.tensor(config.class_weights, device=loss_NK.device)
    return (loss_NK * weights_K).sum(dim=1) / weights_K.sum()


@dataclass(frozen=True, slots=True)
class Loss:
    """A sum of losses: (logits float [N,K,H,W], mask uint8 [N,H,W], border uint8 [N,H,W] or None) -> float32 [N].

    `border`: 255 where two objects touch, 0 far from any gap (`masks.border_map`).
    """

    terms: tuple[Term, ...]
    config: OptimizationConfig

    def __call__(self, logits_NKHW: Tensor, mask_NHW: Tensor, border_NHW: Tensor | None = None) -> Tensor:
        pixels = Pixels(logits_NKHW.float(), mask_NHW, pixel_weights(mask_NHW, border_NHW, self.config))
        return torch.stack([term(pixels, self.config) for term in self.terms]).sum(dim=0)


def pixel_weights(mask_NHW: Tensor, border_NHW: Tensor | None, config: OptimizationConfig) -> Tensor:
    """Returns w_c + w0 * border, float32 [N,H,W] (Ronneberger et al. 2015, equation 2); 0 where a pixel does not count.

    w_c: `class_weights`, for a single logit those of background and foreground; w0: `border_weight`.
    """
    weights = (mask_NHW != IGNORE).float()
    if not isinstance(config.class_weights, str):
        table = torch.zeros(256, device=mask_NHW.device)
        table[: len(config.class_weights)] = torch.tensor(config.class_weights, device=mask_NHW.device)
        weights = table[mask_NHW.int()]
    if border_NHW is not None and config.border_weight:
        weights = weights + (mask_NHW != IGNORE) * (config.border_weight / 255) * border_NHW.float()
    return weights


def build(config: OptimizationConfig, num_classes: int) -> Loss:
    """Builds the loss that the settings name. Class weights `inverse` must have been resolved to numbers."""
    assert config.class_weights != "inverse", "resolve class_weights first: see masks.inverse_frequencies"
    name = config.loss
    if name == "auto":
        name = "bce+dice" if num_classes == 1 else "ce+dice"
    return Loss(tuple(_custom(term) if is_custom(term) else load(LOSSES, term) for term in name.split("+")), config)


def _custom(name: str) -> Term:
    """Returns a loss of the user's own as a term: one number for each image."""
    function = load(LOSSES, name, "pixels", "config")

    def term(pixels: Pixels, config: OptimizationConfig) -> Tensor:
        loss, images = function(pixels, config), len(pixels.mask)
        shape = getattr(loss, "shape", type(loss).__name__)
        if shape not in ((), (images,)):
            raise UserError(
                f"{name} returns {list(shape) if isinstance(shape, torch.Size) else shape} for {images} images: one "
                "number for each, or for all, is needed"
            )
        return loss.expand(images)

    return term
