"""Training rows: in memory and streamed."""

import numpy as np
from runs import config_for

from unet_ray.data.pairs import find_pairs
from unet_ray.data.rows import Decoder, MemoryRows, StreamedRows
from unet_ray.training.sampler import Sampler


def test_rows_in_memory_and_streamed_rows_are_the_same(discs):
    config = config_for(discs, ("data.mask_values", "[0, 255]"))
    pairs = find_pairs(config.data)
    decoder = Decoder.of(config)
    plan = [micro.indices for micro in Sampler(rows=len(pairs), batch_size=5, seed=0).epoch(1)]
    kinds = [list(kind(pairs, decoder).batches(plan)) for kind in (MemoryRows, StreamedRows)]
    assert len(kinds[0]) == len(kinds[1]) == 3
    for one, other in zip(*kinds, strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in ("image", "mask", "index"))
        assert one["image"].dtype == one["mask"].dtype == np.uint8
