"""The U-Net: shapes, number of weights, receptive field, normalisation."""

import itertools

import pytest
import torch

from unet_ray.config import ModelConfig
from unet_ray.models import build, parameter_count
from unet_ray.models.tiles import mirror_margin

SMALL = {"base_channels": 4, "depth": 2}


def image(*size: int, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (1, channels, *size), generator=generator, dtype=torch.uint8)


def test_without_norm_it_has_the_31_million_parameters_of_the_annotated_guide():
    assert parameter_count(build(ModelConfig(norm="none"))) == 31_031_745
    # The same network with two outputs and batch norm in place of biases is the other well-known count.
    assert parameter_count(build(ModelConfig(norm="batch", num_classes=2))) == 31_037_698


def test_the_2015_network_turns_572_pixels_into_388():
    with torch.inference_mode():
        assert build(ModelConfig(padding="valid", base_channels=2)).eval()(image(572, 572)).shape[-2:] == (388, 388)


@pytest.mark.parametrize(
    ("norm", "up", "patch", "growth"),
    [
        *itertools.product(["none", "batch", "group", "instance"], ["transpose", "bilinear"], [1], [2]),
        ("batch", "transpose", 2, 1.5),
    ],
)
def test_same_padding_takes_any_size_and_gives_a_mask_of_that_size(norm, up, patch, growth):
    model = build(ModelConfig(norm=norm, up=up, patch=patch, growth=growth, num_classes=3, **SMALL))
    for size in [(32, 32), (33, 47), (5, 64)]:
        logits = model(image(*size))
        assert logits.shape == (1, 3, *size)
        assert torch.isfinite(logits).all()


def test_valid_padding_removes_a_margin_that_mirroring_restores():
    config = ModelConfig(padding="valid", **SMALL)
    size = next(s for s in range(20, 60) if config.fits(s))
    model = build(config).eval()
    whole = mirror_margin(image(size, size), config.margin)
    assert model(whole).shape[-2:] == (size, size)


def test_unpadded_output_equals_padded_output_far_from_the_border():
    """Same weights, same pixels in sight: padding can only matter near the border."""
    same, valid = (build(ModelConfig(norm="none", padding=p, **SMALL)).eval() for p in ("same", "valid"))
    valid.load_state_dict(same.state_dict())
    margin = valid.config.margin
    side = 2 * margin + 60
    with torch.inference_mode():
        inner = valid(image(side, side))
        # Two convolutions come before the first pooling, so the unpadded network's pooling grid starts 2 pixels in.
        outer = same(image(side, side)[..., 2:, 2:])[..., margin - 2 : margin + 58, margin - 2 : margin + 58]
    deep = slice(margin, 60 - margin)
    assert torch.allclose(inner[..., deep, deep], outer[..., deep, deep], atol=1e-4)


def test_the_margin_is_mirrored_without_repeating_the_border_pixel():
    row = torch.tensor([[[[1, 2, 3]]]], dtype=torch.uint8)
    assert mirror_margin(row, 2)[0, 0, 2].tolist() == [3, 2, 1, 2, 3, 2, 1]
    assert mirror_margin(row, 5).shape[-2:] == (11, 13)


def test_pixels_are_normalised_inside():
    model = build(ModelConfig(norm="none", pixel_mean=0.5, pixel_std=0.25, **SMALL)).eval()
    seen = []
    model.down[0].register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    model(torch.tensor([0, 255], dtype=torch.uint8).reshape(1, 1, 1, 2).expand(1, 3, 4, 2))
    assert seen[0][..., :2].unique().tolist() == pytest.approx([-2.0, 2.0])


def test_initialisation_keeps_the_size_of_activations():
    torch.manual_seed(0)
    model = build(ModelConfig(norm="none", depth=4, base_channels=16)).eval()
    with torch.inference_mode():
        spread = model(image(64, 64)).std()
    assert 0.05 < spread < 20


def test_dropout_acts_only_in_training():
    model = build(ModelConfig(dropout=0.5, norm="none", **SMALL))
    model.eval()
    assert torch.equal(model(image(16, 16)), model(image(16, 16)))
    model.train()
    assert not torch.equal(model(image(16, 16)), model(image(16, 16)))
