"""A network of the user's own, see `custom_parts`, as one of ours.

Legend: N images, C channels, K classes (1: a single logit), H, W pixels.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from unet_ray import custom_parts, registry
from unet_ray.config import ModelConfig, UserError
from unet_ray.models.base import SegmentationModel

MULTIPLE_OF = 32
"""Sides are multiples of this, unless the network has its own `multiple_of`: five halvings, as in most encoders."""


class Custom(SegmentationModel):
    """Wraps a network that takes normalised pixels, float32 [N,C,H,W], and returns logits [N,K,H,W]."""

    def __init__(self, config: ModelConfig, make: Callable[[ModelConfig], nn.Module]) -> None:
        super().__init__(config, multiple_of=getattr(make, "multiple_of", MULTIPLE_OF))
        self.network = make(config)
        if not isinstance(self.network, nn.Module):
            raise UserError(f"{config.name} returns {type(self.network).__name__}: a torch.nn.Module is needed")
        if config.patch != 1:
            raise UserError(f"model.patch must be 1 with model.name={config.name}")

    @property
    def head(self) -> nn.Module:  # type: ignore[override]
        """The network's own `head`, or else the last layer it has defined."""
        layers = [each for each in self.network.modules() if isinstance(each, (nn.Conv2d, nn.ConvTranspose2d))]
        return getattr(self.network, "head", layers[-1] if layers else self.network)

    def body(self, x: Tensor) -> Tensor:
        return self.network(x)

    def bottleneck(self, x: Tensor) -> Tensor:
        """Computes the layer with the most channels, the last one of these."""
        found: list[Tensor] = [x]

        def look(_module: nn.Module, _inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and output.ndim == 4 and output.shape[1] >= found[0].shape[1]:
                found[0] = output

        hooks = [module.register_forward_hook(look) for module in self.network.modules()]
        try:
            self.network(x)
        finally:
            for hook in hooks:
                hook.remove()
        return found[0]


def build(config: ModelConfig) -> SegmentationModel:
    """Builds the custom network that the settings name. Raises UserError if its code fails."""
    make = custom_parts.load(registry.NETWORKS, config.name, "config")
    with custom_parts.explained(config.name):
        whole = isinstance(make, type) and issubclass(make, SegmentationModel)
        return make(config) if whole else Custom(config, make)
