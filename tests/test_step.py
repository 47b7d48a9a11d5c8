"""One training step."""

import dataclasses

import numpy as np
import pytest
import torch
from runs import config_for

from unet_ray.training.distributed import over_ranks
from unet_ray.training.step import prepare

BATCH = {
    "image": np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8),
    "mask": np.ones((2, 32, 32), np.uint8),
    "index": np.arange(2),
}


def test_gradients_are_cut_to_the_norm_asked_for(discs):
    config = config_for(discs, ("train.clip_norm", 1e-3), ("train.optimizer", "sgd"), ("train.momentum", 0))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, learning_rate=1.0, weight_decay=0.0))
    training = prepare(config, torch.device("cpu"))
    initial = [p.detach().clone() for p in training.network.parameters()]
    training.ddp_network.train()
    training.backward(BATCH, 1.0, epoch=1)
    training.update()
    moved = sum(((p - q) ** 2).sum() for p, q in zip(training.network.parameters(), initial, strict=True)).sqrt()
    assert moved.item() == pytest.approx(1e-3, rel=1e-3)


def test_ranks_exchange_gradients_once_per_step(discs, tmp_path):
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store")), rank=0, world_size=1
    )
    try:
        training = prepare(config_for(discs), torch.device("cpu"))
        training.ddp_network = training.forward = over_ranks(training.network, training.device)
        exchanged = []

        def hook(_state, bucket):
            exchanged.append(bucket.index())
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        training.ddp_network.register_comm_hook(None, hook)
        training.ddp_network.train()
        for ends_step in (False, False, True):
            assert not exchanged
            training.backward(BATCH, 0.25, epoch=1, ends_step=ends_step)
        assert exchanged == [0]
    finally:
        torch.distributed.destroy_process_group()


def test_the_loss_of_several_heads_is_the_mean_of_theirs(discs):
    training = prepare(
        config_for(discs, ("model.name", "unet++"), ("model.deep_supervision", True)), torch.device("cpu")
    )
    training.ddp_network.train()
    images, masks, _ = training.inputs(BATCH, 1)
    each = [training.loss(logits, masks).mean().item() for logits in training.network(images)]
    assert len(each) == training.config.model.depth > 1
    assert training.backward(BATCH, 0.5, epoch=1).item() == pytest.approx(0.5 * np.mean(each), rel=1e-4)
