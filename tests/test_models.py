"""All networks of the registry, and the baselines."""

import numpy as np
import pytest
import torch

from unet_ray.config import ModelConfig, UserError
from unet_ray.models import build, parameter_count
from unet_ray.models.baselines import otsu_threshold
from unet_ray.registry import NETWORKS

SMALL = {"base_channels": 4, "depth": 2}


def image(*size: int, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (1, channels, *size), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("patch", [1, 2])
def test_every_network_takes_any_size_and_channels_and_gives_each_weight_a_gradient(name, patch):
    if name == "smp":
        pytest.importorskip("segmentation_models_pytorch")
    model = build(ModelConfig(name=name, in_channels=4, num_classes=3, patch=patch, **SMALL))
    logits = model(torch.cat([image(45, 66, channels=4), image(45, 66, channels=4).flip(3)]))
    assert logits.shape == (2, 3, 45, 66)
    assert torch.isfinite(logits).all()
    logits.square().mean().backward()
    unused = [key for key, p in model.named_parameters() if p.grad is None]
    assert not unused
    last = {id(p) for p in model.head.parameters()}
    assert last <= {id(p) for p in model.parameters()}


def test_attention_gates_close_and_open():
    model = build(ModelConfig(name="attention_unet", **SMALL)).eval()
    gate = model.gate[0]
    skip, below = torch.randn(1, 4, 8, 8), torch.randn(1, 8, 4, 4)
    for bias, expected in ((50.0, skip), (-50.0, torch.zeros_like(skip))):
        torch.nn.init.zeros_(gate.to_weight.weight)
        torch.nn.init.constant_(gate.to_weight.bias, bias)
        assert torch.allclose(gate(skip, below), expected, atol=1e-6)


def test_unet_plus_plus_has_a_node_for_each_pair_of_figure_1():
    model = build(ModelConfig(name="unet++", base_channels=4, depth=4))
    assert sorted(model.join) == sorted(f"{i}_{j}" for j in range(1, 5) for i in range(5 - j))
    assert model.join["0_4"][0].in_channels == 5 * 4
    assert parameter_count(model) > parameter_count(build(ModelConfig(base_channels=4, depth=4)))


def test_deep_supervision_trains_a_head_for_each_node_of_the_finest_level_and_finds_their_mean():
    model = build(ModelConfig(name="unet++", deep_supervision=True, patch=2, num_classes=3, **SMALL | {"depth": 3}))
    pictures = image(20, 26)
    heads = model.train()(pictures)
    assert heads.shape == (3, 1, 3, 20, 26)
    model.zero_grad()
    heads[0].sum().backward()  # the first head reads node (0, 1) alone
    assert model.up["0_1"].conv.weight.grad is not None and model.up["0_2"].conv.weight.grad.abs().sum() == 0
    for norm in filter(lambda module: isinstance(module, torch.nn.BatchNorm2d), model.modules()):
        norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    assert torch.allclose(model.eval()(pictures), model.train()(pictures).mean(dim=0), atol=1e-5)
    with pytest.raises(UserError, match=r"deep_supervision is for model\.name=unet\+\+"):
        ModelConfig(deep_supervision=True)


@pytest.mark.parametrize("name", ["unet", "unet++"])
def test_checkpointed_activations_give_the_same_gradients_and_statistics(name):
    torch.manual_seed(0)
    plain, again = (build(ModelConfig(name=name, norm="batch", dropout=0.3, **SMALL)).train() for _ in range(2))
    again.load_state_dict(plain.state_dict())
    again.checkpoint_activations = True
    for model in (plain, again):
        torch.manual_seed(1)
        model(image(16, 16)).square().mean().backward()
    for (key, one), (_, other) in zip(plain.named_parameters(), again.named_parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-6), key
    for (key, one), (_, other) in zip(plain.named_buffers(), again.named_buffers(), strict=True):
        assert key.endswith("num_batches_tracked") or torch.equal(one, other), key


def test_otsu_splits_where_the_variance_between_classes_is_largest():
    generator = np.random.default_rng(0)
    levels = np.concatenate([generator.normal(60, 10, 500), generator.normal(170, 20, 300)]).clip(0, 255).round()
    threshold = int(otsu_threshold(torch.from_numpy(levels)))

    def between(t):
        low, high = levels[levels <= t], levels[levels > t]
        return len(low) * len(high) * (low.mean() - high.mean()) ** 2

    assert between(threshold) == pytest.approx(max(between(t) for t in range(30, 200)))
    assert 60 < threshold < 170


def test_pixels_are_normalised_channel_by_channel():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    for patch in (1, 2):
        model = build(ModelConfig(pixel_mean=mean, pixel_std=std, norm="none", patch=patch, **SMALL)).eval()
        seen = []
        model.down[0].register_forward_pre_hook(lambda _module, args, seen=seen: seen.append(args[0]))
        model(torch.full((1, 3, 8, 8), 255, dtype=torch.uint8))
        expected = [(1 - m) / s for m, s in zip(mean, std, strict=True) for _ in range(patch**2)]
        assert seen[0].mean(dim=(0, 2, 3)).tolist() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(UserError, match="pixel_mean has 3 entries: 1 channels"):
        ModelConfig(in_channels=1, pixel_mean=mean)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "unet++", "padding": "valid"}, "padding must be same"),
        ({"padding": "valid", "up": "bilinear"}, "up must be transpose"),
        ({"pretrained": True}, "pretrained is for"),
    ],
)
def test_contradicting_settings_are_errors(settings, message):
    with pytest.raises(UserError, match=message):
        ModelConfig(**settings)
