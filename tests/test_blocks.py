"""Chunks pass through Ray Data as blocks: one each, or several with many replicas."""

import numpy as np
import pytest

from unet_ray.inference.chunk_size import RowCost, chunks_per_block
from unet_ray.ray_backend.inference import _block_of, _chunks_of, _Numbers


@pytest.mark.parametrize("each", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 3, 4, 5, 4095, 4096, 4097, 8191, 20_000])
def test_every_number_is_read_once_and_blocks_are_full(count, each):
    source = _Numbers(range(count), each)
    assert np.concatenate(source.groups).tolist() == list(range(count))
    sizes = [len(group) for group in source.groups]
    assert len(set(sizes[:-1])) <= 1 and max(sizes) <= 4096 + each
    assert all(size == source.blocks_per_task * each for size in sizes[:-1])
    assert sizes[-1] <= source.blocks_per_task * each


def test_a_block_is_cut_into_the_chunks_that_it_was_made_of():
    chunks = [{"number": np.full(rows, number), "x": np.arange(rows)} for number, rows in ((3, 2), (4, 1), (9, 5))]
    empty = {"number": np.zeros(0, int), "x": np.zeros(0, int)}
    found = list(_chunks_of(_block_of([empty, *chunks, empty])))
    assert [{name: values.tolist() for name, values in chunk.items()} for chunk in found] == [
        {name: values.tolist() for name, values in chunk.items()} for chunk in chunks
    ]
    assert list(_chunks_of(_block_of([empty]))) == [] == list(_chunks_of({}))
    [same] = _chunks_of({"x": np.arange(3)})  # an evaluation's chunks have no numbers
    assert same["x"].tolist() == [0, 1, 2]


CARS, SMALL, BASE_64, TILES = RowCost(786_432, 0.02), RowCost(110_592, 0.005), RowCost(786_432, 1.0), RowCost(1, np.inf)


def test_only_many_replicas_with_much_to_do_get_several_chunks_at_once():
    assert chunks_per_block(10**6, SMALL, 7, "cuda") == 1
    assert chunks_per_block(63, SMALL, 8, "cuda") == 1
    assert chunks_per_block(128, SMALL, 8, "cuda") == 2
    assert chunks_per_block(10**6, SMALL, 8, "cuda") == chunks_per_block(10**6, SMALL, 1000, "cpu") == 16


def test_a_block_has_a_limit_of_memory_and_of_what_a_death_loses():
    assert chunks_per_block(10**6, CARS, 1000, "cuda") == 5
    assert 5 * 64 * CARS.bytes <= 256 * 2**20 < 6 * 64 * CARS.bytes
    assert chunks_per_block(10**6, BASE_64, 1000, "cpu") == 1, "a minute of two cores"
    assert chunks_per_block(10**6, BASE_64, 1000, "cuda") == 5
    assert chunks_per_block(10**6, TILES, 1000, "cuda") == 1, "an image may have any size"
