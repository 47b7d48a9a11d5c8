"""OpenVINO and compiled networks give the same output as torch, and `auto` chooses between them."""

import pytest
import torch
from conftest import make_model

from unet_ray.config import UserError
from unet_ray.inference import backends
from unet_ray.inference.backends import RuntimeOptions
from unet_ray.inference.segmenter import BatchSegmenter
from unet_ray.models import checkpoint, compiling, device

CPU = torch.device("cpu")
NETWORKS = {
    "unet": [],
    "patch": [("model.patch", 2)],
    "group norm": [("model.norm", "group")],
    "instance norm": [("model.norm", "instance")],
    "bilinear": [("model.up", "bilinear")],
    "attention": [("model.name", "attention_unet")],
    "nested": [("model.name", "unet++")],
    "valid": [("model.padding", "valid"), ("model.depth", 2), ("data.tile", 40), ("data.image_size", 100)],
    "classes": [("model.num_classes", 3), ("data.mask_values", [0, 1, 2])],
    "fcn": [("model.name", "fcn")],
}


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "unet_ray"]


@pytest.mark.parametrize("name", NETWORKS)
def test_openvino_gives_what_torch_gives_for_any_size(tmp_path, name):
    pytest.importorskip("openvino")
    make_model(tmp_path, *NETWORKS[name])
    by_torch, card = backends.load(str(tmp_path), RuntimeOptions(CPU, "fp32", "torch"))
    by_openvino, _ = backends.load(str(tmp_path), RuntimeOptions(CPU, "fp32", "openvino"))
    sides = [(44 + 40, 44 + 40), (44 + 44, 44 + 40)] if card.model.padding == "valid" else [(64, 64), (50, 97), (7, 3)]
    for side in sides if name != "instance norm" else sides[:2]:  # one value has no variance
        image = noise(1, 3, *side)
        with torch.inference_mode():
            expected, found = by_torch(image), by_openvino(image)
        assert found.shape == expected.shape
        assert torch.allclose(found, expected, atol=2e-3, rtol=2e-3)


def test_openvinos_network_is_kept_beside_the_model_until_its_weights_change(tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    make_model(tmp_path)
    kept = []
    for seed in (0, 0, 1):
        make_model(tmp_path, seed=seed)
        BatchSegmenter(str(tmp_path), precision="fp32")
        kept.append(sorted(path.name for path in (tmp_path / backends.EXPORTED).iterdir()))
    assert kept[0] == kept[1] != kept[2]
    assert [len(names) for names in kept] == [2, 2, 2]
    image = noise(1, 3, 64, 64)
    by_torch, _ = backends.load(str(tmp_path), RuntimeOptions(CPU, "fp32", "torch"))
    monkeypatch.setattr(backends, "export", None)  # the kept network is read, not exported again
    by_openvino, _ = backends.load(str(tmp_path), RuntimeOptions(CPU, "fp32", "openvino"))
    with torch.inference_mode():
        assert torch.allclose(by_openvino(image), by_torch(image), atol=2e-3, rtol=2e-3)


def test_a_model_folder_that_cannot_be_written_does_not_stop_openvino(tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    make_model(tmp_path)

    def refuse(*_arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(backends, "write", refuse)
    network, _ = backends.load(str(tmp_path), RuntimeOptions(CPU, "fp32", "openvino"))
    assert network(noise(1, 3, 64, 64)).shape == (1, 1, 64, 64)
    assert not (tmp_path / backends.EXPORTED).exists()


def test_torch_runs_what_openvino_cannot_and_one_line_says_so(tmp_path, monkeypatch, caplog):
    pytest.importorskip("openvino")
    make_model(tmp_path)

    def fail(*_arguments: object) -> None:
        raise RuntimeError("no such operation\nat line 1")

    monkeypatch.setattr(backends, "export", fail)
    network, _ = backends.load(str(tmp_path), RuntimeOptions(CPU))
    assert isinstance(network, backends.Torch)
    assert logged(caplog) == ["OpenVINO can't run this network, torch does: no such operation"]
    with pytest.raises(UserError, match="no such operation"):
        backends.load(str(tmp_path), RuntimeOptions(CPU, backend="openvino"))


def test_a_converted_network_that_gives_something_else_is_not_used(tmp_path, monkeypatch):
    openvino = pytest.importorskip("openvino")
    model, card = checkpoint.load_model(str(make_model(tmp_path / "one")))
    other, _ = checkpoint.load_model(str(make_model(tmp_path / "other", seed=1)))
    convert = openvino.convert_model

    def another(_traced: torch.jit.ScriptModule, **options: object):
        traced = torch.jit.trace(backends._ChannelsLast(other.eval()), noise(1, 64, 64, 3), check_trace=False)
        return convert(traced, **options)

    monkeypatch.setattr(openvino, "convert_model", another)
    with pytest.raises(backends._DiffersError):
        backends.export(model.eval(), card)


def test_a_compiled_network_gives_what_torch_gives_and_without_a_compiler_torch_runs_it(tmp_path, monkeypatch, caplog):
    make_model(tmp_path)
    image = noise(1, 3, 64, 64)
    plain, _ = backends.load(str(tmp_path), RuntimeOptions(CPU, "fp32", "torch"))
    compiled, _ = backends.load(str(tmp_path), RuntimeOptions(CPU, "fp32", "compiled"))
    with torch.inference_mode():
        assert torch.allclose(compiled(image), plain(image), atol=1e-4, rtol=1e-4)
        assert not logged(caplog)
        broken, _ = backends.load(str(tmp_path), RuntimeOptions(CPU, "fp32", "compiled"))

        def refuse(_image: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("No working C++ compiler found")

        assert isinstance(broken, backends.Torch) and isinstance(broken.run, compiling.Compiled)
        broken.run.run = refuse
        for _ in range(2):
            assert torch.equal(broken(image), plain(image))
    assert logged(caplog) == ["this network can't be compiled here, it runs uncompiled: No working C++ compiler found"]


def test_compiling_is_for_many_images_of_a_large_network(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "bf16_is_fast", lambda _device: True)
    small = checkpoint.read_card(str(make_model(tmp_path / "small")))
    settings = [("model.base_channels", 64), ("model.depth", 4), ("data.image_size", 512)]
    large = checkpoint.read_card(str(make_model(tmp_path / "large", *settings)))
    operations = compiling.floating_point_operations(large.model, large.image_size)
    assert operations == pytest.approx(385e9, rel=0.01)  # U-Net of base 64 at 512x512
    assert not backends.compiling_pays(large, RuntimeOptions(CPU, images=0))
    assert not backends.compiling_pays(large, RuntimeOptions(CPU, images=100))
    assert backends.compiling_pays(large, RuntimeOptions(CPU, images=100_000))
    assert not backends.compiling_pays(small, RuntimeOptions(CPU, images=100_000))
    assert not backends.compiling_pays(large, RuntimeOptions(CPU, "fp32", images=100_000))


def test_what_is_not_installed_or_not_made_yet_is_refused_with_the_remedy(tmp_path, monkeypatch):
    location = str(make_model(tmp_path))
    with pytest.raises(UserError, match="unet-ray quantize"):
        BatchSegmenter(location, precision="int8")
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(UserError, match=r"unet_ray\[cpu\]"):
        BatchSegmenter(location, backend="openvino")
    with pytest.raises(UserError, match=r"unet_ray\[cpu\]"):
        BatchSegmenter(location, precision="int8")
    assert isinstance(backends.load(location, RuntimeOptions(CPU))[0], backends.Torch)
