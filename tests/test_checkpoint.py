"""Model directories: whole ones can be read, damaged ones are refused."""

import json

import pytest
from runs import config_for

from unet_ray.config import ModelConfig, UserError
from unet_ray.data import storage
from unet_ray.models import build, checkpoint, training_state
from unet_ray.ray_backend.session import LOCAL
from unet_ray.training.run import train


def test_weights_of_another_model_are_refused(discs, tmp_path):
    train(config_for(discs, ("train.epochs", 1)), str(tmp_path / "run"), runtime=LOCAL)
    model = tmp_path / "run/model"
    good = (model / "model.safetensors").read_bytes()
    for bad, message in ((good[:-4] + b"\0\0\0\0", "damaged"), (good[:-4], "damaged"), (good[:40], "not a model's")):
        (model / "model.safetensors").write_bytes(bad)
        with pytest.raises(UserError, match=message):
            checkpoint.load_model(str(model))
    (model / "model.safetensors").write_bytes(good)
    card = json.loads((model / "model.json").read_text())
    (model / "model.json").write_text(json.dumps({**card, "mask_values": [0, 7]}))
    with pytest.raises(UserError, match="of different models"):
        checkpoint.load_model(str(model))
    (model / "model.json").write_text("{}")
    with pytest.raises(UserError, match="not a model card"):
        checkpoint.load_model(str(model))


def test_a_kill_between_the_two_files_of_the_best_model_leaves_a_model(discs, tmp_path):
    train(config_for(discs, ("train.epochs", 3)), str(tmp_path / "run"), runtime=LOCAL)
    card = json.loads((tmp_path / "run/model/model.json").read_text())
    older = {**card, "scores": {"epoch": 1}, "weights_sha256": "0" * 64}
    (tmp_path / "run/model/model.json").write_text(json.dumps(older))
    _, loaded = checkpoint.load_model(str(tmp_path / "run/model"))
    assert (loaded.scores, loaded.weights_sha256) == (card["scores"], card["weights_sha256"])


def test_the_last_layer_of_other_networks_is_found_too():
    model = build(ModelConfig(name="fcn"))
    assert checkpoint._of_head(model) == {"network.classifier.4.weight", "network.classifier.4.bias"}


def test_only_the_header_of_a_state_is_read_to_know_its_epoch(discs, tmp_path, monkeypatch):
    train(config_for(discs, ("train.epochs", 1)), str(tmp_path / "run"), runtime=LOCAL)

    def whole(_location: str) -> bytes:
        raise AssertionError("the whole file was read")

    monkeypatch.setattr(storage, "read_bytes", whole)
    assert training_state.read_state(str(tmp_path / "run/last")).epoch == 1
    monkeypatch.undo()
    for damaged in (b"\xff" * 20, b"\x05" + bytes(7) + b"{oops"):
        (tmp_path / "run/last/state.safetensors").write_bytes(damaged)
        with pytest.raises(UserError, match=r"state.safetensors: damaged"):
            training_state.read_state(str(tmp_path / "run/last"))
