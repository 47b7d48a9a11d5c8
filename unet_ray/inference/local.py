"""Runs the stages of prediction and evaluation in this process; `ray_backend.inference` runs them on Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from unet_ray.data.chunks import Chunk, Stage


def run_here(
    numbers: Sequence[int], preprocess: Callable[[int], Chunk], model: Callable[[], Stage], postprocess: Stage
) -> Iterator[Chunk]:
    """Runs the model on this thread, and on two others preprocesses the next chunk and postprocesses the previous one.

    Yields what `postprocess` returns, in the order of `numbers`. Skips chunks without rows.
    """
    segment = model()
    threads = torch.get_num_threads()
    # One torch thread each, because more would compete with the network's for the same cores. `set_num_threads` sets
    # this thread's number, and the default of threads that start later.
    one_thread = partial(ThreadPoolExecutor, 1, initializer=torch.set_num_threads, initargs=(1,))
    with one_thread() as preprocessing, one_thread() as postprocessing:
        upcoming = [preprocessing.submit(preprocess, number) for number in numbers[:1]]
        pending = None
        try:
            for place in range(len(numbers)):
                decoded = upcoming.pop().result()
                upcoming = [preprocessing.submit(preprocess, number) for number in numbers[place + 1 : place + 2]]
                if not len(decoded["path"]):
                    continue
                segmented = segment(decoded)
                if pending is not None:
                    yield pending.result()
                pending = postprocessing.submit(postprocess, segmented)
            if pending is not None:
                yield pending.result()
        finally:
            preprocessing.shutdown(wait=False, cancel_futures=True)
            torch.set_num_threads(threads)
