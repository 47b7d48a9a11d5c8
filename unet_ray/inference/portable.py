"""A network that takes and gives what other programs have: pixels in, probabilities or class ids out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unet_ray.models.base import SegmentationModel


class Portable(nn.Module):
    """Wraps a network: image uint8 [1,H,W,C] -> probabilities float32 [1,K,H,W], or class ids uint8 [1,H,W].

    Padding, normalisation and the decision are inside. It has no branch that depends on the image's size, so that a
    trace holds for every size: pixels beyond the edges are looked up. The network must be in evaluation mode.
    """

    def __init__(self, model: SegmentationModel, threshold: float | None = None) -> None:
        """`threshold`: return class ids; of one class 1 where the probability is above this. None: probabilities."""
        super().__init__()
        self.model, self.threshold = model, threshold
        self.padded, self.step, self.margin = model.config.padding == "same", model.step, model.config.margin

    def forward(self, image_NHWC: Tensor) -> Tensor:
        image = image_NHWC.permute(0, 3, 1, 2)
        height, width = image.shape[2], image.shape[3]
        beyond = self._continued if self.padded else self._mirrored
        extended = image.index_select(2, beyond(height, image)).index_select(3, beyond(width, image))
        logits = self.model.of_fitting(extended)
        if self.padded:
            # A slice would hold for sizes that need padding, or for those that need none, but not for both.
            rows, columns = torch.arange(height, device=image.device), torch.arange(width, device=image.device)
            logits = logits.index_select(2, rows).index_select(3, columns)
        shares = logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(dim=1)
        if self.threshold is None:
            return shares
        ids = shares[:, 0] > self.threshold if shares.shape[1] == 1 else shares.argmax(dim=1)
        return ids.to(torch.uint8)

    def _continued(self, length: int, like: Tensor) -> Tensor:
        """Returns positions on a side up to the next multiple of `step`; the last pixel is repeated."""
        full = (length + self.step - 1) // self.step * self.step
        return torch.arange(full, device=like.device).clamp(max=length - 1)

    def _mirrored(self, length: int, like: Tensor) -> Tensor:
        """Returns positions on a side with `margin` more at its ends, mirrored there, as `models.tiles.mirrored`."""
        period = 2 * (length - 1)
        position = torch.remainder(torch.arange(-self.margin, length + self.margin, device=like.device), period)
        return torch.minimum(position, period - position)
