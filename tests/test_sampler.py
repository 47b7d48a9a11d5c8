"""The rows of a batch, on one rank and on several."""

import dataclasses

import numpy as np
import pytest

from unet_ray.training.sampler import EpochBatches, MicroBatch, Sampler


def steps_of(sampler: Sampler, epoch: int) -> list[list[MicroBatch]]:
    """Returns the micro-batches of each optimizer step."""
    steps: list[list[MicroBatch]] = [[]]
    for micro in sampler.epoch(epoch):
        steps[-1].append(micro)
        if micro.ends_step:
            steps.append([])
    assert steps.pop() == []
    return steps


@pytest.mark.parametrize("count", [1, 7, 12, 13])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_rank_takes_as_many_steps_and_each_row_counts_once(count, world_size, accumulate):
    by_rank = [
        steps_of(Sampler(rows=count, batch_size=4, seed=1, rank=rank, world_size=world_size, accumulate=accumulate), 2)
        for rank in range(world_size)
    ]
    assert {len(steps) for steps in by_rank} == {-(-count // 4)}
    seen = []
    for of_ranks in zip(*by_rank, strict=True):
        micro_batches = [micro for step in of_ranks for micro in step]
        assert all(1 <= len(step) <= accumulate for step in of_ranks)
        assert sum(micro.weight for micro in micro_batches) == pytest.approx(world_size)
        batch = [int(i) for micro in micro_batches if micro.weight for i in micro.indices]
        assert 1 <= len(batch) <= 4
        seen += batch
    assert sorted(seen) == list(range(count))


def test_batches_do_not_depend_on_the_number_of_workers_but_on_the_epoch():
    def batches(world_size, epoch):
        by_rank = [
            steps_of(Sampler(rows=13, batch_size=4, seed=1, rank=rank, world_size=world_size), epoch)
            for rank in range(world_size)
        ]
        return [
            {int(i) for [micro] in of_ranks if micro.weight for i in micro.indices}
            for of_ranks in zip(*by_rank, strict=True)
        ]

    assert batches(1, 1) == batches(2, 1) == batches(3, 1)
    assert batches(1, 1) != batches(1, 2)


def test_batches_of_an_epoch_are_equally_large_give_or_take_one():
    assert {len(micro.indices) for micro in Sampler(rows=13, batch_size=4, seed=0).epoch(1)} == {3, 4}


def test_loaded_micro_batches_are_the_samplers_with_their_arrays():
    class Rows:
        def __len__(self):
            return 7

        def batches(self, plan):
            for indices in plan:
                yield {"image": indices * 10, "index": indices}

    sampler = Sampler(rows=7, batch_size=4, seed=0, accumulate=2)
    micro_batches = sampler.epoch(1)
    batches = EpochBatches(Rows(), micro_batches)
    assert batches.steps == sampler.steps == 2
    loaded = list(batches)
    assert [(arrays["index"].tolist(), labeled, weight, ends) for arrays, labeled, weight, ends in loaded] == [
        (micro.indices.tolist(), len(micro.indices), micro.weight, micro.ends_step) for micro in micro_batches
    ]

    assert [ends for _, _, _, ends in loaded] == [False, True, False, True]
    assert batches.wait_seconds > 0


@pytest.mark.parametrize("unlabeled", [3, 7, 100])
def test_rows_without_masks_are_as_many_and_do_not_depend_on_the_ranks(unlabeled):
    whole = Sampler(rows=22, batch_size=6, seed=1, unlabeled=unlabeled)
    for epoch in (1, 2):
        ranks = [dataclasses.replace(whole, rank=rank, world_size=3, accumulate=2).epoch(epoch) for rank in range(3)]
        one = whole.epoch(epoch)
        used = np.concatenate([micro.unlabeled for micro in one])
        assert len(used) == 22 and len(set(used.tolist())) == min(22, unlabeled)
        assert used.min() >= 22 and used.max() < 22 + unlabeled
        assert [len(micro.unlabeled) for micro in one] == [len(micro.indices) for micro in one]
        of_ranks = [micro.unlabeled for rank in ranks for micro in rank]
        assert sorted(np.concatenate(of_ranks).tolist()) == sorted(used.tolist())
    assert not np.array_equal(*(np.concatenate([m.unlabeled for m in whole.epoch(epoch)]) for epoch in (1, 2)))
