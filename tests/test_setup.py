"""What is checked before the first epoch."""

import numpy as np
import pytest
from conftest import TINY, make_discs
from PIL import Image
from runs import config_for

from unet_ray.config import DataConfig, UserError
from unet_ray.data.pairs import find_pairs
from unet_ray.ray_backend.session import LOCAL
from unet_ray.settings import load_train_config
from unet_ray.training.run import train
from unet_ray.training.setup import Split, resolved


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


def test_settings_are_taken_from_training_masks_only(tmp_path):
    images, masks = make_discs(tmp_path / "discs", 12)
    settings = [("data.images", str(images)), ("data.masks", str(masks)), ("train.class_weights", "inverse")]
    config = load_train_config(settings=[*TINY, *settings])
    split = Split.of(find_pairs(DataConfig(images=str(images), masks=str(masks))), config.data, config.train.seed)
    before = resolved(config, split.train_masks)
    assert before.data.mask_values == (0, 255)
    for index in split.val:
        stored = np.asarray(Image.open(split.pairs[index].mask)).copy()
        stored[:] = 255
        stored[0] = 7
        Image.fromarray(stored).save(split.pairs[index].mask)
    assert resolved(config, split.train_masks) == before
    # A value that occurs in validation alone is an error that names it.
    with pytest.raises(UserError, match="7") as error:
        train(config, str(tmp_path / "run"), runtime=LOCAL)
    assert any(split.pairs[index].mask in str(error.value) for index in split.val)
