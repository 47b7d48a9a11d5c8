"""Counts the operations of a network."""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
from torch import Tensor, nn

from unet_ray.config import ModelConfig
from unet_ray.custom_parts import is_permitted
from unet_ray.models import SegmentationModel, build
from unet_ray.registry import is_custom


def without_weights(config: ModelConfig) -> SegmentationModel:
    """Builds a network on torch's meta device, without weights: this takes no memory and no time."""
    with torch.device("meta"):
        return build(dataclasses.replace(config, pretrained=False))


@functools.lru_cache(maxsize=16)
def floating_point_operations(config: ModelConfig, size_hw: tuple[int, int]) -> int:
    """Counts a network's operations on one image of this size; a multiplication with an addition counts as two. Returns
    0 for a network of the user's own whose operations can't be counted."""
    if is_custom(config.name) and not is_permitted(config.name):
        return 0
    try:
        model = without_weights(config).eval()
        by_area = model.grows_with_area and config.padding == "same" and not is_custom(config.name)
        return _by_area(model, size_hw) if by_area else _counted_by_torch(model, size_hw)
    except Exception:
        if not is_custom(config.name):
            raise
        return 0  # code that needs values, which the meta device has not


def _by_area(model: SegmentationModel, size_hw: tuple[int, int]) -> int:
    """Counts the convolutions on a small image, in 10 ms: torch's counter imports its compiler, which takes seconds."""
    side = 2 * model.step
    total = 0

    def count(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal total
        assert isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))
        # Each position of a transposed convolution's input, and of another's output, has the whole kernel once.
        places = inputs[0] if isinstance(layer, nn.ConvTranspose2d) else output
        total += 2 * math.prod(places.shape[-2:]) * layer.weight.numel()

    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            layer.register_forward_hook(count)
    # `to_empty` would import torch's compiler, too.
    tensors = {
        name: torch.zeros(t.shape, dtype=t.dtype) for name, t in [*model.named_parameters(), *model.named_buffers()]
    }
    image = torch.zeros(1, model.config.in_channels, side, side, dtype=torch.uint8)
    with torch.inference_mode():
        torch.func.functional_call(model, tensors, (image,))
    squares = math.prod(-(-length // model.step) for length in size_hw)
    return total * squares // (side // model.step) ** 2


def _counted_by_torch(model: SegmentationModel, size_hw: tuple[int, int]) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    config, counter = model.config, FlopCounterMode(display=False)
    sides = [length + 2 * config.margin for length in size_hw]
    with torch.device("meta"), counter:
        model(torch.empty(1, config.in_channels, *sides, dtype=torch.uint8))
    return counter.get_total_flops()
