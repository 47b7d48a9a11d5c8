"""Operations are counted as torch counts them, without what torch imports for that."""

import pytest
from conftest import loaded_after

from unet_ray.config import ModelConfig
from unet_ray.models.operations import _by_area, _counted_by_torch, without_weights


@pytest.mark.parametrize("size", [(512, 512), (360, 480), (33, 500)], ids=str)
@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(),
        ModelConfig(name="attention_unet", base_channels=8),
        ModelConfig(name="unet++", base_channels=8),
        ModelConfig(name="unet++", base_channels=8, deep_supervision=True),
        ModelConfig(base_channels=16, depth=5, growth=1.5, patch=2),
        ModelConfig(base_channels=8, up="bilinear", num_classes=5, in_channels=1, norm="instance"),
        ModelConfig(encoder="efficientnet_lite0"),
    ],
    ids=lambda config: f"{config.name}-{config.up}-{config.patch}-{config.has_own_encoder}",
)
def test_convolutions_grow_with_the_area(config, size):
    counted = _counted_by_torch(without_weights(config).eval(), size)
    assert _by_area(without_weights(config).eval(), size) == counted > 0


def test_counting_does_not_import_torchs_compiler():
    code = (
        "from unet_ray.config import ModelConfig; from unet_ray.models import operations\n"
        "for config in (ModelConfig(base_channels=4), ModelConfig(encoder='efficientnet_lite0')):\n"
        "    assert operations.floating_point_operations(config, (64, 64)) > 0\n"
    )
    assert not {"torch._dynamo", "sympy", "torchvision"} & loaded_after(code)
