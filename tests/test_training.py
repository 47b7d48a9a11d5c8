"""Training through Ray Train: the same as in one process, for any number of workers."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import RUN_FILES, make_discs
from runs import config_for, lines

from unet_ray.config import UserError
from unet_ray.ray_backend.session import LOCAL
from unet_ray.training.run import Callbacks, train


@pytest.fixture(scope="module")
def discs(tmp_path_factory) -> tuple[Path, Path]:
    """21 pairs: 14 to train on, 7 to validate on; neither divides by 2 or 3 workers."""
    return make_discs(tmp_path_factory.mktemp("discs"), 21)


SETTINGS = ("model.norm", "none"), ("data.val_fraction", 0.33), ("train.epochs", 3)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for name, tensor in safetensors.torch.load_file(run / "last/state.safetensors").items()
        if name.startswith("model.")
    }


def assert_same_losses(one: Path, other: Path) -> None:
    """Asserts that losses are equal to rounding, and scores except for the few pixels that rounding can flip at the
    threshold. Both must be of exactly the same pixels."""
    for ours, theirs in zip(lines(one), lines(other), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ("train_loss", "val_loss", "learning_rate"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
        for name in ("epoch", "val_images", "val_pixels"):
            assert ours[name] == theirs[name], name
        for name in ("val_dice", "val_iou", "val_pixel_accuracy", "val_dice_global", "val_iou_global"):
            assert ours[name] == pytest.approx(theirs[name], abs=5e-3), name
        [[hits, false, missed]], [[their_hits, their_false, their_missed]] = ours["val_counts"], theirs["val_counts"]
        assert hits + missed == their_hits + their_missed  # the true pixels of the same images
        assert abs(hits - their_hits) + abs(false - their_false) <= 20


def assert_equal_to_rounding(one: Path, other: Path) -> None:
    """Asserts that losses and weights are equal to rounding."""
    assert_same_losses(one, other)
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5), name


def test_one_and_three_workers_and_none_train_the_same_network(ray_cluster, discs, tmp_path):
    local, one, three, streamed = (tmp_path / name for name in ("local", "one", "three", "streamed"))
    # Without momentum, rounding errors stay small over many steps.
    same = ("train.optimizer", "sgd"), ("train.momentum", 0.0), ("train.learning_rate", 1e-2)
    train(config_for(discs, *SETTINGS, *same), str(local), runtime=LOCAL)
    reported = []
    callbacks = Callbacks(on_epoch=reported.append)
    assert train(config_for(discs, *SETTINGS, *same, ("compute.workers", 1)), str(one), callbacks=callbacks).epochs == 3
    threes = *same, ("compute.workers", 3), ("compute.cpus_per_worker", 1)
    train(config_for(discs, *SETTINGS, *threes), str(three), callbacks=callbacks)
    assert [line["epoch"] for line in reported] == [1, 2, 3, 1, 2, 3]
    assert_equal_to_rounding(local, one)
    assert_equal_to_rounding(one, three)
    for line in lines(three):  # each image is scored once, though 7 don't divide by 3
        assert (line["val_images"], line["val_pixels"]) == (7, 7 * 32 * 32)
    written = sorted(str(p.relative_to(three)) for p in three.rglob("*") if p.is_file())
    assert [name for name in written if not name.startswith("tensorboard/")] == RUN_FILES
    # Rows that do not fit in the object store are streamed in every epoch; the result is the same to the last bit.
    train(config_for(discs, *SETTINGS, *threes, ("compute.memory_fraction", 0)), str(streamed))
    assert lines(streamed) == lines(three)
    assert all(torch.equal(*pair) for pair in zip(weights(streamed).values(), weights(three).values(), strict=True))


def test_requests_that_the_cluster_cannot_meet_are_errors_at_once(ray_cluster, discs, tmp_path):
    with pytest.raises(UserError, match="the cluster has 4 CPUs: use --workers 4 or fewer"):
        train(config_for(discs, *SETTINGS, ("compute.workers", 5), ("train.batch_size", 5)), str(tmp_path / "run"))
    with pytest.raises(UserError, match="the cluster has no GPU"):
        train(config_for(discs, *SETTINGS, ("compute.device", "cuda")), str(tmp_path / "run"))
    with pytest.raises(UserError, match="leaves none of 4 CPUs to stream"):
        config = config_for(discs, *SETTINGS, ("compute.workers", 4), ("compute.memory_fraction", 0))
        train(config, str(tmp_path / "run"))


def test_a_bad_pair_is_one_line_that_names_the_file(ray_cluster, tmp_path):
    images, masks = make_discs(tmp_path / "bad", 6)
    (images / "b_001.png").write_bytes((images / "b_001.png").read_bytes()[:300])
    with pytest.raises(UserError, match=r"b_001.png: cannot be decoded: .*; repair or remove it") as error:
        train(config_for((images, masks), *SETTINGS), str(tmp_path / "run"))
    assert "\n" not in str(error.value)
