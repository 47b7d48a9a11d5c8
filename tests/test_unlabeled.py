"""Images without masks in training: what counts as sure, what is changed, and that training stays as it was."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import TINY, flags, make_discs
from runs import lines, weights_sha256

from unet_ray.cli import main
from unet_ray.config import IGNORE, UserError
from unet_ray.data.rows import Decoder
from unet_ray.settings import load_train_config
from unet_ray.training.step import prepare
from unet_ray.training.unlabeled import HOLE, changed, consistency, pseudo_masks, ramp


def test_only_pixels_that_the_teacher_is_sure_of_count():
    one = torch.tensor([[[[4.0, -4.0, 0.5]]]])
    assert pseudo_masks(one, 0.95).tolist() == [[[1, 0, IGNORE]]]
    several = torch.log(torch.tensor([0.02, 0.97, 0.01])).reshape(1, 3, 1, 1)
    assert pseudo_masks(several, 0.95).tolist() == [[[1]]] and pseudo_masks(several, 0.98).tolist() == [[[IGNORE]]]
    logits = torch.zeros(1, 1, 1, 4)
    sure, half = torch.tensor([[[1, 1, 0, 0]]]), torch.tensor([[[1, IGNORE, 0, IGNORE]]])
    assert consistency(logits, half.to(torch.uint8)) == pytest.approx(
        float(consistency(logits, sure.to(torch.uint8))) / 2
    )
    assert consistency(logits, torch.full((1, 1, 4), IGNORE, dtype=torch.uint8)) == 0


def test_their_weight_rises_to_that_of_the_settings():
    assert ramp(0.02) < 0.01 and ramp(0.5) == pytest.approx(0.2865, abs=1e-4) and ramp(1.0) == 1.0


def test_a_change_depends_on_seed_epoch_and_image_alone_and_its_hole_counts_for_nothing():
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (4, 3, 40, 50), generator=generator, dtype=torch.uint8)
    mask = torch.ones(4, 40, 50, dtype=torch.uint8)
    numbers = np.array([7, 8, 9, 10])
    strong, found = changed(image, mask, numbers, 1, 2)
    again, part = changed(image[2:], mask[2:], numbers[2:], 1, 2)
    assert torch.equal(strong[2:], again) and torch.equal(found[2:], part), "whatever the batch"
    hole = (found == IGNORE)[:, None].expand_as(strong)
    assert hole.any() and (strong[hole] == HOLE).all() and hole.float().mean() < 0.25
    assert (strong != image).float().mean() > 0.5, "other colours"
    assert not torch.equal(strong, changed(image, mask, numbers, 1, 3)[0])
    assert (mask == 1).all() and image.max() <= 255, "the arguments stay"


def test_a_row_without_a_mask_is_all_ignored_and_one_that_cant_be_read_never_counts(discs, tmp_path):
    decode = Decoder.of(load_train_config(settings=TINY))
    photo = sorted(discs[0].iterdir())[0]
    assert (decode(str(photo), "")["mask"] == IGNORE).all() and decode(str(photo), "")["image"].any()
    (tmp_path / "broken.png").write_bytes(photo.read_bytes()[:60])
    for path in (tmp_path / "broken.png", tmp_path / "gone.png"):
        row = decode(str(path), "")
        assert not row["mask"].any() and not row["image"].any()


def test_unlabeled_rows_add_to_the_gradients_only_where_the_teacher_is_sure():
    config = load_train_config(settings=[*TINY, ("train.epochs", 1), ("train.ema", 0.9), ("augment.hflip", 0)])
    generator = np.random.default_rng(0)
    arrays = {
        "image": generator.integers(0, 256, (4, 32, 32, 3)).astype(np.uint8),
        "mask": np.concatenate([np.ones((2, 32, 32)), np.full((2, 32, 32), IGNORE)]).astype(np.uint8),
        "index": np.arange(4),
    }

    def loss(bias: float, **values: object) -> float:
        training = prepare(config, torch.device("cpu"))
        training.ema.module.head.weight.data.zero_()
        training.ema.module.head.bias.data.fill_(bias)
        training.network.eval()  # the statistics of batch norm would mix the two kinds
        return float(training.backward({**arrays, **values}, 1.0, epoch=1, labeled=2))

    only = {name: values[:2] for name, values in arrays.items()}
    training = prepare(config, torch.device("cpu"))
    training.network.eval()
    without = float(training.backward(only, 1.0, epoch=1))
    assert loss(0.0) == pytest.approx(without, rel=1e-5), "a teacher that is sure of nothing"
    assert loss(50.0) > 1.1 * without
    unreadable = np.concatenate([np.ones((2, 32, 32)), np.zeros((2, 32, 32))]).astype(np.uint8)
    assert loss(50.0, mask=unreadable) == pytest.approx(without, rel=1e-5)


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Path:
    """A folder with six pairs, and twenty images of which six are those."""
    folder = tmp_path_factory.mktemp("pool")
    _, masks = make_discs(folder / "all", 20)
    (folder / "few").mkdir()
    for path in sorted(masks.iterdir())[::3][:6]:
        shutil.copy(path, folder / "few")
    return folder


def train(pool: Path, out: Path, *more: object):
    words = [
        "train",
        "--images",
        pool / "all/images",
        "--masks",
        pool / "few",
        "--out",
        out,
        "--no-report",
        *flags(TINY),
    ]
    return CliRunner().invoke(main, [str(each) for each in [*words, "--set", "model.norm=group", *more]])


def test_it_goes_on_after_a_stop_with_the_same_network(pool, tmp_path):
    options = ["--local", "--unlabeled", pool / "all/images"]
    done = train(pool, tmp_path / "whole", *options, "--epochs", 4)
    assert done.exit_code == 0, done.output
    assert "and 14 images without masks" in done.output
    assert len((tmp_path / "whole/unlabeled.txt").read_text().splitlines()) == 14
    assert "ema: 0.99" in (tmp_path / "whole/config.yaml").read_text()
    assert train(pool, tmp_path / "half", *options, "--epochs", 4).exit_code == 0
    # As if it had been stopped after the second epoch.
    assert train(pool, tmp_path / "two", *options, "--epochs", 2).exit_code == 0
    assert train(pool, tmp_path / "two", *options, "--epochs", 4, "--resume").exit_code == 0
    assert lines(tmp_path / "two") == lines(tmp_path / "whole") == lines(tmp_path / "half")
    assert weights_sha256(tmp_path / "two") == weights_sha256(tmp_path / "whole")


def test_two_workers_on_ray_take_the_same_steps(pool, tmp_path, ray_cluster):
    options = ["--unlabeled", pool / "all/images", "--set", "train.unlabeled_confidence=0.6"]
    assert train(pool, tmp_path / "one", *options, "--local").exit_code == 0
    assert train(pool, tmp_path / "two", *options, "--workers", 2).exit_code == 0
    losses = [[line["train_loss"] for line in lines(tmp_path / name)] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


def test_changed_and_missing_pools_are_said(pool, tmp_path):
    shutil.copytree(pool, tmp_path / "pool")
    extra = tmp_path / "extra"
    make_discs(extra, 5, seed=3)
    options = ["--local", "--unlabeled", extra / "images", "--epochs"]
    assert train(tmp_path / "pool", tmp_path / "RUN", *options, 2).exit_code == 0
    next((extra / "images").iterdir()).unlink()
    done = train(tmp_path / "pool", tmp_path / "RUN", *options, 3, "--resume")
    assert done.exit_code == 2 and "images of --unlabeled have changed" in done.output
    done = train(tmp_path / "pool", tmp_path / "B", "--local", "--unlabeled", tmp_path / "none")
    assert done.exit_code == 2 and "none: no such folder" in done.output
    with pytest.raises(UserError, match=r"need model\.padding=same"):
        load_train_config(settings=[("data.unlabeled", "x"), ("model.padding", "valid"), ("data.image_size", 36)])


def test_images_that_are_held_out_are_no_unlabeled_ones_be_it_by_another_name_of_the_folder(pool, tmp_path):
    masks = sorted((pool / "few").iterdir())
    with (tmp_path / "split.csv").open("w") as file:
        file.write("key,part\n")
        for number, path in enumerate(masks):
            file.write(f"{path.stem},{['train', 'train', 'val', 'test'][number % 4]}\n")
    (tmp_path / "same").symlink_to(pool / "all")
    options = ["--local", "--unlabeled", tmp_path / "same/images", "--split", tmp_path / "split.csv"]
    assert train(pool, tmp_path / "RUN", *options).exit_code == 0
    names = (tmp_path / "RUN/unlabeled.txt").read_text()
    assert not [path.stem for path in masks if path.stem in names]
    assert json.loads((tmp_path / "RUN/metrics.jsonl").read_text().splitlines()[0])["val_dice"] >= 0
