"""OpenVINO and compiled networks give the same output as torch, or say why they can't."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import make_model

from unet_ray.config import UserError
from unet_ray.inference import backends
from unet_ray.inference.arithmetic import Arithmetic
from unet_ray.inference.certainty import Certainty
from unet_ray.inference.segmenter import BatchSegmenter
from unet_ray.models import checkpoint, compiling

TORCH, COMPILED, OPENVINO = (Arithmetic("cpu", backend, "fp32") for backend in ("torch", "compiled", "openvino"))
NETWORKS = {
    "unet": [],
    "patch": [("model.patch", 2)],
    "group norm": [("model.norm", "group")],
    "instance norm": [("model.norm", "instance")],
    "bilinear": [("model.up", "bilinear")],
    "attention": [("model.name", "attention_unet")],
    "nested": [("model.name", "unet++"), ("model.deep_supervision", "true")],
    "valid": [("model.padding", "valid"), ("model.depth", 2), ("data.tile", 40), ("data.image_size", 100)],
    "classes": [("model.num_classes", 3), ("data.mask_values", [0, 1, 2])],
    "fcn": [("model.name", "fcn")],
}


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NETWORKS)
def test_openvino_gives_what_torch_gives_for_any_size(tmp_path, name):
    pytest.importorskip("openvino")
    make_model(tmp_path, *NETWORKS[name])
    by_torch, card = backends.load(str(tmp_path), TORCH)
    by_openvino, _ = backends.load(str(tmp_path), OPENVINO)
    sides = [(44 + 40, 44 + 40), (44 + 44, 44 + 40)] if card.model.padding == "valid" else [(64, 64), (50, 97), (7, 3)]
    for side in sides if name != "instance norm" else sides[:2]:  # one value has no variance
        image = noise(1, 3, *side)
        with torch.inference_mode():
            expected, found = by_torch(image), by_openvino(image)
        assert found.shape == expected.shape
        assert torch.allclose(found, expected, atol=2e-3, rtol=2e-3)


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


def test_openvino_computes_images_at_the_same_time_and_keeps_them_apart(tmp_path, three_threads):
    pytest.importorskip("openvino")
    make_model(tmp_path)
    one_by_one, _ = backends.load(str(tmp_path), OPENVINO, one_by_one=True)
    network, _ = backends.load(str(tmp_path), OPENVINO)
    assert isinstance(network, backends.OpenVino) and network.streams == three_threads
    image = noise(23, 3, 40, 56)
    expected = torch.cat([one_by_one(each[None]) for each in image])
    assert torch.equal(network(image), expected)
    with ThreadPoolExecutor(4) as callers:  # as of a server
        parts = list(callers.map(network, image.split(5)))
    assert torch.equal(torch.cat(parts), expected)


def test_torchs_threads_leave_the_cores_to_openvinos(tmp_path, three_threads, monkeypatch):
    pytest.importorskip("openvino")
    make_model(tmp_path)
    seen, of = [], Certainty.of
    monkeypatch.setattr(Certainty, "of", lambda logits: seen.append(torch.get_num_threads()) or of(logits))
    for arithmetic, threads in ((OPENVINO, 1), (TORCH, three_threads)):
        BatchSegmenter(str(tmp_path), arithmetic)(noise(1, 32, 32, 3).numpy())
        assert seen.pop() == threads and torch.get_num_threads() == three_threads


def test_openvinos_network_is_kept_beside_the_model_until_its_weights_change(tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    make_model(tmp_path)
    kept = []
    for seed in (0, 0, 1):
        make_model(tmp_path, seed=seed)
        BatchSegmenter(str(tmp_path), OPENVINO)
        kept.append(sorted(path.name for path in (tmp_path / backends.EXPORTED).iterdir()))
    assert kept[0] == kept[1] != kept[2]
    assert [len(names) for names in kept] == [3, 3, 3]
    image = noise(1, 3, 64, 64)
    by_torch, _ = backends.load(str(tmp_path), TORCH)
    monkeypatch.setattr(backends, "export", None)  # the kept network is read, not exported again
    by_openvino, _ = backends.load(str(tmp_path), OPENVINO)
    with torch.inference_mode():
        assert torch.allclose(by_openvino(image), by_torch(image), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("damage", ["cut", "flipped", "another version"])
def test_a_kept_network_that_is_damaged_or_of_another_version_is_made_again(tmp_path, monkeypatch, damage):
    pytest.importorskip("openvino")
    make_model(tmp_path)
    whole, _ = backends.load(str(tmp_path), OPENVINO)
    [weights] = (tmp_path / backends.EXPORTED).glob("*.bin")
    data = bytearray(weights.read_bytes())
    if damage == "another version":
        monkeypatch.setattr(backends, "__version__", "99.0")
    elif damage == "flipped":
        data[len(data) // 2] ^= 64
        weights.write_bytes(data)
    else:
        weights.write_bytes(data[: len(data) // 2])
    made = []
    export = backends.export
    monkeypatch.setattr(backends, "export", lambda *given: made.append(1) or export(*given))
    again, _ = backends.load(str(tmp_path), OPENVINO)
    backends.load(str(tmp_path), OPENVINO)
    assert made == [1], "made again once, and kept"
    assert len(list((tmp_path / backends.EXPORTED).iterdir())) == 3
    assert torch.equal(whole(noise(1, 3, 64, 64)), again(noise(1, 3, 64, 64)))


def test_a_model_folder_that_cannot_be_written_does_not_stop_openvino(tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    make_model(tmp_path)

    def refuse(*_arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(backends, "write", refuse)
    network, _ = backends.load(str(tmp_path), OPENVINO)
    assert network(noise(1, 3, 64, 64)).shape == (1, 1, 64, 64)
    assert not (tmp_path / backends.EXPORTED).exists()


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


def test_a_compiled_network_gives_what_torch_gives_and_without_a_compiler_it_says_what_to_do(tmp_path):
    make_model(tmp_path)
    image = noise(1, 3, 64, 64)
    plain, _ = backends.load(str(tmp_path), TORCH)
    compiled, _ = backends.load(str(tmp_path), COMPILED)
    with torch.inference_mode():
        assert torch.allclose(compiled(image), plain(image), atol=1e-4, rtol=1e-4)
        broken, _ = backends.load(str(tmp_path), COMPILED)

        def refuse(_image: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("No working C++ compiler found")

        assert isinstance(broken, backends.Torch) and isinstance(broken.run, compiling.Compiled)
        broken.run.run = refuse
        with pytest.raises(UserError, match=r"can't compile this network: No working C\+\+.* Use --backend torch"):
            broken(image)
