"""What training minimises. Every loss is one number an image, so that a batch's mean does not depend on how the batch
is divided among workers.

Legend: N images, K classes, H, W pixels. `mask` holds class ids, uint8, `IGNORE` where a pixel does not count.
All are computed in float32, whatever precision the network ran in.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from unet_ray.config import IGNORE

Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits float [N,K,H,W], mask uint8 [N,H,W]) -> float32 [N]."""


def build(name: str, num_classes: int) -> Loss:
    """The loss of a setting such as `bce+dice`: the sum of its terms, each as it is with weight 1."""
    if name == "auto":
        name = "bce+dice" if num_classes == 1 else "ce+dice"
    terms = [LOSSES[term] for term in name.split("+")]

    def total(logits_NKHW: Tensor, mask_NHW: Tensor) -> Tensor:
        logits_NKHW = logits_NKHW.float()
        return torch.stack([term(logits_NKHW, mask_NHW) for term in terms]).sum(dim=0)

    return total


def bce(logits_N1HW: Tensor, mask_NHW: Tensor) -> Tensor:
    """Binary cross-entropy with logits, mean over an image's valid pixels."""
    valid = mask_NHW != IGNORE
    target = (mask_NHW == 1).to(logits_N1HW.dtype)
    loss = F.binary_cross_entropy_with_logits(logits_N1HW[:, 0], target, reduction="none")
    return _valid_mean(loss, valid)


def ce(logits_NKHW: Tensor, mask_NHW: Tensor) -> Tensor:
    """Softmax cross-entropy, mean over an image's valid pixels."""
    valid = mask_NHW != IGNORE
    loss = F.cross_entropy(logits_NKHW, mask_NHW.long(), ignore_index=IGNORE, reduction="none")
    return _valid_mean(loss, valid)


def dice(logits_NKHW: Tensor, mask_NHW: Tensor) -> Tensor:
    """1 - soft Dice, (2 Σpt + 1) / (Σp + Σt + 1) over an image's valid pixels (Milletari et al. 2016 with plain sums in
    the denominator; the 1 makes an empty class right when nothing is predicted), mean over the classes.

    One class: of the foreground. More: of every class, the first included.
    """
    valid = mask_NHW != IGNORE
    if logits_NKHW.shape[1] == 1:
        probability, target = logits_NKHW.sigmoid(), (mask_NHW == 1)[:, None]
    else:
        probability = logits_NKHW.softmax(dim=1)
        classes = torch.arange(logits_NKHW.shape[1], device=mask_NHW.device)
        target = mask_NHW[:, None] == classes[:, None, None]
    probability = probability * valid[:, None]
    overlap = (probability * target).sum(dim=(2, 3))
    total = probability.sum(dim=(2, 3)) + target.sum(dim=(2, 3))
    return (1 - (2 * overlap + 1) / (total + 1)).mean(dim=1)


def _valid_mean(loss_NHW: Tensor, valid_NHW: Tensor) -> Tensor:
    """Mean over valid pixels, an image at a time; 0 for an image that has none."""
    return (loss_NHW * valid_NHW).sum(dim=(1, 2)) / valid_NHW.sum(dim=(1, 2)).clamp(min=1)


LOSSES: dict[str, Loss] = {"bce": bce, "ce": ce, "dice": dice}
