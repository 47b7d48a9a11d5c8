"""`--adapt`: the statistics of other images in the batch norms, without masks."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from conftest import make_bad, make_discs, make_model, make_photos
from PIL import Image
from runs import trained_on_discs
from torch import nn

from unet_ray.cli import main
from unet_ray.config import EvaluateConfig, PredictConfig, UserError
from unet_ray.evaluation.evaluate import evaluate
from unet_ray.inference.predict import predict
from unet_ray.models.blend_norms import blend
from unet_ray.models.checkpoint import (
    CLEANUP,
    THRESHOLD,
    read_card,
    read_cleanup,
    read_looks,
    read_threshold,
    save_choice,
)
from unet_ray.ray_backend.session import LOCAL
from unet_ray.selection.select import select


def network() -> nn.Sequential:
    """Two batch norms that take the images for white noise."""
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 5, 3), nn.ReLU(), nn.BatchNorm2d(5)).eval()


def test_a_norm_gets_a_share_of_the_statistics_of_all_batches():
    images = torch.rand(6, 3, 8, 9) * torch.tensor([1.0, 2.0, 3.0]).reshape(-1, 1, 1) + 5
    net = network()
    blend(net, [images[:4], images[4:]], 0.25)
    values = images.transpose(0, 1).flatten(1)
    assert torch.allclose(net[0].running_mean, 0.25 * values.mean(dim=1))
    assert torch.allclose(net[0].running_var, 0.75 + 0.25 * values.var(dim=1, correction=0), atol=1e-5)
    # The second norm sees the images as the first one, with all of these statistics, passes them on.
    with torch.no_grad():
        seen = net[2](net[1](network()[0].train()(images)))
    whole = network()
    blend(whole, [images], 1.0)
    assert torch.allclose(whole[3].running_mean, seen.transpose(0, 1).flatten(1).mean(dim=1), atol=1e-5)
    assert not whole[0]._forward_pre_hooks, "no hook stays"


def test_nothing_is_blended_without_images_or_with_strength_0():
    for batches, strength in (([], 1.0), ([torch.rand(2, 3, 8, 8)], 0.0)):
        net = network()
        blend(net, batches, strength)
        for name, value in network().state_dict().items():
            assert torch.equal(net.state_dict()[name], value), name


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A network that has learnt discs."""
    folder = tmp_path_factory.mktemp("discs")
    return trained_on_discs(folder, 24, ("train.epochs", 30), ("data.val_fraction", 0.1))


@pytest.fixture(scope="module")
def foggy(tmp_path_factory) -> tuple[Path, Path]:
    """Other discs, brighter and with a third of the contrast."""
    images, masks = make_discs(tmp_path_factory.mktemp("foggy"), 40, seed=1)
    for file in images.iterdir():
        pixels = np.asarray(Image.open(file)).astype(np.float32)
        Image.fromarray((pixels / 3 + 120).astype(np.uint8)).save(file)
    return images, masks


def test_an_adapted_model_is_better_on_images_of_another_camera_and_nothing_stays_behind(run, foggy):
    images, masks = map(str, foggy)
    command = ["evaluate", str(run), "--images", images, "--masks", masks, "--adapt", "--against", str(run)]
    done = CliRunner().invoke(main, [*command, "--local", "--json"])
    assert done.exit_code == 0, done.output
    scores = json.loads(done.stdout)
    assert scores["dice"]["mean"] > scores["against"]["dice"]["mean"] + 0.1, "the other is not adapted"
    assert not [file for file in (run / "model").iterdir() if file.name.startswith(".")]


def settings(model: Path, folder: Path, out: Path, **options) -> PredictConfig:
    return PredictConfig(model=str(model), inputs=(str(folder),), out=str(out), precision="fp32", adapt=True, **options)


def masks_in(out: Path) -> dict[str, bytes]:
    return {str(file.relative_to(out)): file.read_bytes() for file in (out / "masks").rglob("*.png")}


