"""What is checked before the first epoch."""

import pytest
from runs import config_for

from unet_ray.config import UserError
from unet_ray.ray_backend.session import LOCAL
from unet_ray.training.run import train


def test_fp16_on_a_cpu_is_refused(discs, tmp_path):
    with pytest.raises(UserError, match="fp16 is for CUDA"):
        train(config_for(discs, ("train.precision", "fp16")), str(tmp_path / "run"), runtime=LOCAL)


def test_an_out_that_holds_something_is_refused(discs, tmp_path):
    config, run = config_for(discs, ("train.epochs", 1)), tmp_path / "run"
    train(config, str(run), runtime=LOCAL)
    with pytest.raises(UserError, match="holds another run: choose another --out, or --resume"):
        train(config, str(run), runtime=LOCAL)
    with pytest.raises(UserError, match="is finished"):
        train(config, str(run), runtime=LOCAL, resume=True)
    with pytest.raises(UserError, match="other settings"):
        train(config_for(discs, ("train.epochs", 2), ("model.norm", "none")), str(run), runtime=LOCAL, resume=True)
    for folder in discs:
        (folder / "z_new.png").write_bytes((folder / "a_000.png").read_bytes())
    with pytest.raises(UserError, match="images have come, gone or changed sides"):
        train(config_for(discs, ("train.epochs", 2)), str(run), runtime=LOCAL, resume=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    with pytest.raises(UserError, match="holds other files"):
        train(config, str(tmp_path / "mine"), runtime=LOCAL)
