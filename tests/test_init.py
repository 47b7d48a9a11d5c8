"""`train.init`: a training that starts from the weights of another model."""

import dataclasses
import shutil

import pytest
import torch
from conftest import TINY, make_model
from runs import assert_same_state, config_for, lines

from unet_ray.config import UserError
from unet_ray.models import checkpoint
from unet_ray.ray_backend import session
from unet_ray.ray_backend.session import LOCAL
from unet_ray.settings import load_train_config
from unet_ray.training.run import train
from unet_ray.training.step import prepare


@pytest.fixture
def given(tmp_path):
    """Returns a model directory whose weights and running statistics differ from any new network's."""
    location = make_model(tmp_path / "given", ("model.num_classes", 3), ("data.mask_values", [0, 1, 2]), seed=99)
    model, _ = checkpoint.load_model(str(location))
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor += 0.125
    config = load_train_config(
        settings=[*TINY, *checkpoint.model_settings_of(str(location)), ("data.mask_values", [0, 1, 2])]
    )
    checkpoint.save_model(str(location), model, config, {})
    return str(location)


def prepared(location, *settings, resumes=False):
    """Returns the tensors by name of each network, the trained and the averaged one, before the first step."""
    settings = [*TINY, *checkpoint.model_settings_of(location), ("train.init", location), ("train.ema", 0.9), *settings]
    training = prepare(load_train_config(settings=settings), torch.device("cpu"), resumes=resumes)
    return [network.state_dict() for network in training.networks]


def test_a_training_starts_from_the_weights_of_init_and_so_does_their_average(given):
    expected = checkpoint.load_model(given)[0].state_dict()
    for tensors in prepared(given, ("model.dropout", 0.2)):
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    fresh = prepared(given, resumes=True)[0]  # the weights then come from a state
    assert not any(torch.equal(fresh[name], expected[name]) for name in expected if name.endswith("weight"))


def test_a_last_layer_of_other_classes_is_left_as_it_is_initialised(given):
    expected = checkpoint.load_model(given)[0].state_dict()
    tensors = prepared(given, ("model.num_classes", 1))[0]
    fresh = prepared(given, ("model.num_classes", 1), resumes=True)[0]
    assert tensors["head.weight"].shape[0] == 1
    for name in expected:
        assert torch.equal(tensors[name], fresh[name] if name.startswith("head.") else expected[name]), name


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (("model.base_channels", 8), "its model.base_channels is 4, not 8: set model.base_channels to 4"),
        (("model.norm", "group"), "its model.norm is batch, not group"),
        (("model.pixel_mean", 0), "its model.pixel_mean is 0.5, not 0.0"),
        (("train.init", "none"), "none: no such folder"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_anything_is_written(
    discs, given, tmp_path, setting, message, monkeypatch
):
    settings = [*checkpoint.model_settings_of(given), ("model.num_classes", 1), ("train.init", given), setting]
    monkeypatch.setattr(session, "ray_session", lambda *_arguments: pytest.fail("Ray is started"))
    with pytest.raises(UserError, match=message) as error:
        train(config_for(discs, *settings), str(tmp_path / "run"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_fine_tuned_run_resumes_without_the_weights_it_began_with(discs, given, tmp_path, monkeypatch):
    settings = [*checkpoint.model_settings_of(given), ("model.num_classes", 1), ("train.epochs", 4)]
    monkeypatch.chdir(tmp_path)
    config = config_for(discs, *settings, ("train.init", "given"))
    train(config, "whole", runtime=LOCAL)
    stopped = dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=2))
    train(stopped, "run", runtime=LOCAL)
    kept = load_train_config(config_file=(tmp_path / "run/config.yaml").read_text())
    assert kept.train.init == given  # absolute
    shutil.rmtree(given)
    train(config, "run", runtime=LOCAL, resume=True)
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    assert_same_state(tmp_path / "run", tmp_path / "whole")
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, init=None, epochs=5))
    with pytest.raises(UserError, match="trained with other settings"):
        train(other, "run", runtime=LOCAL, resume=True)


def test_the_settings_of_a_network_build_it_again(given):
    settings = dict(checkpoint.model_settings_of(given))
    assert (settings["model.num_classes"], settings["model.base_channels"]) == (3, 4)
    assert load_train_config(settings=settings.items()).model == checkpoint.read_card(given).model
    with pytest.raises(UserError, match="no such folder"):
        checkpoint.model_settings_of(given + "/none")