def test_a_stopped_prediction_goes_on_with_the_same_adapted_model(run, foggy, tmp_path, small_chunks):
    photos = tmp_path / "photos"
    shutil.copytree(foggy[0], photos)
    predict(settings(run, photos, tmp_path / "whole"), runtime=LOCAL)

    def stop(done, _failed, all_images):
        if all_images and done >= 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict(settings(run, photos, tmp_path / "OUT"), runtime=LOCAL, on_progress=stop)
    adapted = (tmp_path / "OUT/adapted/model.safetensors").read_bytes()
    for file in sorted(photos.iterdir())[-8:]:  # a new sample would be another
        Image.open(file).point(lambda value: value // 2).save(file)
    shutil.copytree(foggy[0], photos, dirs_exist_ok=True)
    summary = predict(settings(run, photos, tmp_path / "OUT"), runtime=LOCAL)
    assert summary.already_done and summary.failed == 0
    assert (tmp_path / "OUT/adapted/model.safetensors").read_bytes() == adapted
    assert masks_in(tmp_path / "OUT") == masks_in(tmp_path / "whole")
    assert read_card(str(tmp_path / "OUT/adapted")).weights_sha256 != read_card(str(run / "model")).weights_sha256

    # The adapted model is a model as any other.
    plain = PredictConfig(
        model=str(tmp_path / "OUT/adapted"), inputs=(str(photos),), out=str(tmp_path / "again"), precision="fp32"
    )
    predict(plain, runtime=LOCAL)
    assert masks_in(tmp_path / "again") == masks_in(tmp_path / "whole")
    with pytest.raises(UserError, match="would remove the model"):
        predict(dataclasses.replace(plain, out=str(tmp_path / "OUT"), overwrite=True), runtime=LOCAL)
    with pytest.raises(UserError, match=r"other .*adapt"):
        predict(settings(run, photos, tmp_path / "again"), runtime=LOCAL)


def test_the_model_stays_as_it_is_for_images_that_look_like_those_of_its_training(run, tmp_path, caplog):
    same, _ = make_discs(tmp_path / "same", 12, seed=2)
    predict(settings(run, same, tmp_path / "OUT"), runtime=LOCAL)
    assert "the images look like those of the training, so the model stays as it is" in caplog.text
    predict(dataclasses.replace(settings(run, same, tmp_path / "plain"), adapt=False), runtime=LOCAL)
    assert masks_in(tmp_path / "OUT") == masks_in(tmp_path / "plain")
    assert [file.name for file in (tmp_path / "OUT/adapted").iterdir()] == ["adapted.json"]
    (run / "model/looks.json").rename(tmp_path / "looks.json")  # a model of an earlier version: it is adapted
    try:
        predict(settings(run, same, tmp_path / "old"), runtime=LOCAL)
    finally:
        (tmp_path / "looks.json").rename(run / "model/looks.json")
    assert read_card(str(tmp_path / "old/adapted")).weights_sha256 != read_card(str(run / "model")).weights_sha256


def test_an_adapted_model_keeps_the_chosen_threshold_and_clean_up(run, foggy, tmp_path):
    model = str(tmp_path / "model")
    shutil.copytree(run / "model", model)
    card = read_card(model)
    save_choice(model, THRESHOLD, card, {"threshold": 0.3})
    save_choice(model, CLEANUP, card, {"cleanup": "largest"})
    predict(settings(Path(model), foggy[0], tmp_path / "OUT"), runtime=LOCAL)
    adapted = str(tmp_path / "OUT/adapted")
    assert read_threshold(adapted, read_card(adapted)) == 0.3 and read_cleanup(adapted, read_card(adapted)) == "largest"
    assert read_looks(adapted) == read_looks(model) != {}


def test_overwrite_adapts_anew(run, foggy, tmp_path):
    predict(settings(run, foggy[0], tmp_path / "OUT"), runtime=LOCAL)
    adapted = (tmp_path / "OUT/adapted/model.safetensors").read_bytes()
    other = make_photos(tmp_path / "photos", 9)
    predict(settings(run, other, tmp_path / "OUT", overwrite=True), runtime=LOCAL)
    assert (tmp_path / "OUT/adapted/model.safetensors").read_bytes() != adapted


def test_tiles_and_images_that_cant_be_read(run, foggy, tmp_path, caplog):
    shutil.copytree(foggy[0], tmp_path / "photos")
    bad = len(make_bad(tmp_path / "photos/bad"))
    summary = predict(settings(run, tmp_path / "photos", tmp_path / "OUT", tile=16, strict=True), runtime=LOCAL)
    assert summary.ok == 40 and summary.failed == bad
    assert len(pq.read_table(tmp_path / "OUT/manifest.parquet")) == 40 + bad
    none = predict(settings(run, tmp_path / "photos/bad", tmp_path / "none", strict=True), runtime=LOCAL)
    assert none.failed == bad and not none.ok, "rows, not the end of the job"
    assert "can't be read, as far as they were tried, so the model stays as it is" in caplog.text


def test_what_cant_be_adapted_is_refused(tmp_path, discs):
    model = make_model(tmp_path / "model", ("model.norm", "group"))
    with pytest.raises(UserError, match=r"has none \(model.norm=group\): leave --adapt out"):
        predict(settings(model, discs[0], tmp_path / "OUT"), runtime=LOCAL)
    predict(dataclasses.replace(settings(model, discs[0], tmp_path / "OUT"), adapt=False), runtime=LOCAL)  # as it says
    with pytest.raises(UserError, match="leave it out"):
        select(settings(model, discs[0], tmp_path / "PICKS"), 3, runtime=LOCAL)
    with pytest.raises(UserError, match="leave --ensemble out"):
        EvaluateConfig(model="RUN", adapt=True, ensemble=("OTHER",))
    with pytest.raises(UserError, match="int8 is for those of"):
        EvaluateConfig(model="RUN", adapt=True, precision="int8")
    with pytest.raises(UserError, match="name OTHER/adapted as the model of all parts"):
        settings(model, discs[0], tmp_path / "OUT", part="1/2")
    done = CliRunner().invoke(main, ["evaluate", str(model), "--adapt", "--choose-threshold"])
    assert (
        isinstance(done.exception, (UserError, SystemExit)) and "leave --adapt out" in str(done.exception) + done.output
    )
    with pytest.raises(UserError, match="has none"):
        evaluate(EvaluateConfig(model=str(model), images=str(discs[0]), masks=str(discs[1]), adapt=True), runtime=LOCAL)
    assert not [file.name for file in model.iterdir() if file.name.startswith(".")]
